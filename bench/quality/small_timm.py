"""The smallest network of every family of timm, with random weights, and images that it takes.

A family is a module of timm and the word with which names in it begin ("regnet/regnety"). Networks
that are still large are made with fewer or narrower blocks. Nothing is downloaded.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from quality.small_models import NotMadeError

__all__ = ["made", "types"]

LARGE, LARGEST = 1_500_000, 12_000_000  # parameters: to be made smaller, and not to be tried
_TRIED = 6  # networks of a family that are compared
_SMALL = re.compile(
    r"atto|femto|pico|nano|tiny|xxs|xxt|_xs|_s\d|small|_t\d?_|_t\d?$|_b0|0_?5|lite|test|10|18"
)
_FAMILY = re.compile(r"(?:(?:dm|eca|ese|gc|legacy|nf|test|tf)_)*([a-z]+?(?:v\d)?)(?![a-z])")
_SIZES = (64, 96, 128, None)  # None: the network's own
# Arguments that make networks smaller; the first that a network takes are used.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 96, "num_heads": 3},
    {"depth": 2, "embed_dim": 96},
    {"depth": 2, "dim": 96},
    {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    {"depths": (1, 1, 1, 1), "embed_dim": 32},
    {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
    {"layers": (1, 1, 1, 1)},
    {"width_factor": 0.25},
    {"channel_multiplier": 0.25},
)


def types() -> list[str]:
    """The families of timm: "module/word", or the module where it has one alone."""
    found = []
    for module, families in _families().items():
        found += [f"{module}/{word}" for word in families] if len(families) > 1 else [module]
    return found


def _families() -> dict[str, dict[str, list[str]]]:
    """Names of networks, by module and family."""
    import timm

    found: dict[str, dict[str, list[str]]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            family = _FAMILY.match(name)
            word = family.group(1) if family else name
            found.setdefault(module, {}).setdefault(word, []).append(name)
    return found


def _smallest(family: str) -> tuple[str, dict[str, Any]]:
    """The network with the fewest parameters, among those with names of small ones; and the
    arguments that make it smaller."""
    module, _, word = family.partition("/")
    words = _families()[module]
    names = words[word] if word else next(iter(words.values()))
    likely = sorted(names, key=lambda name: (not _SMALL.search(name), len(name)))[:_TRIED]
    sizes = {name: size for name in likely if (size := _size(name)) is not None}
    if not sizes:
        return likely[0], {}
    name = min(sizes, key=lambda name: sizes[name])
    if sizes[name] <= LARGE:
        return name, {}
    size, changes = sizes[name], {}
    for smaller in _SMALLER:
        found = _size(name, **smaller)
        if found is not None and found < size:
            size, changes = found, smaller
            break
    if size > LARGEST:
        raise NotMadeError(f"made: {name} has {size:,} parameters")
    return name, changes


def _size(name: str, **changes: Any) -> int | None:
    """The parameters of a network; None if it cannot be made without values."""
    import timm

    with torch.device("meta"):
        try:
            model = timm.create_model(name, num_classes=10, **changes)
        except Exception:  # whatever the class raises
            return None
    return sum(p.numel() for p in model.parameters())


def _model(name: str, size: int | None, **changes: Any) -> tuple[nn.Module, int]:
    import timm

    torch.manual_seed(0)
    if size is not None:
        try:
            model = timm.create_model(name, num_classes=10, img_size=size, **changes)
            return model.eval(), size
        except TypeError:  # it takes images of any size
            return timm.create_model(name, num_classes=10, **changes).eval(), size
    model = timm.create_model(name, num_classes=10, **changes).eval()
    return model, model.default_cfg["input_size"][-1]


def made(family: str) -> tuple[nn.Module, list[Any]]:
    """A small network of a family in eval mode, and two batches of images. Raises NotMadeError."""
    warnings.simplefilter("ignore")
    (name, changes), first = _smallest(family), ""
    for wanted in _SIZES:
        try:
            model, size = _model(name, wanted, **changes)
            drawn = torch.Generator().manual_seed(1)
            images: list[Tensor] = [torch.randn(2, 3, size, size, generator=drawn) for _ in "ab"]
            with torch.no_grad():
                model(images[0])
            return model, images
        except Exception as error:  # whatever it raises for images of this size
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NotMadeError(f"run: {name}: {first}")
