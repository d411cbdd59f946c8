"""What the class of a model makes of its configuration: which sizes it can have, and which not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.network.families import Family, linear_shape
from lobs_native.network.surgery import replace

__all__ = ["configurable", "fits_its_class", "new_counts"]


def new_counts(
    families: Sequence[Family], counts: Mapping[str, int]
) -> Iterable[tuple[Any, str, int]]:
    """Fields of modules and configurations, each once, with their new values."""
    done: set[tuple[int, str]] = set()
    for f in families:
        for owner, name, factor in f.counts:
            if (id(owner), name) not in done:
                done.add((id(owner), name))
                yield owner, name, factor * counts[f.consumer]


def configurable(model: nn.Module, families: Sequence[Family], notes: list[str]) -> list[Family]:
    """The families of which the model's class would have the sizes; all of a model without a
    configuration, which has no class to ask. Takes a note of each kind that is left out."""
    if getattr(model, "config", None) is None:
        return list(families)
    alike: dict[tuple[str, int], list[Family]] = {}
    for family in families:
        alike.setdefault((family.kind, family.units), []).append(family)
    left_out: set[str] = set()
    for some in alike.values():
        left_out |= _misfits(model, some)
    for kind in dict.fromkeys(f.kind for f in families if f.consumer in left_out):
        notes.append(
            f"{kind} stay: a {type(model).__name__} made from its configuration cannot have "
            "another number of them alone (configured=False removes them nevertheless)"
        )
    return [f for f in families if f.consumer not in left_out]


def _misfits(model: nn.Module, alike: Sequence[Family]) -> set[str]:
    """The consumers of families of one kind and size that the model's class, with one unit fewer in
    each of them, would not make as small as that takes."""
    with contextlib.ExitStack() as undo:
        for owner, name, value in new_counts(alike, {f.consumer: f.units - 1 for f in alike}):
            replace(owner, name, value, undo)
        sizes = _sizes_of_class(model)
    if sizes is None:
        return {f.consumer for f in alike}
    misfits = set()
    for f in alike:
        for p in f.producers:
            shape = linear_shape(model.get_submodule(p.name))
            assert shape is not None
            if shape[0] - p.rows * p.parts not in sizes.get(f"{p.name}.weight", ()):
                misfits.add(f.consumer)
    return misfits


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
