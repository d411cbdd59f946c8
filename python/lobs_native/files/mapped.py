"""Memory that shows a part of a file, at an address that stays the same whatever it shows.

Pages come from the file when they are read, and can be dropped at any time as long as nothing was
written to them; the system does so by itself where memory is short. What is written stays in
memory, and never gets into the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs
from lobs_native.files.shelf import Place, memory_of, state_of

__all__ = ["Mapped", "Scratch", "check_system", "is_shown"]

_FIXED = 0x10  # MAP_FIXED of Linux, on all its processors
_FAILED = ctypes.c_void_p(-1).value
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)")


def check_system(name: str) -> None:
    """Raise ArgumentError, about the argument ``name``, where files cannot be mapped like this."""
    if sys.platform != "linux":
        raise ArgumentError(f"{name}: it needs Linux, and this is {sys.platform}; leave it out")


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    number, size = ctypes.c_int, ctypes.c_size_t
    library.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, size]
    library.madvise.argtypes = [ctypes.c_void_p, size, number]
    return library


class Mapped:
    """A tensor whose bytes are those at a place in a file.

    ``tensor`` may be written to; what was written is gone after :meth:`show` and :meth:`drop`. The
    memory is given back with the last tensor that lies in it.
    """

    def __init__(self, place: Place, shape: torch.Size, dtype: torch.dtype) -> None:
        self._library = _library()
        self.offset = place.begin % mmap.PAGESIZE  # in its first page
        size = shape.numel() * dtype.itemsize
        self._length = -(-(self.offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._states: dict[Path, tuple[int, int]] = {}  # of the files, but for a scratch
        self._address = self._map(None, place)
        buffer = (ctypes.c_char * size).from_address(self._address + self.offset)
        free = weakref.finalize(buffer, self._library.munmap, self._address, self._length)
        free.atexit = False  # tensors may be used until the very end of a process
        self.tensor: Tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)

    def show(self, place: Place) -> None:
        """Show this place, which must begin at the same ``offset`` in its page, from now on.

        Raises CheckpointError if the file was changed since it was shown first.
        """
        assert place.begin % mmap.PAGESIZE == self.offset
        self._map(self._address, place)

    def drop(self) -> None:
        """Give back the memory; the bytes are read again from the file when they are needed."""
        self._library.madvise(self._address, self._length, mmap.MADV_DONTNEED)

    def _map(self, address: int | None, place: Place) -> int:
        handle = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not isinstance(place, Slot):
                state = state_of(handle)
                if self._states.setdefault(place.path, state) != state:
                    raise CheckpointError(
                        f"{place.path}: it was changed while it was in use; prune again, and leave "
                        "it alone until the end"
                    )
            flags = mmap.MAP_PRIVATE | (0 if address is None else _FIXED)
            how = mmap.PROT_READ | mmap.PROT_WRITE
            begin = place.begin - self.offset
            found = self._library.mmap(address, self._length, how, flags, handle, begin)
        finally:
            os.close(handle)
        if found in (None, _FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(place.path))
        return int(found)


class Slot(Place):
    """A place in a :class:`Scratch`."""


class Scratch:
    """A file without a name in a folder, which is gone with the process however it ends.

    Raises OSError where the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._free = weakref.finalize(self, os.close, self._handle)

    def room(self, offset: int, size: int) -> Slot:
        """A new place for ``size`` bytes that begins at ``offset`` in its page."""
        begin = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE + offset
        self._end = begin + size
        return Slot(Path(f"/proc/self/fd/{self._handle}"), begin)

    def write(self, slot: Slot, value: Tensor) -> None:
        """Write a contiguous tensor on the CPU to a place that :meth:`room` returned."""
        os.lseek(self._handle, slot.begin, os.SEEK_SET)
        fs.write(self._handle, memory_of(value.detach()))


@dataclass(frozen=True)
class _Area:
    """A part of this process's memory."""

    begin: int
    end: int
    offset: int  # in the file
    path: str
    written: bool  # whether some of its pages are no longer those of the file


def _areas() -> list[_Area]:
    found: list[_Area] = []
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        head: Any = None
        for line in lines:
            if match := _HEAD.match(line):
                head = match
            elif line.startswith("Anonymous:") and head[4].startswith("/"):
                begin, end, offset = (int(head[i], 16) for i in (1, 2, 3))
                written = line.split()[1] != "0"
                found.append(_Area(begin, end, offset, head[4].rstrip("\n"), written))
    return found


def is_shown(values: dict[str, tuple[Tensor, Place]]) -> set[str]:
    """The names of those contiguous tensors whose memory shows their place in a file, unchanged, as
    far as the system tells. They are not read."""
    areas, found = _areas(), set[str]()
    for name, (value, place) in values.items():
        begin = value.data_ptr()
        end = begin + value.numel() * value.element_size()
        path = str(place.path.resolve())
        for area in areas:
            at = area.offset + begin - area.begin
            if area.begin <= begin and end <= area.end and (area.path, at) == (path, place.begin):
                found |= set() if area.written else {name}
    return found
