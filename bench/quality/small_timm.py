"""The smallest network of every family of timm, with random weights, and images that it takes.

A family is a module of timm and the word with which names in it begin ("regnet/regnety"). Networks
that are still large are made with fewer or narrower blocks; where even that is too large, in the
place of what the function of the network's name passes. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from quality.small_models import NotMadeError

__all__ = ["made", "types"]

# Parameters: to be made smaller, by all means, and not to be tried.
LARGE, LARGER, LARGEST = 1_500_000, 12_000_000, 22_000_000
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
# The same in the place of what functions and configurations say; the smallest network counts.
_INSTEAD: tuple[dict[str, Any], ...] = (
    *(changes for changes in _SMALLER if "dims" not in changes),
    {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)},  # whole heads of 32
    {"depth": 2},
    {"depth": 8, "w0": 16, "wa": 16.0, "wm": 2.0, "group_size": 8, "stem_width": 16},
    {"num_blocks": 2, "embed_dim": 96},
    {"stages": (1, 1, 1, 1), "embed_dim": 32},
    {"stages": (1, 1, 1, 1), "embed_dim": 32, "global_att_blocks": (2,)},
    {"depths": (1, 1, 1), "embed_dims": (32, 64, 128), "num_heads": (1, 2, 4)},
    {"depths": (1, 1, 1, 1), "embed_dim": (32, 48, 64, 96), "stem_width": 16},
    {"depths": (1, 1, 1, 1), "stem_chs": (16, 16, 16)},
    {"growth_rates": (16,) * 7, "num_blocks_list": (1,) * 7},
    {"channels": (8, 16, 16, 32, 64, 64)},
    {"width_list": (8, 16, 32, 64, 64), "depth_list": (1, 1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (1, 2, 2, 2)},
    {
        "stem_chs": (16, 16, 16),
        "stage_conv_chs": (16, 24, 32, 40),
        "stage_out_chs": (32, 48, 64, 96),
    },
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


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A network of timm, and the arguments that make it smaller."""

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    instead: bool = False  # of what the function of this name passes itself

    def built(self, **more: Any) -> nn.Module:
        """The network."""
        import timm

        passed = {} if self.instead else self.changes
        with _overriding(self.changes) if self.instead else contextlib.nullcontext():
            return timm.create_model(self.name, num_classes=10, **more, **passed)

    def size(self) -> int | None:
        """Its parameters; None if it cannot be made without values."""
        with torch.device("meta"):
            try:
                return sum(p.numel() for p in self.built().parameters())
            except Exception:  # whatever the class raises
                return None


@contextlib.contextmanager
def _overriding(changes: dict[str, Any]) -> Iterator[None]:
    """Networks are built with these arguments, whatever their functions pass; what a configuration
    has an entry for is replaced in it."""
    from timm.models import _builder

    def build(kind: Any, variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
        rest, config = dict(changes), arguments.get("model_cfg")
        if dataclasses.is_dataclass(config) or isinstance(config, dict):
            fields = config if isinstance(config, dict) else vars(config)
            inside = {key: rest.pop(key) for key in list(rest) if key in fields}
            if isinstance(config, dict):
                arguments["model_cfg"] = config | inside
            else:
                arguments["model_cfg"] = dataclasses.replace(config, **inside)
        return original(kind, variant, pretrained, **arguments | rest)

    original = _builder.build_model_with_cfg
    with contextlib.ExitStack() as scope:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and hasattr(module, original.__name__):
                scope.enter_context(mock.patch.object(module, original.__name__, build))
        yield


def _smallest(family: str) -> Chosen:
    """The network with the fewest parameters, among those with names of small ones."""
    module, _, word = family.partition("/")
    words = _families()[module]
    names = words[word] if word else next(iter(words.values()))
    likely = sorted(names, key=lambda name: (not _SMALL.search(name), len(name)))[:_TRIED]
    sizes = {name: size for name in likely if (size := Chosen(name).size()) is not None}
    if not sizes:
        return Chosen(likely[0])
    name = min(sizes, key=lambda name: sizes[name])
    chosen, size = Chosen(name), sizes[name]
    if size <= LARGE:
        return chosen
    for changes in _SMALLER:
        found = Chosen(name, changes).size()
        if found is not None and found < size:
            chosen, size = Chosen(name, changes), found
            break
    if size > LARGER:
        others = [Chosen(name, changes, instead=True) for changes in _INSTEAD]
        chosen = min([chosen, *others], key=lambda x: x.size() or math.inf)
        size = chosen.size() or size
    if size > LARGEST:
        raise NotMadeError(f"made: {name} has {size:,} parameters")
    return chosen


def _model(chosen: Chosen, size: int | None) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    if size is not None:
        try:
            return chosen.built(img_size=size).eval(), size
        except TypeError:  # it takes images of any size
            return chosen.built().eval(), size
    model = chosen.built().eval()
    return model, model.default_cfg["input_size"][-1]  # type: ignore[union-attr, operator, index]


def made(family: str) -> tuple[nn.Module, list[Any]]:
    """A small network of a family in eval mode, and two batches of images. Raises NotMadeError."""
    warnings.simplefilter("ignore")
    chosen, first = _smallest(family), ""
    for wanted in _SIZES:
        try:
            model, size = _model(chosen, wanted)
            drawn = torch.Generator().manual_seed(1)
            images: list[Tensor] = [torch.randn(2, 3, size, size, generator=drawn) for _ in "ab"]
            with torch.no_grad():
                model(images[0])
            return model, images
        except Exception as error:  # whatever it raises for images of this size
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NotMadeError(f"run: {chosen.name}: {first}")
