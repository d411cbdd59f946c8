"""Taking units out of the layers of a family: smaller tensors in the place of the old ones."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lobs_native.network.families import Family, Producer, inputs_axis

__all__ = ["replace", "take_out"]


def replace(owner: object, name: str, value: object, undo: contextlib.ExitStack) -> None:
    """``setattr``, which closing ``undo`` takes back."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def take_out(model: nn.Module, family: Family, kept: Tensor, undo: contextlib.ExitStack) -> None:
    """Leave only the units ``kept`` (sorted int64 indices) in the layers of a family.

    Parameters are replaced by new ones; nothing is written into the old ones.
    """
    for producer in family.producers:
        rows = _rows(producer, family.units, kept)
        _slice(model.get_submodule(producer.name), rows, 0, undo)
    inside = torch.arange(family.columns)
    columns = (kept[:, None] * family.columns + inside).view(-1)
    _slice(model.get_submodule(family.consumer), columns, 1, undo)


def _rows(producer: Producer, units: int, kept: Tensor) -> Tensor:
    """The outputs of a producer that stay."""
    inside = torch.arange(producer.rows)
    one = (kept[:, None] * producer.rows + inside).view(-1)
    parts = torch.arange(producer.parts) * (units * producer.rows)
    return (parts[:, None] + one).view(-1)


def _slice(module: nn.Module, which: Tensor, side: int, undo: contextlib.ExitStack) -> None:
    """Keep some outputs (side 0) or inputs (side 1) of a linear layer."""
    inputs = inputs_axis(module)
    axis = inputs if side == 1 else 1 - inputs
    names: Sequence[str] = ("weight", "bias") if side == 0 else ("weight",)
    for name in names:
        old = getattr(module, name, None)
        if not isinstance(old, nn.Parameter):
            continue
        at = axis if old.ndim > 1 else 0
        new = old.detach().index_select(at, which.to(old.device)).contiguous()
        replace(module, name, nn.Parameter(new, requires_grad=old.requires_grad), undo)
    for name in ("out_features", "nf") if side == 0 else ("in_features", "nx"):
        if hasattr(module, name):
            replace(module, name, len(which), undo)
