"""Batches that a model changes in place, as by ``x.sub_(mean)`` or ``batch.pop("labels")``: each
pass over the data must see the same, and the data are the user's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError

__all__ = ["Unchanged"]


class Unchanged:
    """Protects batches from a model that changes its inputs.

    The first call gets a copy. If that is changed, all others get one as well; if not, they get the
    batch itself, which costs nothing.
    """

    def __init__(self) -> None:
        self._copying: bool | None = None  # None: not known yet

    @contextlib.contextmanager
    def given(self, batch: Any) -> Iterator[Any]:
        """The batch, or a copy, for one call. Raises ArgumentError if a batch that is no copy has
        been changed."""
        first = self._copying is None
        given = batch if self._copying is False else _copied(batch)
        before = _state(given)
        yield given
        changed = _state(given) != before
        if changed and given is batch:
            raise ArgumentError(
                "calibration: the model changes a batch in place, so that it would see another one "
                "in the next pass; pass a forward that gives it a copy"
            )
        if first:
            self._copying = changed


def _copied(batch: Any) -> Any:
    """A copy with other tensors; the batch itself if it has no copies."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # whatever its class raises
        return batch


def _state(batch: Any) -> list[tuple[int, int]]:
    """What differs after a change in place: the identity and the version of each tensor."""
    return [(id(x), 0 if x.is_inference() else x._version) for x in _tensors(batch, set())]


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    for part in inside:
        yield from _tensors(part, seen)
