"""An original network other than the one that is passed: what that was before it was pruned the
first time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.files.shelf import Place, Shelf
from lobs_native.network.whole_modules import refuse_pieces

__all__ = ["differing_from", "keep_originals"]

_WAY_OUT = "pass copy.deepcopy(model), made before the first call"


def differing_from(original: Any, session: Session) -> frozenset[str]:
    """The names of the model's parameters that have other values than in the original network; none
    if that is None, the model itself.

    Raises
    ------
    ArgumentError, DtypeError
        It has other parameters, shapes, dtypes or buffers, shares parameters with the model, or
        weights are offloaded.
    """
    if original is None:
        return frozenset()
    if not isinstance(original, nn.Module):
        raise DtypeError(f"original: expected an nn.Module, got {type(original).__name__}")
    refuse_pieces(original, "original")
    if session.offload is not None:
        raise ArgumentError(
            "original: with offload, the model as it was passed is the original network; leave one "
            "of them out"
        )
    model, differing = session.model, set()
    for kind, mine, others in (
        ("parameter", dict(model.named_parameters()), dict(original.named_parameters())),
        ("buffer", dict(model.named_buffers()), dict(original.named_buffers())),
    ):
        if names := sorted(mine.keys() ^ others.keys()):
            raise ArgumentError(
                f"original: only one of it and the model has the {kind} {names[0]!r}; it must be "
                f"the network that the model was: {_WAY_OUT}"
            )
        for name, value in mine.items():
            other = others[name]
            if (value.shape, value.dtype) != (other.shape, other.dtype):
                raise ArgumentError(
                    f"original: its {kind} {name!r} is {tuple(other.shape)} {other.dtype}, and "
                    f"the model's {tuple(value.shape)} {value.dtype}; {_WAY_OUT}"
                )
            if kind == "parameter" and _overlap(value, other):
                raise ArgumentError(
                    f"original: it shares the parameter {name!r} with the model, which is "
                    f"changed; {_WAY_OUT}"
                )
            if not value.is_meta and not torch.equal(value, other.to(value.device)):
                differing.add(name)
        if kind == "buffer" and (names := sorted(differing & mine.keys())):
            raise ArgumentError(
                f"original: its buffer {names[0]!r} has other values than the model's, and only "
                "parameters may differ; re-estimate batch normalization after the last call"
            )
    return frozenset(differing)


def keep_originals(
    session: Session,
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, Place],
    original: nn.Module | None,
) -> None:
    """Keep the values that these parameters, which will be changed, have before; and tell the
    session what they and all others are in the original network, if that is another one. Its
    values stay where they are. ``places`` as in :class:`~lobs_native.network.pruning.Pruning`."""
    before = session.originals
    for name, parameter in parameters.items():
        before.put_copy(name, parameter, places.get(name))
        session.unused(parameter)
    if original is None:
        return
    session.before, session.originals = before, Shelf()
    others = dict(original.named_parameters())
    for name in parameters.keys() | session.differing:
        session.originals.put(name, others[name].detach())
    session.changed = set(session.differing)


def _overlap(some: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common from the start on."""
    if not some.numel() or some.is_meta or some.device != other.device:
        return False
    return some.data_ptr() == other.data_ptr()
