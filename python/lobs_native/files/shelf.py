"""Tensors in memory up to a limit, and in a temporary folder beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Shelf"]


class Shelf(Mapping[Any, Tensor]):
    """Tensors by key: in memory as long as they fit into ``limit`` bytes, then on disk.

    The files are safetensors in a temporary folder, which is removed with the shelf. Tensors are
    returned bit for bit, on the device that they came from.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.in_memory = self.on_disk = 0  # bytes
        self._tensors: dict[Any, Tensor] = {}
        self._files: dict[Any, tuple[Path, torch.device, int]] = {}  # path, device, bytes
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
        if self.limit is None or self.in_memory + size <= self.limit:
            self._tensors[key] = value
            self.in_memory += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lobs-native-")
        self._file_count += 1
        path = Path(self._folder.name) / f"{self._file_count}.safetensors"
        save_file({"x": value.detach().contiguous().cpu()}, path)
        self._files[key] = (path, value.device, size)
        self.on_disk += size

    def __getitem__(self, key: Hashable) -> Tensor:
        """The tensor under ``key``. Do not write to it."""
        if key in self._tensors:
            return self._tensors[key]
        path, device, _ = self._files[key]
        with safe_open(path, "pt") as file:
            value: Tensor = file.get_tensor("x")
        return value.to(device)

    def parts(self, key: Hashable, rows: int) -> Iterator[Tensor]:
        """The tensor under ``key``, so many rows of its first dimension at a time. One on disk is
        never in memory as a whole."""
        if key in self._tensors:
            yield from self._tensors[key].split(rows)
            return
        path, device, _ = self._files[key]
        with safe_open(path, "pt") as file:
            whole = file.get_slice("x")
            for first in range(0, whole.get_shape()[0], rows):
                yield whole[first : first + rows].to(device)

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
            path, _, size = self._files.pop(key)
            path.unlink()
            self.on_disk -= size

    def close(self) -> None:
        """Remove everything, the folder too."""
        self._tensors.clear()
        self._files.clear()
        self.in_memory = self.on_disk = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
