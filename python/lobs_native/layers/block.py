"""Where the entries of a matrix lie in the parameter from which it is cut, however it is folded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Block", "Dims", "group_step", "merged", "strided"]

Dims = tuple[tuple[int, int], ...]  # (size, step in entries) of each dimension, outermost first


@dataclass(frozen=True)
class Block:
    """A part of a contiguous parameter as it enters a product: R rows of C entries."""

    offset: int  # of its first entry, in entries of the parameter
    rows: Dims
    columns: Dims

    @classmethod
    def of(cls, operand: Tensor, offset: int) -> Block:
        """An operand (C, R) in the parameter's own memory."""
        (C, R), (column, row) = operand.shape, operand.stride()
        return cls(offset, merged([(R, row)]), merged([(C, column)]))

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)"""
        return tuple(math.prod(size for size, _ in dims) for dims in (self.rows, self.columns))  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def merged(dims: Iterable[tuple[int, int]]) -> Dims:
    """The same dimensions, as few as there can be."""
    few: list[tuple[int, int]] = []
    for size, step in dims:
        if size == 1:
            continue
        if few and few[-1][1] == size * step:
            few[-1] = (few[-1][0] * size, step)
        else:
            few.append((size, step))
    return tuple(few)


def group_step(block: Block, entries: int) -> int | None:
    """How far apart blocks of this form lie that cover a parameter of so many entries, each once;
    None if they cannot."""
    groups, rest = divmod(entries, block.size)
    if rest:
        return None
    reached, apart = 1, None
    for size, step in sorted((*block.rows, *block.columns), key=lambda dim: dim[1]):
        if step == reached * groups and step != reached and apart is None:
            apart, reached = reached, step
        if step != reached:
            return None
        reached *= size
    if reached == entries:
        return entries if apart is None else apart
    return reached if apart is None and reached * groups == entries else None


def strided(blocks: int, apart: int, block: Block) -> tuple[Sequence[int], Sequence[int]]:
    """Sizes and steps of all blocks together: (blocks, *rows, *columns)."""
    dims = ((blocks, apart), *block.rows, *block.columns)
    return [size for size, _ in dims], [step for _, step in dims]
