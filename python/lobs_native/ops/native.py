"""The native module: its one import, and how a tensor and a status cross.

A tensor crosses as pointer, dtype code, shape and strides, so one build serves every torch;
everything that could make native code read or write the wrong memory is refused first, by
checks.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native.errors import LobsError

try:
    from lobs_native import _core
except ImportError as error:  # pragma: no cover - only in a broken installation
    raise ImportError(
        "lobs_native._core, the compiled part, is missing or does not load. From a source tree, "
        f"run 'pip install .' and do not import from inside the tree. The loader said: {error}"
    ) from error

__all__ = [
    "CODES",
    "_core",
    "call",
    "check_status",
    "crossing",
    "full_precision",
    "on_device",
    "parallel_runtime",
    "threads",
]

CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_DEVICE_FAILED = 7

# A parallel region in a forked child hangs if the parent has had one, torch's own regions
# included: children of processes that use this package work on one thread.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def threads() -> int:
    """Threads that a native call will use: torch's setting, which is 1 in a forked child."""
    return max(1, torch.get_num_threads())


def parallel_runtime() -> str:
    """``"openmp"`` or ``"std::thread"``, as built."""
    return _core.parallel_runtime


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """torch's float32 products in float32, whatever the user has set for the whole process.

    With TF32 or bfloat16 products a repair would be wrong in its fourth digit.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_device(backend: str) -> bool:
    """Whether a backend (its own name) runs on a device and only enqueues its work."""
    return any(row[0] == backend and row[3] for row in _core.backends())


def call(
    operation: str, backend: str, device: torch.device, *arguments: Any, workers: int | None = None
) -> tuple[int, int]:
    """Call an operation of _core; (status, where).

    On a device the kernels go to torch's current stream, all scratch comes from torch's allocator,
    and reading the status is the one point where the host waits.
    """
    function = getattr(_core, operation)
    workers = threads() if workers is None else workers
    if not on_device(backend):
        status, where = function(backend, *arguments, workers)
        return int(status), int(where)
    held: list[Tensor] = []

    def allocate(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=device))
        return held[-1].data_ptr()

    report = torch.full((1,), -1, dtype=torch.int64, device=device)
    ordinal, stream = 0, 0
    if device.type == "cuda":
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
    place = (ordinal, stream, allocate, report.data_ptr())
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        status, where = function(backend, *arguments, workers, place)
    if status == _DEVICE_FAILED:
        raise LobsError(f"backend: {backend!r}: the device refused {operation}: error {where}")
    if status == 0 and (word := int(report)) != -1:
        return word % 16, word // 16
    return int(status), int(where)


def crossing(x: Tensor) -> tuple[int, int, Sequence[int], Sequence[int]]:
    return (x.data_ptr(), CODES.get(x.dtype, -1), tuple(x.shape), tuple(x.stride()))


def check_status(status: int) -> None:
    if status == 3:
        raise MemoryError("lobs_native: scratch memory for a native call could not be allocated")
    if status:  # pragma: no cover - a status that the caller did not expect
        raise LobsError(f"native call ended with status {status}")
