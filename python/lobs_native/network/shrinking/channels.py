"""The channels of a network, found by running it: outputs of convolutions and linear layers that
other such layers read, with everything between them that has an entry for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.calibration.session import Session
from lobs_native.calibration.ties import Ties
from lobs_native.layers import Layer, Linear, layers_of
from lobs_native.layers.conv import Conv
from lobs_native.network.shrinking.units import Family, Slot, columns_of

__all__ = ["channel_families"]

_Axis = tuple[str, int]  # the name of a parameter or buffer, and one of its axes


def channel_families(
    model: nn.Module, session: Session, batch: Any, notes: list[str]
) -> list[Family]:
    """The families of channels, in the order of the layers that make them; inside
    :meth:`Session.evaluating`. Takes a note of each layer whose outputs stay, with the reason.

    Channels that something ties, a residual connection or a concatenation, are of one family.
    """
    with torch.no_grad(), Ties(model) as ties:
        ties.returned(session.call(model, batch))
    axes = ties.axes()
    layers = {f"{x.name}.weight": x for x in layers_of(model) if isinstance(x, (Conv, Linear))}
    shared = _shared(model)
    stay = {
        c: why for variables in axes.values() for c in variables if (why := ties.classes.why(c))
    }
    for axis in sorted(ties.contracted):  # sets of names have another order in every process
        if axis[0] not in layers or layers[axis[0]].groups > 1 or axis[0] in shared:
            why = f"{axis[0].removesuffix('.weight')} reads them, whose weight is shared or unknown"
            stay.update((c, why) for c in axes[axis] if c not in stay)
    made, read = (
        {c for axis in some for c in axes[axis]} for some in (ties.produced, ties.contracted)
    )
    units = {c for c in made & read if c not in stay}
    families = []
    for members in _connected(axes, units):
        family = _family(members, axes, ties, layers)
        if family is None:
            stay.update(
                (c, "their readers have unlike numbers of columns for them") for c in members
            )
        else:
            families.append(family)
    order = {name: place for place, name in enumerate(layers)}
    for name, axis in sorted(ties.produced, key=lambda axis: (order.get(axis[0], -1), axis)):
        if reasons := dict.fromkeys(stay[c] for c in axes[name, axis] if c in stay):
            notes.append(f"{name.removesuffix('.weight')}: its outputs stay: {'; '.join(reasons)}")
    return families


def _shared(model: nn.Module) -> set[str]:
    """The names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name for some in names.values() if len(some) > 1 for name in some}


def _connected(axes: Mapping[_Axis, Sequence[int]], units: set[int]) -> Iterator[list[int]]:
    """The units in parts that no axis has in common, in the order in which they are met."""
    part: dict[int, list[int]] = {
        u: [u] for variables in axes.values() for u in variables if u in units
    }
    for variables in axes.values():
        some = [u for u in dict.fromkeys(variables) if u in units]
        for u in some[1:]:
            mine, other = part[some[0]], part[u]
            if mine is not other:
                mine += other
                part.update(dict.fromkeys(other, mine))
    seen = set[int]()
    for members in part.values():
        if id(members) not in seen:
            seen.add(id(members))
            yield members


def _family(
    members: Sequence[int],
    axes: Mapping[_Axis, Sequence[int]],
    ties: Ties,
    layers: Mapping[str, Layer],
) -> Family | None:
    """The family of these units; None if a reader has more columns for some than for others."""
    number = {u: i for i, u in enumerate(members)}
    slots = []
    for axis, variables in axes.items():
        units = torch.tensor([number.get(c, -1) for c in variables], dtype=torch.int64)
        if bool((units >= 0).any()):
            slots.append(Slot(*axis, units, read=axis in ties.contracted))
    for slot in slots:
        if slot.read:
            columns = columns_of(layers[slot.name], slot)
            count = torch.bincount(columns[columns >= 0])
            if int(count.max()) != int(count[count > 0].min()):
                return None
    return Family(
        kind="channels",
        units=len(members),
        readers=tuple(_layers(s for s in slots if s.read)),
        producers=tuple(_layers(s for s in slots if (s.name, s.axis) in ties.produced)),
        slots=tuple(slots),
    )


def _layers(slots: Iterable[Slot]) -> Iterator[str]:
    return (slot.name.removesuffix(".weight") for slot in slots)
