"""Copies of weights that a forward pass makes before it multiplies them: in another order, in
another dtype, or of several weights in one tensor. A product with a copy is one with the weights
themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lobs_native.calibration.storages import Storages
from lobs_native.layers.block import Block, Dims, merged

__all__ = ["COPYING", "JOINING", "VIEWING", "Copies", "Copy", "Piece", "joined"]

_aten = torch.ops.aten
COPYING = (_aten.clone.default, _aten._to_copy.default)
JOINING = (_aten.cat.default, _aten.stack.default)
VIEWING = (_aten._unsafe_view.default,)  # which torch does not call views
_CHECKED = 64  # rows and columns of an operand whose place is computed, of those in equal distances
Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Copy(Generic[Owner]):
    """A copy of a whole parameter, or of a part of it; alone in its storage or beside others."""

    owner: Owner | None  # None: of something else
    offset: int  # in entries: of the first entry in the parameter
    start: int  # and in the storage of the copy
    dims: tuple[tuple[int, int, int], ...]  # size, step in the copy, step in the parameter

    def includes(self, entries: Tensor) -> Tensor:
        """Which entries of the storage are of this copy (bool)."""
        rest, inside = entries - self.start, entries >= self.start
        for size, step, _ in self.dims:
            inside &= rest // step < size
            rest = rest % step
        return inside & (rest == 0)

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
        both = first + along[0][some[0], None] + along[1][some[1]]
        origin = int(rows[0])
        expected = rows[some[0], None] + columns[some[1]] - origin
        if not (bool(self.includes(both).all()) and torch.equal(self.places(both), expected)):
            return None
        of_rows, of_columns = _factors(rows - origin), _factors(columns - origin)
        if of_rows is None or of_columns is None:
            return None
        return Block(origin, of_rows, of_columns)


@dataclass(frozen=True)
class Piece(Generic[Owner]):
    """What of an operand (C, R) is of one copy."""

    owner: Owner
    copy: Copy[Owner]
    columns: slice  # of the first dimension
    rows: slice  # of the second

    def block(self, operand: Tensor) -> Block | None:
        """Where it lies in the parameter; None if not in rows and columns that are alike."""
        return self.copy.block(operand[self.columns, self.rows])


class Copies(Generic[Owner]):
    """The copies that are in memory."""

    def __init__(self) -> None:
        self._kept = Storages[tuple[Copy[Owner], ...]]()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def note(self, owner: Owner, parameter: Tensor, source: Tensor, result: Any) -> bool:
        """Remember a copy of ``source``, which lies in the memory of a parameter; whether that is
        possible."""
        if not (isinstance(result, Tensor) and result.shape == source.shape):
            return False
        return self._keep(result, [_copy(owner, parameter, source, result)])

    def note_joined(
        self,
        sources: Sequence[Tensor],
        owners: Sequence[tuple[Owner, Tensor] | None],
        result: Any,
        dim: int,
        stacked: bool,
    ) -> bool:
        """Remember the copies in what ``torch.cat`` or, ``stacked``, ``torch.stack`` made of
        ``sources`` along ``dim``: each with its owner and the parameter in whose memory it lies, or
        None for other tensors; whether that is possible."""
        if not isinstance(result, Tensor):
            return False
        copies, begin = [], 0
        for source, owned in zip(sources, owners, strict=True):
            if not source.numel():
                continue
            length = 1 if stacked else source.shape[dim]
            place = result.select(dim, begin) if stacked else result.narrow(dim, begin, length)
            begin += length
            owner, parameter = owned or (None, source)
            copies.append(_copy(owner, parameter, source, place))
        return self._keep(result, copies)

    def _keep(self, result: Tensor, copies: Sequence[Copy[Owner]]) -> bool:
        reached = 1
        for step, size in sorted(zip(result.stride(), result.shape, strict=True)):
            if size > 1 and step != reached:
                return False  # not dense: it has been expanded
            reached *= size
        return self._kept.note(result, tuple(copies))

    def of(self, x: Tensor) -> tuple[Copy[Owner], ...]:
        """The copies in whose storage ``x`` lies."""
        return self._kept.of(x) or ()

    def owners(self, x: Tensor) -> list[Owner]:
        """The owners of these copies, each once."""
        found = dict.fromkeys(copy.owner for copy in self.of(x))
        return [owner for owner in found if owner is not None]

    def pieces(self, operand: Tensor) -> list[Piece[Owner]] | None:
        """The parts of an operand (C, R) in the storage of copies that have an owner; None if it is
        cut neither between rows nor between columns."""
        copies = self.of(operand)
        first = int(operand.storage_offset())
        (C, R), (column, row) = operand.shape, operand.stride()
        columns, rows = (
            _runs(copies, first + torch.arange(n) * step) for n, step in ((C, column), (R, row))
        )
        if len(columns) > 1 and len(rows) > 1:
            return None
        whole = slice(None)
        cut = [(k, part, whole) for k, part in columns]
        if len(columns) == 1:
            cut = [(k, whole, part) for k, part in rows]
        found = []
        for k, *slices in cut:
            copy = copies[k] if k >= 0 else None
            if copy is not None and copy.owner is not None:
                found.append(Piece(copy.owner, copy, *slices))
        return found

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def joined(func: Any, args: Any, kwargs: Any) -> tuple[int, bool]:
    """Along which dimension a call of one of ``JOINING`` joins tensors, and whether it stacks
    them."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return int(dim), func is _aten.stack.default


def _copy(owner: Owner | None, parameter: Tensor, source: Tensor, place: Tensor) -> Copy[Owner]:
    """That ``place`` is a copy of ``source``, which lies in the memory of ``parameter``."""
    dims = sorted(
        (
            (size, step, original)
            for size, step, original in zip(
                place.shape, place.stride(), source.stride(), strict=True
            )
            if size > 1
        ),
        key=lambda dim: -dim[1],
    )
    offset = (source.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    return Copy(owner, offset, int(place.storage_offset()), tuple(dims))


def _runs(copies: Sequence[Copy[Owner]], entries: Tensor) -> list[tuple[int, slice]]:
    """Which copy neighbouring entries of a storage are of, -1 for none, and where these begin and
    end."""
    of = torch.full_like(entries, -1)
    for k, copy in enumerate(copies):
        of[copy.includes(entries)] = k
    each, lengths = torch.unique_consecutive(of, return_counts=True)
    ends = lengths.cumsum(0).tolist()
    begins = [0, *ends[:-1]]
    return [(k, slice(*ends)) for k, *ends in zip(each.tolist(), begins, ends, strict=True)]


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
