"""The order in which sums over the data are formed: the same for any number of ranks.

The batches are divided into ``CHUNKS`` runs of neighbours (fewer if there are fewer batches). The
sums over a chunk begin with zero and take its batches in order. Then the chunks' sums are added in
order: ``((S_0 + S_1) + S_2) + ...``. Of N ranks, each computes one of the first N chunks, one of
the next N, and so on. When each rank has one, these are added, every rank adding its piece of the
entries, so that no rank holds more than two sets of sums. One process does the same additions, one
after another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lobs_native.calibration.ranks import Ranks

__all__ = ["CHUNKS", "Summing", "Tree", "chunks", "own_batches", "ranks_of_chunks"]

CHUNKS = 16
_ROWS = 64  # of a lower triangular matrix, that are sent together


class Summing(Protocol):
    """Sums that a pass over the data adds to."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums themselves, not copies of them; each contiguous."""

    def lower(self) -> Collection[str]:
        """The names of those that are square and zero above the diagonal; none by default."""
        return ()

    def values(self) -> dict[str, Any]:
        """All else that belongs to them, as plain JSON values, which :func:`added` adds."""

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take over such values. Raises KeyError or TypeError if they are something else."""

    @property
    def keeps_batches(self) -> bool:
        """Whether something is kept of each batch by itself, and not summed."""
        return False

    def of_batches(self) -> Mapping[str, Tensor]:
        """What is kept of each batch."""
        return {}

    def bytes_of_batches(self) -> int:
        """The bytes of that, or a little less."""
        return 0

    def add_of_batches(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what another rank, or a run before, has of its batches."""
        return


def chunks(count: int) -> list[range]:
    """The numbers of the batches of each chunk, of ``count`` batches."""
    parts = min(CHUNKS, count)
    return [range(j * count // parts, (j + 1) * count // parts) for j in range(parts)]


def ranks_of_chunks(count: int, size: int) -> list[int]:
    """The rank, of ``size``, that computes each chunk of ``count`` batches. The first chunks are
    those of the ranks in order, so that rank 0 has the first batch. Of the next ``size``, and so
    on, the longest is that of the rank with the fewest batches so far."""
    parts = chunks(count)
    found = list(range(min(size, len(parts))))
    load = [*map(len, parts[:size]), *[0] * (size - len(found))]
    for first in range(size, len(parts), size):
        lengths = [len(part) for part in parts[first : first + size]]
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        of_round = dict(zip(longest, sorted(range(size), key=load.__getitem__), strict=False))
        for i, length in enumerate(lengths):
            load[of_round[i]] += length
            found.append(of_round[i])
    return found


def own_batches(count: int, ranks: Ranks) -> dict[int, None]:
    """The numbers of the batches, of ``count``, that this rank runs the model on, in order."""
    parts = zip(chunks(count), ranks_of_chunks(count, ranks.size), strict=True)
    return {number: None for chunk, rank in parts if rank == ranks.rank for number in chunk}


def added(a: Any, b: Any) -> Any:
    """The sum of plain JSON values of one form: numbers are added, flags are joined by or, and of
    texts the first that is not empty stays."""
    if isinstance(a, dict):
        return {key: added(value, b[key]) for key, value in a.items()}
    if isinstance(a, list):
        return [added(x, y) for x, y in zip(a, b, strict=True)]
    if isinstance(a, (bool, str)):
        return a or b
    return a + b


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Views of the rows of a lower triangular matrix, some at a time, each as far as they reach."""
    for first in range(0, len(x), _ROWS):
        yield x[first : first + _ROWS, : first + _ROWS]


def _lower(x: Tensor) -> Tensor:
    """The entries of a lower triangular matrix, and few of the zeros, as one row."""
    return torch.cat([block.reshape(-1) for block in _blocks(x)])


def _put_lower(x: Tensor, entries: Tensor) -> None:
    """The inverse of :func:`_lower`."""
    blocks = list(_blocks(x))
    for block, part in zip(blocks, entries.split([b.numel() for b in blocks]), strict=True):
        block.copy_(part.view(block.shape))


class Tree:
    """The sums over the chunks that have been added so far.

    ``sums`` are those of the chunk at hand; when all chunks have been added, those over the data.
    """

    def __init__(self, sums: Summing, ranks: Ranks, count: int) -> None:
        self.sums, self.ranks = sums, ranks
        self.chunks = chunks(count)
        self.owners = ranks_of_chunks(count, ranks.size)
        self.added = 0  # chunks
        self.total: dict[str, Tensor] = {}  # of several ranks, the own piece of each
        self.total_values: dict[str, Any] | None = None
        self._none = sums.values()  # before anything has been added

    @property
    def ends(self) -> set[int]:
        """How many batches have been passed when a chunk of this rank ends."""
        parts = zip(self.chunks, self.owners, strict=True)
        return {chunk.stop for chunk, rank in parts if rank == self.ranks.rank}

    @property
    def complete(self) -> bool:
        """Whether all chunks have been added."""
        return self.added >= len(self.chunks)

    def add(self) -> None:
        """Add the next chunk of every rank; ``sums`` are those of this rank's, if it has one."""
        if self.ranks.size == 1:
            self._add_alone()
        else:
            self._add_pieces()

    def _add_alone(self) -> None:
        self.added += 1
        self._add_values(self.sums.values())
        for name, x in self.sums.tensors().items():
            if self.complete:
                if name in self.total:
                    x += self.total.pop(name)
            elif name in self.total:
                self.total[name] += x
                x.zero_()
            else:
                self.total[name] = x.clone()
                x.zero_()
        self._finish()

    def _add_pieces(self) -> None:
        ranks = self.ranks
        senders = self.owners[self.added : self.added + ranks.size]
        self.added += len(senders)
        tensors, lower, own = self.sums.tensors(), self.sums.lower(), self.sums.values()
        lengths: dict[str, int] = {}

        def flat() -> Iterator[tuple[str, Tensor]]:
            for name, x in tensors.items():
                entries = _lower(x) if name in lower else x.view(-1)
                lengths[name] = len(entries)
                yield name, entries

        def put(name: str, entries: Tensor) -> None:
            if name in lower:
                _put_lower(tensors[name], entries)
            else:
                tensors[name].view(-1).copy_(entries)

        for values in ranks.to_owners("sums of a chunk", own, flat(), senders, self._take):
            self._add_values(values)
        if self.complete:
            ranks.from_owners("sums", self.total, lengths, put)
            self.total.clear()
        else:
            for x in tensors.values():
                x.zero_()
        self._finish()
        if self.complete and self.sums.keeps_batches:
            kept = self.sums.of_batches()
            every = [ranks.tensors("of batches", kept, source) for source in range(ranks.size)]
            for source, tensors in enumerate(every):
                if source != ranks.rank:
                    self.sums.add_of_batches(tensors)

    def _take(self, name: str, parts: list[Tensor]) -> None:
        """Add the own piece of a tensor from every chunk, in order."""
        for part in parts:
            if name in self.total:
                self.total[name] += part
            else:
                self.total[name] = part.clone()

    def _add_values(self, values: dict[str, Any]) -> None:
        known = self.total_values
        self.total_values = values if known is None else added(known, values)

    def _finish(self) -> None:
        assert self.total_values is not None
        self.sums.set_values(self.total_values if self.complete else self._none)
