"""The native module: its only import, and how tensors, dtypes and statuses pass to and from it.

A tensor passes as pointer, dtype, shape and strides, so that one build serves every version of
torch. :mod:`lobs_native.checks` first refuses whatever could make native code read or write the
wrong memory.
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
    from lobs_native import _core as core
except ImportError as error:  # pragma: no cover - only in a broken installation
    raise ImportError(
        "lobs_native._core, the compiled part, is missing or does not load. From a source tree, "
        f"run 'pip install .' and do not import from inside the tree. The loader said: {error}"
    ) from error

__all__ = [
    "DTYPES",
    "AdmmPlan",
    "ColumnsPlan",
    "ExactPlan",
    "Status",
    "WeightState",
    "call",
    "check_status",
    "core",
    "crossing",
    "full_precision",
    "has",
    "on_device",
    "one_thread",
    "parallel_runtime",
    "threads",
]

AdmmPlan = core.AdmmPlan
ColumnsPlan = core.ColumnsPlan
ExactPlan = core.ExactPlan
Status = core.Status
WeightState = core.WeightState

DTYPES = {
    torch.float64: core.Dtype.F64,
    torch.float32: core.Dtype.F32,
    torch.float16: core.Dtype.F16,
    torch.bfloat16: core.Dtype.BF16,
}

# A parallel region in a forked child hangs if the parent has had one, and torch's own regions
# count. So children of processes that use this package work on one thread.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def threads() -> int:
    """Threads that a native call will use: torch's setting, which is 1 in a forked child."""
    return max(1, torch.get_num_threads())


def parallel_runtime() -> str:
    """``"openmp"`` or ``"std::thread"``, as built."""
    return core.parallel_runtime


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute torch's float32 products in float32, whatever the process-wide setting is.

    With TF32 or bfloat16 products a repair would be wrong in its fourth digit.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the last bits of LAPACK's results depend on the number of them.

    For small factorisations only. Products do not depend on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_device(backend: str) -> bool:
    """Whether a backend (by its own name) runs on a device, where it only enqueues its work."""
    return any(row[0] == backend and row[3] for row in core.backends())


def has(backend: str, operation: str) -> bool:
    """Whether a native backend (by its own name) has an operation in the backend table."""
    return core.has(backend, operation)


def call(
    operation: str, backend: str, device: torch.device, *arguments: Any, workers: int | None = None
) -> tuple[Status, int]:
    """Call a native operation; (status, where).

    On a device the kernels go to torch's current stream and all scratch comes from torch's
    allocator. The host waits only once, to read the status.
    """
    function = getattr(core, operation)
    workers = threads() if workers is None else workers
    status: Status
    where: int
    if not on_device(backend):
        status, where = function(backend, *arguments, workers)
        return status, where
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
    if status == Status.DEVICE_FAILED:
        raise LobsError(
            f"backend: {backend!r}: {operation} failed on the device with error {where}"
        )
    return core.info_of(int(report)) if status == Status.OK else (status, where)


def crossing(x: Tensor) -> tuple[int, int, Sequence[int], Sequence[int]]:
    """A tensor as native code takes it. Dtypes that no kernel computes in are passed as -1."""
    return (x.data_ptr(), DTYPES.get(x.dtype, -1), tuple(x.shape), tuple(x.stride()))


def check_status(status: Status) -> None:
    """Raise unless the status is ``OK``, for callers that have handled those they expect."""
    if status == Status.OUT_OF_MEMORY:
        raise MemoryError("lobs_native: scratch memory for a native call could not be allocated")
    if status != Status.OK:  # pragma: no cover - a status that the caller did not expect
        raise LobsError(f"a native call ended with status {status.name}")
