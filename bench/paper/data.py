"""Readers of IDX files of images, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lobs_native.errors import ArgumentError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts them
_PIECE = 500  # images through a network at once, by default


@dataclass(frozen=True)
class Images:
    """Inputs (N, ...) float32 and labels (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def part(self, begin: int, end: int | None = None) -> Images:
        """Rows from ``begin`` to before ``end``."""
        return Images(self.x[begin:end], self.y[begin:end])

    def batches(self, size: int = _PIECE) -> list[Tensor]:
        """The inputs alone, in order."""
        return list(self.x.split(size))


def idx_images(folder: Path, which: str) -> Images:
    """Read the images (N, 1, H, W) in [0, 1] and their labels.

    The files are ``<which>-images-idx3-ubyte`` and ``<which>-labels-idx1-ubyte``, plain or .gz;
    ``which`` is "train" or "t10k".

    Raises
    ------
    ArgumentError
        A file is missing or is not an IDX file; the message names it.
    """
    pixels = _idx(folder / f"{which}-images-idx3-ubyte")
    labels = _idx(folder / f"{which}-labels-idx1-ubyte")
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise ArgumentError(
            f"{folder}: images {pixels.shape} and labels {labels.shape} do not belong together"
        )
    x = torch.from_numpy(pixels[:, None] / np.float32(255))
    return Images(x, torch.from_numpy(labels.astype(np.int64)))


def has_idx(folder: Path, which: str) -> bool:
    """Whether the folder has these images."""
    name = folder / f"{which}-images-idx3-ubyte"
    return name.is_file() or name.with_name(name.name + ".gz").is_file()


def standardised(images: Images, mean: float, std: float) -> Images:
    """``(x - mean) / std``."""
    return Images((images.x - mean) / std, images.y)


def _idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes."""
    packed = path.with_name(path.name + ".gz")
    if packed.is_file():
        with gzip.open(packed) as file:
            content = file.read()
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise ArgumentError(f"there is no {path} or {packed.name}; name the folder that holds it")
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:head], ">u4").tolist()) if dimensions else ()
    if not dimensions or len(shape) != dimensions or len(content) - head != int(np.prod(shape)):
        raise ArgumentError(f"{path}: not an IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
