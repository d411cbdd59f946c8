"""Copies of weights that a forward pass makes before it multiplies them: in another order, or in
another dtype. A product with a copy is one with the weight itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lobs_native.layers.block import Block, Dims, merged

__all__ = ["COPYING", "VIEWING", "Copies", "Copy", "address"]

_aten = torch.ops.aten
COPYING = (_aten.clone.default, _aten._to_copy.default)
VIEWING = (_aten._unsafe_view.default,)  # which torch does not call views
_CHECKED = 64  # rows and columns of an operand whose place is computed, of those in equal distances
Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Copy(Generic[Owner]):
    """A copy of a whole parameter, or of a part of it."""

    owner: Owner
    offset: int  # in entries: of the first entry in the parameter
    start: int  # and in the storage of the copy
    dims: tuple[tuple[int, int, int], ...]  # size, step in the copy, step in the parameter

    def places(self, entries: Tensor) -> Tensor:
        """Where entries of the storage lie in the parameter (int64)."""
        rest, places = entries - self.start, torch.full_like(entries, self.offset)
        for _, step, original in self.dims:
            places += rest // step * original
            rest = rest % step
        return places

    def block(self, operand: Tensor) -> Block | None:
        """Where the entries of an operand (C, R) of this copy lie; None if not in rows and columns
        that are alike."""
        (C, R), (column, row) = operand.shape, operand.stride()
        first = int(operand.storage_offset())
        along = [torch.arange(n) * step for n, step in ((R, row), (C, column))]
        rows, columns = (self.places(first + each) for each in along)
        some = [slice(None, None, max(1, n // _CHECKED)) for n in (R, C)]
        both = self.places(first + along[0][some[0], None] + along[1][some[1]])
        origin = int(rows[0])
        if not torch.equal(both, rows[some[0], None] + columns[some[1]] - origin):
            return None
        of_rows, of_columns = _factors(rows - origin), _factors(columns - origin)
        if of_rows is None or of_columns is None:
            return None
        return Block(origin, of_rows, of_columns)


class Copies(Generic[Owner]):
    """The copies that are in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[StorageWeakRef, Copy[Owner]]] = {}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def note(self, owner: Owner, parameter: Tensor, source: Tensor, result: Any) -> bool:
        """Remember a copy of ``source``, which lies in the memory of a parameter; whether that is
        possible."""
        if not (isinstance(result, Tensor) and result.shape == source.shape and address(result)):
            return False
        dims = sorted(
            (
                (size, step, original)
                for size, step, original in zip(
                    result.shape, result.stride(), source.stride(), strict=True
                )
                if size > 1
            ),
            key=lambda dim: -dim[1],
        )
        reached = 1
        for size, step, _ in reversed(dims):
            if step != reached:
                return False  # not dense: it has been expanded
            reached *= size
        offset = (source.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        copy = Copy(owner, offset, int(result.storage_offset()), tuple(dims))
        self._kept[address(result)] = (StorageWeakRef(result.untyped_storage()), copy)
        return True

    def of(self, x: Tensor) -> Copy[Owner] | None:
        """The copy in whose memory ``x`` lies."""
        if not self._kept or (entry := self._kept.get(address(x))) is None:
            return None
        if entry[0].expired():
            del self._kept[address(x)]
            return None
        return entry[1]

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def address(x: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has none."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _factors(values: Tensor) -> Dims | None:
    """The dimensions in which 0 = values[0], values[1], ... are counted; None if in none."""
    dims: list[tuple[int, int]] = []
    while len(values) > 1:
        step = int(values[1])
        regular = values == torch.arange(len(values)) * step
        size = len(values) if bool(regular.all()) else int(regular.long().argmin())
        if len(values) % size:
            return None
        inner = torch.arange(size) * step
        if not torch.equal(values.view(-1, size), values[::size, None] + inner):
            return None
        dims.append((size, step))
        values = values[::size]
    return merged(reversed(dims))
