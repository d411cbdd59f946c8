"""Peak memory of a run and of a layer, as the system reports it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch

from lobs_native.errors import LobsError

__all__ = ["LayerPeak", "Peak", "forget_peak", "give_back", "keep_tight", "resident", "tighter"]

_LARGE = 1 << 20  # bytes
_mapped: list[int] = []  # what keep_tight was called with last
_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


class Peak:
    """The peak memory of this process since :meth:`measuring` began, above what it used then.

    Only on Linux, which has one counter for the whole process.
    """

    _now: ClassVar[list[Peak]] = []  # the objects that are measuring

    def __init__(self) -> None:
        self._before: int | None = None
        self._seen = 0  # bytes before the counter was reset for a layer
        self.before_reset: int | None = None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Peak]:
        """Start measuring, and yield this object."""
        with contextlib.suppress(OSError, LobsError):
            forget_peak()
            self._before = resident("VmRSS")
        Peak._now.append(self)
        try:
            yield self
        finally:
            Peak._now.remove(self)

    def reset(self) -> None:
        """Move the peak so far to ``before_reset``, and restart from zero."""
        self.before_reset, self._seen = self.bytes(), 0
        with contextlib.suppress(OSError):
            forget_peak()

    def bytes(self) -> int | None:
        """The peak; None where it is not known."""
        if self._before is None:
            return None
        # The kernel's mark is some pages off, and may be lower when it is read again.
        self._seen = max(0, self._seen, resident("VmHWM") - self._before)
        return self._seen


class LayerPeak:
    """Peak memory since this object was made, while one layer is pruned: of the process, above what
    it used when the run began; and of a CUDA device, everything that torch had allocated.

    Making it resets both counters (``torch.cuda.reset_peak_memory_stats``).
    """

    def __init__(self, device: torch.device) -> None:
        for peak in Peak._now:
            peak.bytes()
        with contextlib.suppress(OSError):
            forget_peak()
        self._device = device if device.type == "cuda" and torch.cuda.is_initialized() else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def bytes(self) -> int | None:
        """The peak of the process; None where it is not known."""
        before = Peak._now[-1]._before if Peak._now else None
        if before is None:
            return None
        reached = max(0, resident("VmHWM") - before)
        for peak in Peak._now:
            peak._seen = max(peak._seen, reached)
        return reached

    def device_bytes(self) -> int | None:
        """The peak of the device; None for the CPU."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device)


def forget_peak() -> None:
    """Reset the kernel's high-water mark of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def keep_tight(size: int = 1 << 20) -> None:
    """Have glibc map every allocation of ``size`` bytes or more separately, so that it returns to
    the system when it is freed. It holds for the whole process, from now on.

    By default, glibc comes to keep allocations of up to 32 MB, and the gaps between those in use
    count against a limit: 25 to 70 MB in a test, varying from run to run.
    """
    _mapped[:] = [size]
    _map_from(size)


@contextlib.contextmanager
def tighter() -> Iterator[None]:
    """Where :func:`keep_tight` has been called, map smaller allocations separately as well for a
    while: worth it for one batch, where gaps came to as much as 80 MB in some of several runs."""
    if _mapped:
        _map_from(min(_mapped[0], 1 << 18))
    try:
        yield
    finally:
        if _mapped:
            _map_from(_mapped[0])


def _map_from(size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)


def give_back(*, before: int = _LARGE) -> None:
    """Have glibc return to the system what has been freed, before work that takes so many bytes. It
    takes some milliseconds, and is left out where that is little."""
    if before < _LARGE:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(name: str = "VmRSS", process: int | str = "self") -> int:
    """Bytes of a process, by default of this one: ``VmRSS`` now, ``VmHWM`` the most since
    :func:`forget_peak`.

    OSError or LobsError where the system does not report it.
    """
    path = Path(f"/proc/{process}/status")
    match = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    if match is None:
        raise LobsError(f"{path} has no {name}")
    return int(match[1]) * 1024
