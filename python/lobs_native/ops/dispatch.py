"""Backends: which there are, and which one a call goes to."""

from __future__ import annotations

import os
import warnings

import torch

from lobs_native.errors import BackendError, DtypeError
from lobs_native.ops.native import _core, parallel_runtime, threads

__all__ = ["backends", "levels", "select_backend"]


def backends() -> list[tuple[str, bool, str]]:
    """List the backends as (name, ready, detail).

    Returns
    -------
    list of (str, bool, str)
        ``"cuda"``, ``"cpu"`` and ``"reference"``. ``"cpu"`` stands for the fastest instruction-set
        level of this machine, or the one that the environment variable ``LOBS_CPU_LEVEL`` names
        (``v1``, ``v3``, ``v4``); its detail names the level. Each level is also a backend by
        itself, called ``"cpu_v3"`` and so on.
    """
    native = _core.backends()
    level = _core.resolve("cpu")
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
    """The CPU levels as (name, ready, detail), fastest first; each name is a backend as well."""
    return [row[:3] for row in _core.backends() if row[0].startswith("cpu_")]


def _wrong_level() -> str:
    known = ", ".join(name.removeprefix("cpu_") for name, _, _ in levels())
    asked = os.environ.get("LOBS_CPU_LEVEL")
    return f"LOBS_CPU_LEVEL is {asked!r}, which is no level of this platform; use one of {known}"


def select_backend(backend: str | None, device: torch.device) -> str:
    """The backend's own name for a call on ``device``.

    ``None`` means the fastest: the CPU kernels for CPU tensors, the CUDA kernels for CUDA tensors
    where they can run (else ``"reference"``, with one warning), ``"reference"`` for any other
    device. What was chosen is in every result.
    """
    if backend is None:
        backend = _fastest(device)
    if not isinstance(backend, str):
        raise DtypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend == "reference":
        return backend
    native = {row[0]: row for row in _core.backends()}
    if backend != "cpu" and backend not in native:
        known = ", ".join(["cpu", *native, "reference"])
        raise BackendError(f"backend: there is none called {backend!r}; known: {known}")
    row = native.get(_core.resolve(backend) or "")
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
    _, ready, detail, _ = next(row for row in _core.backends() if row[0] == "cuda")
    if not ready:
        warnings.warn(
            f"lobs_native: CUDA tensors are worked on in plain torch, slowly: {detail}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference"
    return "cuda"
