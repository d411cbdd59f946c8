"""Taking units out of the tensors of a family: smaller ones in the place of the old ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lobs_native.calibration.session import Session
from lobs_native.network.shrinking.alike import alike, output_of
from lobs_native.network.shrinking.units import Family, Slot, inputs_axis, linear_shape

__all__ = ["new_counts", "put", "renaming", "replace", "stand_alone", "take_out"]


def replace(owner: object, name: str, value: object, undo: contextlib.ExitStack) -> None:
    """``setattr``, which closing ``undo`` takes back."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def new_counts(families: Sequence[Family], counts: Sequence[int]) -> Iterable[tuple[Any, str, int]]:
    """Fields of modules and configurations, each once, with their new values."""
    done: set[tuple[int, str]] = set()
    for f, count in zip(families, counts, strict=True):
        for owner, name, factor in f.counts:
            if (id(owner), name) not in done:
                done.add((id(owner), name))
                yield owner, name, factor * count


def take_out(model: nn.Module, family: Family, kept: Tensor, undo: contextlib.ExitStack) -> None:
    """Leave only the units ``kept`` (sorted int64 indices) in the tensors of a family.

    Parameters and buffers are replaced by new ones; nothing is written into the old ones. Of
    blocks, leave only these in their list, numbered anew.
    """
    if family.kind == "blocks":
        _leave_blocks(model.get_submodule(family.producers[0]), kept.tolist(), undo)
        for owner, name in family.lists:
            replace(owner, name, [getattr(owner, name)[i] for i in kept.tolist()], undo)
        return
    for slot in family.slots:
        _slice(model, slot, slot.kept(kept), undo)


def renaming(model: nn.Module, family: Family, kept: Tensor) -> Callable[[str], str | None]:
    """What becomes of the names in a model when :func:`take_out` leaves only these blocks: the new
    name, or None for what goes."""
    whole = family.producers[0]
    prefix = f"{whole}." if whole else ""
    names = list(model.get_submodule(whole)._modules)
    new = dict(
        zip([names[i] for i in kept.tolist()], _new_names(names, kept.tolist()), strict=True)
    )

    def renamed(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        block, dot, rest = name[len(prefix) :].partition(".")
        if block not in names:
            return name
        return f"{prefix}{new[block]}{dot}{rest}" if block in new else None

    return renamed


def _new_names(names: Sequence[str], kept: Sequence[int]) -> list[str]:
    """Those of the entries of a list that stay: numbers where they were numbered."""
    numbered = list(names) == [str(i) for i in range(len(names))]
    return [str(k) if numbered else names[i] for k, i in enumerate(kept)]


def _leave_blocks(blocks: nn.Module, kept: Sequence[int], undo: contextlib.ExitStack) -> None:
    """Leave only these entries of a list of modules. Attributes that are a block's number follow:
    those that are it in all blocks that have them, of which there are two at least."""
    every = [dict(child.named_modules()) for child in blocks.children()]
    places = dict.fromkeys(
        (path, name)
        for inside in every
        for path, module in inside.items()
        for name, value in vars(module).items()
        if type(value) is int
    )
    for path, name in places:
        held = {
            i: vars(inside[path])[name]
            for i, inside in enumerate(every)
            if path in inside and name in vars(inside[path])
        }
        if len(held) > 1 and all(i == number for i, number in held.items()):
            for k, i in enumerate(kept):
                if i in held:
                    replace(every[i][path], name, k, undo)
    names = list(blocks._modules)
    left = [blocks._modules[names[i]] for i in kept]
    replace(blocks, "_modules", dict(zip(_new_names(names, kept), left, strict=True)), undo)


def stand_alone(session: Session, batch: Any, families: Sequence[Family]) -> bool:
    """Whether the model, with one unit taken out of each family, returns what it does with that
    unit set to zero in all that reads it; inside :meth:`Session.evaluating`. Nothing is changed."""
    model, gone = session.model, []
    for family in families:
        made = [set(slot.units.tolist()) - {-1} for slot in family.slots if not slot.read]
        spare = [u for u in range(family.units) if all(some != {u} for some in made)]
        if len(spare) < min(2, family.units):
            return False
        gone.append(spare[0])
    with contextlib.ExitStack() as undo:
        for family, unit in zip(families, gone, strict=True):
            for slot in (s for s in family.slots if s.read):
                at = (slot.units == unit).nonzero()[:, 0]
                old = slot.tensor(model)
                put(model, old, old.detach().index_fill(slot.axis, at.to(old.device), 0), undo)
        wanted = output_of(session, batch)
        for family, unit in zip(families, gone, strict=True):
            units = torch.arange(family.units)
            take_out(model, family, units[units != unit], undo)
            for owner, name, value in new_counts([family], [family.units - 1]):
                replace(owner, name, value, undo)
        try:
            return alike(wanted, output_of(session, batch))
        except Exception:  # sizes that do not fit any more
            return False


def _slice(model: nn.Module, slot: Slot, which: Tensor, undo: contextlib.ExitStack) -> None:
    """Keep some indices along an axis."""
    old = slot.tensor(model)
    put(model, old, old.detach().index_select(slot.axis, which.to(old.device)).contiguous(), undo)


def put(model: nn.Module, old: Tensor, new: Tensor, undo: contextlib.ExitStack) -> None:
    """Put a tensor in the place of a parameter or buffer, in all modules that have it."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for name, held in [*module._parameters.items(), *module._buffers.items()]:
            if held is old:
                replace(module, name, new, undo)
                _count_again(module, undo)


def _count_again(module: nn.Module, undo: contextlib.ExitStack) -> None:
    """Let a module know its new sizes, by its weight."""
    weight = getattr(module, "weight", None)
    counts: dict[str, int] = {}
    if isinstance(module, _ConvNd) and weight is not None:
        inside = inputs_axis(module)
        counts = {"out_channels": weight.shape[1 - inside], "in_channels": weight.shape[inside]}
        if module.groups > 1:  # a filter for each channel: other groups are left whole
            counts = dict.fromkeys(("groups", "in_channels", "out_channels"), weight.shape[0])
    elif isinstance(module, _BatchNorm):
        known = next(x for x in (weight, module.running_mean) if x is not None)
        counts = {"num_features": len(known)}
    elif linear_shape(module) is not None and weight is not None:
        names = ("out_features", "in_features") if inputs_axis(module) == 1 else ("nx", "nf")
        counts = dict(zip(names, weight.shape, strict=True))
    for name, count in counts.items():
        if hasattr(module, name) and getattr(module, name) != count:
            replace(module, name, count, undo)
