"""The command ``lobs-native doctor``: the machine, the installation, and a check of the kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import lobs_native
from lobs_native import ops
from lobs_native.errors import LobsError
from lobs_native.network.inference.timing import processor
from lobs_native.solvers.hessian import Hessian
from lobs_native.solvers.weight import prune_weight

__all__ = ["examine", "openmp_runtimes", "self_check", "table"]

_TOLERANCE = 1e-4  # largest weight difference over largest weight; float32 kernels reach about 1e-6


def examine() -> list[tuple[str, str]]:
    """Versions, processor, threads, OpenMP runtimes, devices: (topic, value) in fixed order."""
    rows = [
        ("lobs_native", lobs_native.__version__),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("torch", str(torch.__version__)),
    ]
    rows += [(name, _version(name)) for name in ("numpy", "safetensors", "tqdm")]
    rows += [
        ("platform", platform.platform()),
        ("CPU", f"{processor()}, {os.cpu_count()} logical cores"),
        ("CPU level", next(detail for name, _, detail in ops.backends() if name == "cpu")),
        ("CPU levels usable here", ", ".join(name for name, ready, _ in ops.levels() if ready)),
        ("LOBS_CPU_LEVEL", os.environ.get("LOBS_CPU_LEVEL") or "not set"),
        ("threads", f"torch {torch.get_num_threads()}, lobs_native {ops.threads()}"),
        ("OpenMP runtimes", _openmp()),
        ("CUDA object", next(detail for name, _, detail in ops.backends() if name == "cuda")),
        ("CUDA in torch", _torch_cuda()),
    ]
    return rows


def self_check() -> tuple[bool, str]:
    """Prune one small random layer on ``"reference"`` and on every other backend that is ready.

    Returns
    -------
    (bool, str)
        Whether masks are equal and weights agree to 1e-4 of the largest, and a one-line summary.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    weight = torch.randn(24, 32, generator=generator)
    agreements = []
    try:
        slow = prune_weight(weight, Hessian(32).update(x), sparsity=0.5, backend="reference")
        for name, ready, _ in ops.backends():
            if name == "reference" or not ready:
                continue
            hessian = Hessian(32, device=name).update(x.to(name))
            native = prune_weight(weight.to(name), hessian, sparsity=0.5, backend=name)
            masks = int((native.mask.cpu() != slow.mask).sum())
            difference = float((native.weight.cpu() - slow.weight).abs().max() / weight.abs().max())
            detail = f"{masks} of {weight.numel()} mask entries differ, weights by {difference:.1e}"
            if masks or not difference <= _TOLERANCE:
                return False, f"failed: {native.backend} and reference disagree: {detail}"
            agreements.append(f"{native.backend} agrees with reference ({detail})")
    except LobsError as error:
        return False, f"failed: {error}"
    return True, "ok: " + "; ".join(agreements)


def table(rows: list[tuple[str, str]]) -> str:
    """The rows as text, values aligned."""
    width = max(len(topic) for topic, _ in rows)
    return "\n".join(f"{topic.ljust(width)}  {value}" for topic, value in rows)


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP libraries in the text of a ``/proc/<pid>/maps``: distinct paths, sorted."""
    paths = set(re.findall(r"(/\S.*)$", maps, flags=re.MULTILINE))
    return sorted(p for p in paths if re.match(r"lib(gomp|i?omp5?)\b", Path(p).name))


def _openmp() -> str:
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return "unknown: this platform has no /proc/self/maps"
    runtimes = openmp_runtimes(maps)
    if not runtimes:
        return "none is loaded"
    if len(runtimes) == 1:
        return f"one: {runtimes[0]}"
    return (
        f"MORE THAN ONE ({len(runtimes)}): {', '.join(runtimes)}. "
        "Their threads compete for the same cores when they work at once"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}; " + ", ".join(f"{k}: {n}" for k, n in enumerate(names))
