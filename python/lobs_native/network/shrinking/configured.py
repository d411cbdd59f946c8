"""What the class of a model makes of its configuration: which sizes it can have, and which not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lobs_native.network.shrinking.surgery import new_counts, replace
from lobs_native.network.shrinking.units import Family

__all__ = ["configurable", "fits_its_class"]


def configurable(model: nn.Module, families: Sequence[Family], notes: list[str]) -> list[Family]:
    """The families of which the model's class would have the sizes; all of a model without a
    configuration, which has no class to ask. Takes a note of each kind that is left out."""
    if getattr(model, "config", None) is None:
        return list(families)
    alike: dict[tuple[str, int, frozenset[tuple[int, str]]], list[Family]] = {}
    for family in families:
        alike.setdefault((family.kind, family.units, family.fields), []).append(family)
    left_out: set[str] = set()
    for some in alike.values():
        left_out |= _misfits(model, some)
    for kind in dict.fromkeys(f.kind for f in families if not left_out.isdisjoint(f.producers)):
        notes.append(
            f"{kind} stay: a {type(model).__name__} made from its configuration cannot have "
            "another number of them alone (configured=False removes them nevertheless)"
        )
    return [f for f in families if left_out.isdisjoint(f.producers)]


def _misfits(model: nn.Module, alike: Sequence[Family]) -> set[str]:
    """The producers of families of one kind and size that the model's class, with one unit fewer in
    each, would not make as small as that takes; of all, if it made anything else smaller."""
    before = _sizes_of_class(model)
    with contextlib.ExitStack() as undo:
        for owner, name, value in new_counts(alike, [f.units - 1 for f in alike]):
            replace(owner, name, value, undo)
        sizes = _sizes_of_class(model)
    concerned = {slot.name for f in alike for slot in f.slots}
    if before is None or sizes is None or _apart(before, sizes) - concerned:
        return {name for f in alike for name in f.producers}
    misfits, now = set[str](), dict(model.named_parameters())
    for f in alike:
        for slot in f.slots:
            fewer = int((slot.units != 0).sum())
            if slot.name in now and fewer not in sizes.get(slot.name, ()):
                misfits.update(f.producers)
    return misfits


def _apart(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The names of parameters that have other shapes in both, or are in one alone."""
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def _sizes_of_class(model: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the parameters of a new model of the same class and configuration."""
    try:
        with torch.device("meta"):
            new = type(model)(model.config)
    except Exception:
        return None
    return {name: tuple(p.shape) for name, p in new.named_parameters()}


def fits_its_class(model: nn.Module) -> bool:
    """Whether a new model of the same class and configuration has the same shapes."""
    if getattr(model, "config", None) is None:
        return False
    sizes = _sizes_of_class(model)
    return sizes == {name: tuple(p.shape) for name, p in model.named_parameters()}
