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

__all__ = ["LayerPeak", "Peak", "forget_peak", "keep_tight", "resident"]

_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


class Peak:
    """The most memory that this process took since :meth:`measuring` began, above what it had then;
    on Linux, whose counter is one for the whole process."""

    _now: ClassVar[list[Peak]] = []  # that are measuring

    def __init__(self) -> None:
        self._before: int | None = None
        self._seen = 0  # before the counter was reset for a layer
        self.before_reset: int | None = None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Peak]:
        """Start, and give itself."""
        with contextlib.suppress(OSError, LobsError):
            forget_peak()
            self._before = resident("VmRSS")
        Peak._now.append(self)
        try:
            yield self
        finally:
            Peak._now.remove(self)

    def reset(self) -> None:
        """Forget the peak so far, but for ``before_reset``."""
        self.before_reset, self._seen = self.bytes(), 0
        with contextlib.suppress(OSError):
            forget_peak()

    def bytes(self) -> int | None:
        """None where it cannot be known."""
        if self._before is None:
            return None
        return max(0, self._seen, resident("VmHWM") - self._before)


class LayerPeak:
    """The most memory that was in use since this was made, while one layer is pruned: of the
    process, above what it had when the run began; and of a CUDA device, all that torch had
    allocated there.

    It resets the counters of both (``torch.cuda.reset_peak_memory_stats``).
    """

    def __init__(self, device: torch.device) -> None:
        for peak in Peak._now:
            peak._seen = peak.bytes() or 0
        with contextlib.suppress(OSError):
            forget_peak()
        self._device = device if device.type == "cuda" and torch.cuda.is_initialized() else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def bytes(self) -> int | None:
        """Of the process; None where it cannot be known."""
        before = Peak._now[-1]._before if Peak._now else None
        return None if before is None else max(0, resident("VmHWM") - before)

    def device_bytes(self) -> int | None:
        """Of the device; None for the CPU."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device)


def forget_peak() -> None:
    """Reset the kernel's high-water mark of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def keep_tight() -> None:
    """Have glibc map every piece of a megabyte or more by itself, so that it goes back to the
    system when it is freed.

    By default it comes to keep pieces of up to 32 MB, and what lies between those that are in use
    counts against a limit: in a test 25 to 70 MB, other ones in every run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` the most since :func:`forget_peak`.

    OSError or LobsError where the system does not say.
    """
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise LobsError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024
