"""Families: parts of a network that can be removed unit by unit, whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lobs_native.layers import Layer

__all__ = ["BY_DEFAULT", "KINDS", "Family", "Slot", "columns_of", "inputs_axis", "linear_shape"]

BY_DEFAULT = ("heads", "neurons", "channels", "experts")
KINDS = (*BY_DEFAULT, "blocks")


@dataclass(frozen=True)
class Slot:
    """The places of units along one axis of a parameter or buffer."""

    name: str
    axis: int
    units: Tensor  # int64: the unit of each index; -1 for what stays
    read: bool = False  # whether it is the inputs of a reader

    def tensor(self, model: nn.Module) -> Tensor:
        """The parameter or buffer of a model."""
        path, _, part = self.name.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(path), part)
        return tensor

    def kept(self, units: Tensor) -> Tensor:
        """The indices that stay with these units, rising."""
        return ((self.units < 0) | torch.isin(self.units, units)).nonzero()[:, 0]


@dataclass(frozen=True)
class Family:
    """``units`` of one kind; ``counts`` are attributes of modules and fields of configurations that
    hold their number times a factor."""

    kind: str
    units: int
    # The layers that read them, and are repaired; of experts and blocks none.
    readers: tuple[str, ...]
    # The layers that have them as outputs; the module with the experts, the list of the blocks.
    producers: tuple[str, ...]
    slots: tuple[Slot, ...] = field(repr=False)  # of all tensors that have them
    # (object, name, factor)
    counts: tuple[tuple[Any, str, int], ...] = field(default=(), repr=False)
    lists: tuple[tuple[Any, str], ...] = field(default=(), repr=False)  # with an entry for each
    fixed: frozenset[int] = field(default=frozenset(), repr=False)  # blocks that stay

    @property
    def label(self) -> str:
        """As messages name it."""
        if not self.readers:
            return f"{self.units} {self.kind} in {self.producers[0]}"
        more = f" and {len(self.readers) - 1} more" if len(self.readers) > 1 else ""
        return f"{self.units} {self.kind} before {self.readers[0]}{more}"

    @property
    def fields(self) -> frozenset[tuple[int, str]]:
        """The fields of configurations about them: (``id`` of it, name)."""
        owners = [(x, name) for x, name, _ in self.counts if not isinstance(x, nn.Module)]
        return frozenset((id(x), name) for x, name in (*owners, *self.lists))

    @property
    def tensors(self) -> set[str]:
        """The names of all that has them."""
        return {slot.name for slot in self.slots}

    @property
    def single(self) -> bool:
        """Whether it has one reader, whose columns of a unit lie together."""
        return self.kind in ("heads", "neurons")

    def renamed(self, renaming: Callable[[str], str | None]) -> Family | None:
        """With the names that ``renaming`` returns for those of modules and tensors, and without
        those for which it returns None; None if all its readers, or producers, go."""
        readers = tuple(x for name in self.readers if (x := renaming(name)) is not None)
        producers = tuple(x for name in self.producers if (x := renaming(name)) is not None)
        slots = [(slot, renaming(slot.name)) for slot in self.slots]
        left = tuple(replace(slot, name=name) for slot, name in slots if name is not None)
        if not producers or (self.readers and not readers):
            return None
        return replace(self, readers=readers, producers=producers, slots=left)

    def read_at(self, layer: str) -> Slot:
        """The places of the units among the inputs of a reader."""
        return next(s for s in self.slots if s.read and s.name == f"{layer}.weight")


def columns_of(layer: Layer, slot: Slot) -> Tensor:
    """The unit of each column (C,) of a layer's weight (G, R, C), by its units among the inputs as
    stored; -1 for what stays."""
    stored = layer.stored(layer.weight_part)
    view = [1] * stored.ndim
    view[slot.axis] = -1
    return layer.pack(slot.units.view(view).expand(stored.shape))[0, 0]


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, or of transformers' Conv1D; else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if module is not None and type(module).__name__ == "Conv1D":
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return weight.shape[1], weight.shape[0]
    return None


def inputs_axis(module: nn.Module) -> int:
    """The dimension of its inputs in the weight of a convolution, or of a module that has a
    :func:`linear_shape`. Transposed convolutions and transformers' Conv1D are stored the other way
    round."""
    if isinstance(module, _ConvNd):
        return 0 if module.transposed else 1
    return 1 if isinstance(module, nn.Linear) else 0
