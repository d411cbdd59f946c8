"""Tensors that stay in memory as long as they fit, and go to a temporary folder then."""

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
    """Tensors by a key: in memory as long as they fit into ``limit`` bytes, then on disk.

    Disk files are safetensors in a temporary folder that goes with the shelf. Tensors come back
    with their bits, on the device they came from.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.in_memory = self.on_disk = 0  # bytes
        self._kept: dict[Any, Tensor] = {}
        self._filed: dict[Any, tuple[Path, torch.device, int]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` (not copied) under ``key``, in place of what was there."""
        self.drop(key)
        size = value.numel() * value.element_size()
        if self.limit is None or self.in_memory + size <= self.limit:
            self._kept[key] = value
            self.in_memory += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lobs-native-")
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.safetensors"
        save_file({"x": value.detach().contiguous().cpu()}, path)
        self._filed[key] = (path, value.device, size)
        self.on_disk += size

    def __getitem__(self, key: Hashable) -> Tensor:
        """What is kept under ``key``; not to be written to."""
        if key in self._kept:
            return self._kept[key]
        path, device, _ = self._filed[key]
        with safe_open(path, "pt") as file:
            value: Tensor = file.get_tensor("x")
        return value.to(device)

    def __contains__(self, key: object) -> bool:
        return key in self._kept or key in self._filed

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        yield from self._filed

    def __len__(self) -> int:
        return len(self._kept) + len(self._filed)

    def drop(self, key: Hashable) -> None:
        """Forget ``key``, if it is there."""
        if key in self._kept:
            old = self._kept.pop(key)
            self.in_memory -= old.numel() * old.element_size()
        if key in self._filed:
            path, _, size = self._filed.pop(key)
            path.unlink()
            self.on_disk -= size

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self._kept.clear()
        self._filed.clear()
        self.in_memory = self.on_disk = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
