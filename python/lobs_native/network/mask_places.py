"""Where masks belong in a model or an optimizer, under the names that layers, weight files and
other releases of transformers give them.

A mixture of experts has one weight for all experts in transformers 5 ("mlp.experts.gate_up_proj",
(E, 2 I, H), the gates' rows before the others), and a weight for each in weight files and in
earlier releases ("block_sparse_moe.experts.0.w1").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers import layers_of

__all__ = ["Piece", "Place", "pieces_of", "places_of", "whole_shape"]


@dataclass(frozen=True)
class Place:
    """Where a mask belongs: a parameter of a module, and the part of it that the layer owns."""

    module: nn.Module | None  # None: known to an optimizer only
    part: str
    parameter: nn.Parameter
    weight: Tensor  # a view of the parameter, detached


@dataclass(frozen=True)
class Piece:
    """The part of a mask that belongs to one place: all of it, or rows of one expert."""

    place: Place
    expert: int | None = None
    rows: slice | None = None

    def of(self, mask: Tensor) -> Tensor:
        """This part of the mask."""
        return mask if self.rows is None else mask[self.expert, self.rows]


def places_of(owner: Any) -> Iterator[tuple[str, Place]]:
    """Layer name -> its weight; of several with one name, the last counts.

    Raises
    ------
    ArgumentError
        An optimizer does not know the names of its parameters.
    DtypeError
        ``owner`` is neither a model nor an optimizer.
    """
    if isinstance(owner, nn.Module):
        for name, module in owner.named_modules(remove_duplicate=False):
            for part, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.ndim < 2:
                    continue
                full = f"{name}.{part}" if name else part
                place = Place(module, part, parameter, parameter.detach())
                yield name if part == "weight" else full, place
        for layer in layers_of(owner):  # these may own part of a parameter, or one of another name
            weight = layer.module._parameters.get(layer.weight_part)
            if weight is not None:
                stored = layer.stored(layer.weight_part)
                yield layer.name, Place(layer.module, layer.weight_part, weight, stored)
    elif isinstance(owner, Optimizer):
        for group in owner.param_groups:
            if "param_names" not in group:
                raise ArgumentError(
                    "model_or_optimizer: this optimizer does not know the names of its parameters; "
                    "make it with model.named_parameters(), or pass the model"
                )
            for full, parameter in zip(group["param_names"], group["params"], strict=True):
                name, _, part = full.rpartition(".")
                if parameter.ndim >= 2:
                    name = name if part == "weight" else full
                    yield name, Place(None, part, parameter, parameter.detach())
    else:
        raise DtypeError(
            "model_or_optimizer: expected an nn.Module or a torch.optim.Optimizer, got "
            f"{type(owner).__name__}"
        )


# What the weights of one expert are called: gate, up, down.
_TRIOS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
# What transformers 5 calls the block around the experts, and what weight files do.
_BLOCKS = ("mlp", "block_sparse_moe")
_ONE = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_ALL = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")


def pieces_of(name: str, places: Mapping[str, Place]) -> Sequence[Piece]:
    """The places of the mask of this name, whichever way it is spelled; none if it is unknown."""
    short = "" if name == "weight" else name.removesuffix(".weight")  # as weight files have it
    if (place := places.get(name) or places.get(short)) is not None:
        return (Piece(place),)
    for spelling in (short, *_other_blocks(short)):
        if (place := places.get(spelling) or _expert(spelling, places)) is not None:
            return (Piece(place),)
        if pieces := _experts(spelling, places):
            return pieces
    return ()


def whole_shape(pieces: Sequence[Piece]) -> torch.Size:
    """The shape of a mask that these are the pieces of."""
    first = pieces[0].place.weight.shape
    if pieces[0].expert is None:
        return first
    of_expert = [p.place.weight.shape for p in pieces if p.expert == 0]
    count = 1 + max(p.expert for p in pieces if p.expert is not None)
    return torch.Size((count, sum(shape[0] for shape in of_expert), *first[1:]))


def _other_blocks(name: str) -> list[str]:
    a, b = _BLOCKS
    swapped = {a: b, b: a}
    parts = name.split(".")
    return [
        ".".join((*parts[:i], swapped[part], *parts[i + 1 :]))
        for i, part in enumerate(parts)
        if part in swapped
    ]


def _expert(name: str, places: Mapping[str, Place]) -> Place | None:
    """The place of one expert's weight in a parameter of all."""
    if (match := _ONE.fullmatch(name)) is None:
        return None
    experts, number, part = match[1], int(match[2]), match[3]
    role = next((trio.index(part) for trio in _TRIOS if part in trio), None)
    if role is None:
        return None
    place, rows = places.get(f"{experts}.{_TRIOS[0][role]}"), slice(None)
    if place is None and role < 2 and (place := places.get(f"{experts}.gate_up_proj")) is not None:
        if getattr(place.module, "is_transposed", False):
            return None  # gates and others alternate there
        half = place.weight.shape[1] // 2
        rows = slice(half) if role == 0 else slice(half, None)
    if place is None or place.weight.ndim != 3 or number >= len(place.weight):
        return None
    return Place(place.module, place.part, place.parameter, place.weight[number, rows])


def _experts(name: str, places: Mapping[str, Place]) -> Sequence[Piece]:
    """The places of a weight of all experts in parameters of one each."""
    if (match := _ALL.fullmatch(name)) is None:
        return ()
    experts, part = match[1], match[2]
    for gate, up, down in _TRIOS:
        parts = {"gate_up_proj": (gate, up), "gate_proj": (gate,), "up_proj": (up,)}.get(
            part, (down,)
        )
        pieces: list[Piece] = []
        for number in range(len(places)):
            found = [places.get(f"{experts}.{number}.{p}") for p in parts]
            of_expert = [place for place in found if place is not None]
            if len(of_expert) < len(found):
                break
            begin = 0
            for place in of_expert:
                end = begin + place.weight.shape[0]
                pieces.append(Piece(place, number, slice(begin, end)))
                begin = end
        if len({(str(p.rows), p.place.weight.shape[1:]) for p in pieces}) == len(parts):
            return pieces
    return ()
