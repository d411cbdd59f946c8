"""The smallest network of every module of timm, with random weights, and images that it takes.

Nothing is downloaded.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from quality.small_models import NotMadeError

__all__ = ["made", "types"]

LARGEST = 12_000_000  # parameters
_TRIED = 8  # networks of a module that are compared
_SMALL = re.compile(
    r"atto|femto|pico|nano|tiny|xxs|xxt|_xs|_s\d|small|_t\d?_|_t\d?$|_b0|0_?5|lite|test|10|18"
)
_SIZES = (64, 96, 128, None)  # None: the network's own


def types() -> list[str]:
    """The modules of timm that have networks."""
    import timm

    return [name for name in timm.list_modules() if timm.list_models(module=name)]


def _smallest(module: str) -> str:
    """The network with the fewest parameters, among those with names of small ones."""
    import timm

    names = timm.list_models(module=module)
    likely = sorted(names, key=lambda name: (not _SMALL.search(name), len(name)))[:_TRIED]
    sizes = {}
    for name in likely:
        with torch.device("meta"):
            try:
                model = timm.create_model(name, num_classes=10)
            except Exception:  # some cannot be made without values
                continue
        sizes[name] = sum(p.numel() for p in model.parameters())
    if not sizes:
        return str(likely[0])
    name = min(sizes, key=lambda name: sizes[name])
    if sizes[name] > LARGEST:
        raise NotMadeError(f"made: {name} has {sizes[name]:,} parameters")
    return name


def _model(name: str, size: int | None) -> tuple[nn.Module, int]:
    import timm

    torch.manual_seed(0)
    if size is not None:
        try:
            return timm.create_model(name, num_classes=10, img_size=size).eval(), size
        except TypeError:  # it takes images of any size
            return timm.create_model(name, num_classes=10).eval(), size
    model = timm.create_model(name, num_classes=10).eval()
    return model, model.default_cfg["input_size"][-1]


def made(module: str) -> tuple[nn.Module, list[Any]]:
    """A small network of a module in eval mode, and two batches of images. Raises NotMadeError."""
    warnings.simplefilter("ignore")
    name, first = _smallest(module), ""
    for wanted in _SIZES:
        try:
            model, size = _model(name, wanted)
            drawn = torch.Generator().manual_seed(1)
            images: list[Tensor] = [torch.randn(2, 3, size, size, generator=drawn) for _ in "ab"]
            with torch.no_grad():
                model(images[0])
            return model, images
        except Exception as error:  # whatever it raises for images of this size
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NotMadeError(f"run: {name}: {first}")
