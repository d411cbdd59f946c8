"""Choice of a backend: the list of them, and the one that serves a call."""

from __future__ import annotations

import os
import warnings

import torch

from lobs_native.errors import BackendError, DtypeError
from lobs_native.ops.native import core, parallel_runtime, threads

__all__ = ["backends", "levels", "select_backend"]


def backends() -> list[tuple[str, bool, str]]:
    """List the backends as (name, ready, detail).

    Returns
    -------
    list of (str, bool, str)
        ``"cuda"``, ``"cpu"`` and ``"reference"``. ``"cpu"`` stands for the fastest instruction-set
        level of this machine, or for the level that the environment variable ``LOBS_CPU_LEVEL``
        names (``v1``, ``v3``, ``v4``); its detail names the level. Each level is also a backend of
        its own, called ``"cpu_v3"`` and so on.
    """
    native = core.backends()
    level = core.resolve("cpu")
    rows = [row[:3] for row in native if row[0] == "cuda"]
    chosen = next((row for row in native if row[0] == level), None)
    if chosen is None:
        rows.append(("cpu", False, _wrong_level()))
    else:
        detail = f"{level} ({chosen[2]}), {threads()} threads, {parallel_runtime()}"
        rows.append(("cpu", chosen[1], detail))
    rows.append(("reference", True, "plain torch in float64; slow; any device"))
    return rows


def levels() -> list[tuple[str, bool, str]]:
    """List the CPU levels as (name, ready, detail), the fastest first.

    Each name is also a backend.
    """
    return [row[:3] for row in core.backends() if row[0].startswith("cpu_")]


def _wrong_level() -> str:
    known = ", ".join(name.removeprefix("cpu_") for name, _, _ in levels())
    level = os.environ.get("LOBS_CPU_LEVEL")
    return f"LOBS_CPU_LEVEL is {level!r}, not a level of this platform; use one of {known}"


def select_backend(backend: str | None, device: torch.device) -> str:
    """The backend, by its own name, that serves a call on ``device``.

    ``None`` means the fastest one: the CPU kernels for CPU tensors, the CUDA kernels for CUDA
    tensors where they can run (else ``"reference"``, with one warning), and ``"reference"`` for any
    other device. Every result names the backend that was chosen.
    """
    if backend is None:
        backend = _fastest(device)
    if not isinstance(backend, str):
        raise DtypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend == "reference":
        return backend
    native = {row[0]: row for row in core.backends()}
    if backend != "cpu" and backend not in native:
        known = ", ".join(["cpu", *native, "reference"])
        raise BackendError(f"backend: there is none called {backend!r}; known: {known}")
    row = native.get(core.resolve(backend) or "")
    if row is None:
        raise BackendError(f"backend: {_wrong_level()}")
    if not row[1]:
        raise BackendError(
            f"backend: {backend!r} is not ready here: {row[2]}. Use 'cpu' or 'reference'."
        )
    kind = "cuda" if row[0] == "cuda" else "cpu"
    if device.type != kind:
        raise BackendError(
            f"backend: {backend!r} works on {kind} tensors, these are on {device}; move them, or "
            "leave backend out"
        )
    return row[0]


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "reference"
    _, ready, detail, _ = next(row for row in core.backends() if row[0] == "cuda")
    if not ready:
        warnings.warn(
            f"lobs_native: plain torch handles CUDA tensors, slowly: {detail}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference"
    return "cuda"
