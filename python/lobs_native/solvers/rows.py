"""The rows of one layer, divided among processes that prune it together.

All of them run the same steps. Where a step treats every row by itself, each process does its own
rows, and all get the rows of all; whatever compares rows, or adds them up, is done by every process
on all rows, so that none of its bits depend on how many there are. A matrix product may round a row
differently with other rows beside it. So large products are always formed block by block, of rows
that do not depend on the number of processes, in one process too; each has whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["WHOLE", "Rows", "blocks", "own_share"]

_BLOCK = 1024  # rows of a product, at least; with 256, it takes up to 8 percent longer
_ALIGNED = 16  # rows whose floats begin on a cache line, as some products' rounding may require
_DIGIT = 11  # bits of a key that one histogram looks at


def blocks(count: int) -> list[slice]:
    """The blocks of ``count`` rows that products are formed on, in order."""
    most = max(1, count // _BLOCK)
    ends = [i * count // most // _ALIGNED * _ALIGNED for i in range(most)]
    return [slice(*ends) for ends in pairwise([*ends, count])]


class Rows:
    """All rows are those of this process. A subclass divides them; its methods are collective, so
    that every process calls them in the same order."""

    rank, size = 0, 1

    def ends(self, count: int, *, whole_blocks: bool = False) -> list[int]:
        """Of ``count`` rows, rank r has those from ends[r] to ends[r + 1]: as many as the others,
        or as many blocks."""
        at = [b.start for b in blocks(count)] if whole_blocks else list(range(count))
        at.append(count)
        return [at[r * (len(at) - 1) // self.size] for r in range(self.size + 1)]

    def own(self, count: int, *, whole_blocks: bool = False) -> slice:
        """The own ones of ``count`` rows."""
        ends = self.ends(count, whole_blocks=whole_blocks)
        return slice(ends[self.rank], ends[self.rank + 1])

    def own_blocks(self, count: int) -> list[slice]:
        """The own :func:`blocks`, counted from the first own row."""
        own = self.own(count, whole_blocks=True)
        inside = [b for b in blocks(count) if own.start <= b.start < own.stop]
        return [slice(b.start - own.start, b.stop - own.start) for b in inside]

    def joined(self, own: Tensor, count: int, *, whole_blocks: bool = False) -> Tensor:
        """(count, ...): the rows of all, each of which passes its own."""
        return own

    def values(self, own: Sequence[int]) -> list[list[int]]:
        """The numbers that each of the processes passes."""
        return [list(own)]


WHOLE = Rows()


def own_share(rows: Rows, keys: Tensor, count: int) -> int:
    """How many of the ``count`` smallest keys are own ones.

    Parameters
    ----------
    rows : Rows
    keys : (n,) int32 or int64, at least 0
        The own keys; other ranks pass others, in any number. Not modified.
    count : int
        Of equal keys, those of the first ranks come first. If there are fewer, all are.

    Notes
    -----
    A radix selection: a histogram of the leading digits finds the one that the last of these keys
    has, and of those that have it, the next digits are looked at.
    """
    own, shift = 0, 8 * keys.dtype.itemsize - 1
    if rows.size == 1:
        return min(count, len(keys))
    while shift > 0 and count > 0:
        width = min(_DIGIT, shift)
        shift -= width
        digit = (keys >> shift) & ((1 << width) - 1)
        mine = torch.bincount(digit, minlength=1 << width).cpu()
        every = torch.tensor(rows.values(mine.tolist()))
        upto = every.sum(0).cumsum(0)
        if int(upto[-1]) <= count:
            return own + len(keys)
        at = int(torch.searchsorted(upto, count))
        own += int(mine[:at].sum())
        count -= int(upto[at - 1]) if at else 0
        keys = keys[digit == at]
        before = int(every[: rows.rank, at].sum())
    return own + min(max(count - before, 0), len(keys)) if count else own
