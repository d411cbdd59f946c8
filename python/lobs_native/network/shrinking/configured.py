"""What the class of a model makes of its configuration: which sizes it can have, and which not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.network.shrinking.surgery import new_counts, replace, take_out
from lobs_native.network.shrinking.units import Family

__all__ = ["Agreed", "agreed_attributes", "configurable", "fits_its_class"]

Agreed = frozenset[tuple[str, str]]  # names of modules and of their attributes


def configurable(model: nn.Module, families: Sequence[Family], notes: list[str]) -> list[Family]:
    """The families of which the model's class would have the sizes; all of a model without a
    configuration, which has no class to ask. Takes a note of each kind that is left out."""
    if getattr(model, "config", None) is None:
        return list(families)
    fitting: dict[int, Family] = {}
    for family in (f for f in families if f.kind == "blocks"):
        if (fit := _fitting_blocks(model, family, notes)) is not None:
            fitting[id(family)] = fit
    for some in _alike([f for f in families if f.kind != "blocks"]):
        fitting |= _fitting(model, some)
    for kind in dict.fromkeys(f.kind for f in families if id(f) not in fitting):
        notes.append(
            f"{kind} stay: a {type(model).__name__} made from its configuration cannot have "
            "another number of them alone (configured=False removes them nevertheless)"
        )
    return [fitting[id(f)] for f in families if id(f) in fitting]


def _alike(families: Sequence[Family]) -> list[list[Family]]:
    """The families of one kind and size, as far as fields of configurations connect them: parts of
    a model may have copies of its configuration, or configurations of their own."""
    groups: list[list[Family]] = []
    for family in families:
        own = [
            group
            for group in groups
            if (group[0].kind, group[0].units) == (family.kind, family.units)
            and any(f.fields == family.fields or f.fields & family.fields for f in group)
        ]
        groups = [group for group in groups if all(group is not x for x in own)]
        groups.append([*(f for group in own for f in group), family])
    return groups


def _fitting(model: nn.Module, alike: Sequence[Family]) -> dict[int, Family]:
    """Families of one kind and size, by the ``id`` of those given, with the fields of
    configurations that make the model's class give them another size and nothing else; without
    those that no choice of fields does."""
    for some in _choices(alike):
        misfits = _misfits(model, some)
        fit = {id(f): g for f, g in zip(alike, some, strict=True) if g.producers[0] not in misfits}
        others = [f for f in alike if id(f) not in fit]
        if fit and not (others and _misfits(model, list(fit.values()))):
            return fit | (_fitting(model, others) if others else {})
    return {}


def _fitting_blocks(model: nn.Module, family: Family, notes: list[str]) -> Family | None:
    """A list of blocks with the fields of configurations that make the model's class do without one
    of them. Without the first, all others get other numbers: where that fits, any may go; where it
    does not, those are fixed without which alone it does not fit."""
    agreed = agreed_attributes(model)
    removable = sorted(set(range(family.units)) - family.fixed)

    def fits(some: Family, gone: int) -> bool:
        units = torch.arange(family.units)
        with contextlib.ExitStack() as undo:
            take_out(model, some, units[units != gone], undo)
            for owner, name, value in new_counts([some], [family.units - 1]):
                replace(owner, name, value, undo)
            return fits_its_class(model, agreed)

    for count in sorted({len(family.lists), min(1, len(family.lists)), 0}, reverse=True):
        for (chosen,) in _choices([family]):
            some = dataclasses.replace(chosen, lists=family.lists[:count])
            if fits(some, removable[0]):
                return some
            if fits(some, removable[-1]):
                tied = [i for i in removable[:-1] if not fits(some, i)]
                notes.append(
                    f"{family.producers[0]}: blocks {', '.join(map(str, tied))} stay: a "
                    f"{type(model).__name__} made from its configuration would not be the same "
                    "without them (configured=False tries them nevertheless)"
                )
                return dataclasses.replace(some, fixed=family.fixed | set(tied))
    return None


def _choices(alike: Sequence[Family]) -> Iterator[list[Family]]:
    """These families with fewer of the fields that hold their number, some of which may be the size
    of something else by chance: all or each alone, in the inmost configuration or in all around."""
    names = sorted({name for f in alike for _, name in f.fields})
    for some in (names, *([name] for name in names if len(names) > 1)):
        for inmost in (True, False):
            yield [dataclasses.replace(f, counts=_chosen(f, some, inmost)) for f in alike]


def _chosen(family: Family, names: Sequence[str], inmost: bool) -> tuple[tuple[Any, str, int], ...]:
    """The counts of modules, and these of configurations."""
    configs = [owner for owner, _, _ in family.counts if not isinstance(owner, nn.Module)]
    return tuple(
        (owner, name, factor)
        for owner, name, factor in family.counts
        if isinstance(owner, nn.Module) or (name in names and (owner is configs[0] or not inmost))
    )


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


def _of_class(model: nn.Module, *, strict: bool = False) -> nn.Module | None:
    """A new model of the same class, without data, and of the configuration as it would be read
    from a file: some set fields by others then, and some refuse numbers that do not divide each
    other. With ``strict``, None in that case; otherwise as if it were not refused, for another
    number of units may be taken."""
    config: Any = model.config
    try:
        if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
            config = type(config).from_dict(config.to_dict())
    except Exception:
        if strict:
            return None
    try:
        with torch.device("meta"):
            return type(model)(config)
    except Exception:
        return None


def _sizes_of_class(model: nn.Module, *, strict: bool = False) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the parameters of :func:`_of_class`."""
    new = _of_class(model, strict=strict)
    return None if new is None else {name: tuple(p.shape) for name, p in new.named_parameters()}


def agreed_attributes(model: nn.Module) -> Agreed:
    """The attributes of modules that a new model of the same class has as well: their classes, and
    numbers, words and lists of these."""
    config = getattr(model, "config", None)
    new = None if config is None else _of_class(model)
    return frozenset() if new is None else _agreed(model, new)


def _agreed(model: nn.Module, new: nn.Module) -> Agreed:
    theirs = {path: _plain(module) for path, module in new.named_modules()}
    return frozenset(
        (path, name)
        for path, module in model.named_modules()
        if path in theirs
        for name, value in _plain(module).items()
        if name in theirs[path] and theirs[path][name] == value
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    """Its class, and its attributes that are numbers, words, or lists of these."""
    plain = (bool, int, float, str, type(None))
    held = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain)
        or (isinstance(value, (list, tuple)) and all(isinstance(x, plain) for x in value))
    }
    return {**held, "class": type(module).__name__, "training": None}


def fits_its_class(model: nn.Module, agreed: Agreed = frozenset()) -> bool:
    """Whether a new model of the same class, and of the configuration as it would be read from a
    file, has the same shapes; and of ``agreed`` attributes, as :func:`agreed_attributes` found
    them, those of the modules that the model still has."""
    if getattr(model, "config", None) is None:
        return False
    new = _of_class(model, strict=True)
    if new is None:
        return False
    sizes = {name: tuple(p.shape) for name, p in new.named_parameters()}
    if sizes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        return False
    if not agreed:
        return True
    there = {path for path, _ in model.named_modules()}
    return {place for place in agreed if place[0] in there} <= _agreed(model, new)
