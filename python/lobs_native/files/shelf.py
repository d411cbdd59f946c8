"""Tensors in memory up to a limit, and in a temporary folder beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lobs_native.errors import CheckpointError

__all__ = ["Place", "Shelf", "memory_of", "state_if_equal", "state_of"]

_PIECE = 1 << 22  # bytes that are compared at a time


class Place(NamedTuple):
    """Where in a file the bytes of a tensor lie."""

    path: Path
    begin: int


@dataclass(frozen=True)
class _OnDisk:
    """A tensor's bytes in a file. They are read, not mapped: pages of a mapped file would count as
    memory of the process."""

    place: Place
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    state: tuple[int, int] | None = None  # of a file that is not the shelf's own: size and time

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def write(self, value: Tensor) -> None:
        with self.place.path.open("wb") as file:
            file.write(memory_of(value.detach().contiguous().cpu()))

    def read(self, first: int, shape: torch.Size) -> Tensor:
        """The tensor of this shape that begins at entry ``first``."""
        value = torch.empty(shape, dtype=self.dtype)
        with self.place.path.open("rb") as file:
            if self.state is not None and state_of(file.fileno()) != self.state:
                raise CheckpointError(
                    f"{self.place.path}: it was changed while it was in use; prune again, and "
                    "leave it alone until the end"
                )
            file.seek(self.place.begin + first * self.dtype.itemsize)
            file.readinto(memory_of(value))
        return value.to(self.device)


def state_of(handle: int) -> tuple[int, int]:
    """The size and the time of the last change of an open file."""
    status = os.stat(handle)
    return status.st_size, status.st_mtime_ns


def state_if_equal(value: Tensor, place: Place) -> tuple[int, int] | None:
    """The state of the file if the bytes of ``value`` lie at this place of it, else None."""
    memory = memory_of(value.detach().contiguous().cpu())
    buffer = torch.empty(min(_PIECE, len(memory)), dtype=torch.uint8)
    with place.path.open("rb") as file:
        file.seek(place.begin)
        for first in range(0, len(memory), _PIECE):
            part = memory[first : first + _PIECE]
            read = buffer[: len(part)]
            if file.readinto(memory_of(read)) != len(part):
                return None
            if not torch.equal(read, torch.frombuffer(part, dtype=torch.uint8)):
                return None
        return state_of(file.fileno())


def memory_of(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    memory: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return memory


class Shelf(Mapping[Any, Tensor]):
    """Tensors by key: in memory as long as they fit into ``limit`` bytes, then on disk.

    The files lie in a temporary folder, which is removed with the shelf. Tensors are returned bit
    for bit, on the device that they came from. What lies in other files anyway (see
    :meth:`put_copy`) counts neither as memory nor as disk.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.in_memory = self.on_disk = 0  # bytes
        self._tensors: dict[Any, Tensor] = {}
        self._files: dict[Any, _OnDisk] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._file_count = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def put(self, key: Hashable, value: Tensor) -> None:
        """Store ``value`` (in memory without a copy) under ``key``, replacing an earlier value."""
        self.drop(key)
        size = value.numel() * value.element_size()
        if self._fits(size):
            self._tensors[key] = value
            self.in_memory += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lobs-native-")
        self._file_count += 1
        place = Place(Path(self._folder.name) / str(self._file_count), 0)
        kept = _OnDisk(place, value.shape, value.dtype, value.device)
        try:
            kept.write(value)
        except OSError:
            place.path.unlink(missing_ok=True)  # it takes what room there is
            raise
        self._files[key] = kept
        self.on_disk += size

    def put_copy(self, key: Hashable, value: Tensor, place: Place | None = None) -> None:
        """Store a copy of ``value`` under ``key``. Where its bytes lie at a ``place`` in a file
        that stays as it is, that place is stored instead."""
        state = None
        if place is not None and value.numel():
            state = state_if_equal(value, place)
        if place is None or state is None:
            self.drop(key)
            kept = value.detach()
            self.put(key, kept.clone() if self._fits(kept.numel() * kept.element_size()) else kept)
            return
        self.drop(key)
        self._files[key] = _OnDisk(place, value.shape, value.dtype, value.device, state)

    def _fits(self, size: int) -> bool:
        return self.limit is None or self.in_memory + size <= self.limit

    def __getitem__(self, key: Hashable) -> Tensor:
        """The tensor under ``key``. Do not write to it."""
        if key in self._tensors:
            return self._tensors[key]
        kept = self._files[key]
        return kept.read(0, kept.shape)

    def copy_of(self, key: Hashable) -> Tensor:
        """The same, to be written to. What is read from disk is a copy already."""
        return self[key].clone() if key in self._tensors else self[key]

    def parts(self, key: Hashable, rows: int) -> Iterator[Tensor]:
        """The tensor under ``key``, so many rows of its first dimension at a time. One on disk is
        never in memory as a whole."""
        if key in self._tensors:
            yield from self._tensors[key].split(rows)
            return
        kept = self._files[key]
        length, *inner = kept.shape
        each = torch.Size(inner).numel()
        for first in range(0, length, rows):
            yield kept.read(first * each, torch.Size([min(rows, length - first), *inner]))

    def __contains__(self, key: object) -> bool:
        return key in self._tensors or key in self._files

    def __iter__(self) -> Iterator[Any]:
        yield from self._tensors
        yield from self._files

    def __len__(self) -> int:
        return len(self._tensors) + len(self._files)

    def drop(self, key: Hashable) -> None:
        """Remove ``key``, if present."""
        if key in self._tensors:
            old = self._tensors.pop(key)
            self.in_memory -= old.numel() * old.element_size()
        if key in self._files:
            kept = self._files.pop(key)
            if kept.state is None:
                kept.place.path.unlink()
                self.on_disk -= kept.size

    def close(self) -> None:
        """Remove everything, the folder too."""
        self._tensors.clear()
        self._files.clear()
        self.in_memory = self.on_disk = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
