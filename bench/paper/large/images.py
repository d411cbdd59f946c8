"""Images for the large networks: from a folder of the user's, or generated."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lobs_native.errors import ArgumentError, LobsError

__all__ = ["FolderImages", "GeneratedImages", "ImageBatches"]

SIZE = 224
_SHORT_SIDE = 256
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the published weights' training
_KINDS = {".jpg", ".jpeg", ".png"}


class ImageBatches(Protocol):
    """Batches (B, 3, 224, 224) float32 for any number of passes, and labels if known."""

    description: str  # where they come from, for the page
    labels: Tensor | None  # (N,) int64, in the order of the batches

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class FolderImages:
    """``count`` images of a folder, drawn at random and read again in every pass.

    The shorter side is scaled to 256 pixels, the middle 224 x 224 is kept and normalised as for the
    published weights. ``folder`` holds images, whose labels are then unknown, or one folder of
    images for each class. In the order of their names the classes are 0, 1, ..., as they are for
    the published weights if all 1,000 of ImageNet's (n01440764, ...) are there.

    Raises
    ------
    ArgumentError
        The folder is missing or has fewer images than asked for.
    LobsError
        Pillow, which decodes images, is missing.
    """

    def __init__(self, folder: Path, count: int, *, batch: int, seed: int = 0) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise LobsError("reading images needs Pillow: pip install pillow") from error
        files = _listed(folder)
        if len(files) < count:
            raise ArgumentError(
                f"{folder}: {len(files)} images (.jpg, .jpeg or .png), but {count} were asked for"
            )
        drawn = random.Random(seed).sample(files, count)
        self.files = [file for file, _ in drawn]
        numbers = [label for _, label in drawn if label is not None]
        self.labels = torch.tensor(numbers) if len(numbers) == count else None
        self.batch = batch
        self.description = f"{count:,} images of a folder of {len(files):,}"

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.files), self.batch):
            yield torch.stack([_read(file) for file in self.files[first : first + self.batch]])


class GeneratedImages:
    """``count`` images of noise with a natural spectrum, the same in every pass.

    The amplitude falls as one over frequency, colours are correlated; mean 0, variance 1.
    """

    labels: Tensor | None = None

    def __init__(self, count: int, *, batch: int, seed: int = 0, size: int = SIZE) -> None:
        self.count, self.batch, self.seed, self.size = count, batch, seed, size
        self.description = f"{count:,} generated images (noise with a 1/f spectrum)"

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        vertical = torch.fft.fftfreq(self.size)[:, None]
        horizontal = torch.fft.rfftfreq(self.size)[None]
        frequency = torch.sqrt(vertical**2 + horizontal**2).clamp_min(1 / self.size)
        for first in range(0, self.count, self.batch):
            generator = torch.Generator().manual_seed(self.seed + first)
            shape = (min(self.batch, self.count - first), 3, self.size, self.size)
            noise = torch.randn(shape, generator=generator)
            common = noise.mean(1, keepdim=True) * 3**0.5
            noise = 0.9**0.5 * common + 0.1**0.5 * noise
            images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=shape[2:])
            images -= images.mean((1, 2, 3), keepdim=True)
            yield images / images.std((1, 2, 3), keepdim=True)


def _listed(folder: Path) -> list[tuple[Path, int | None]]:
    """Images and, if there is one folder for each class, the number of the class."""
    if not folder.is_dir():
        raise ArgumentError(f"images: {folder} is not a folder")

    def images(where: Path) -> Sequence[Path]:
        return sorted(file for file in where.iterdir() if file.suffix.lower() in _KINDS)

    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        return [(file, None) for file in images(folder)]
    return [(file, k) for k, entry in enumerate(classes) for file in images(entry)]


def _read(path: Path) -> Tensor:
    """(3, 224, 224) float32."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = _SHORT_SIDE / min(image.size)
    width, height = (max(_SHORT_SIDE, round(n * scale)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    image = image.crop((left, top, left + SIZE, top + SIZE))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
