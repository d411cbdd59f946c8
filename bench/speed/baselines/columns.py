"""Removal of inputs from all rows at once, unit by unit, in torch.

With W (R, C), A = H^-1, and the best repair of what is kept, removing the inputs S costs

    tr(W_S (A_SS)^-1 W_S^T) = tr((A_SS)^-1 B_SS),    B = W^T W,

so that the rows matter through B alone: a removal costs the same for one row and for ten thousand.
Removing a unit s from A and B leaves

    A - Q^T A_ss Q    and    B - P^T Q - Q^T P,    Q = A_ss^-1 A_s:,    P = B_s: - B_ss Q / 2.

Neither is ever written: B is not even formed. Kept up to date are the blocks on their diagonals,
which are the costs, and the rows of the units that cost least, because these go next. Such rows
come from A and from W, less the products of all Q and P so far, for many units together. The order
is that of the plain updates, step for step.

The best form in torch that is known here: the algorithm of ``csrc/columns.h``, in large products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native.ops import one_thread

__all__ = ["ColumnGroup"]

_AHEAD = 128  # rows that are brought up to date together


class ColumnGroup:
    """What is left of one second moment's inputs, unit by unit.

    k of C columns take about ``3 C k^2 + 2 R C k`` flops, nearly all in large products, and up to
    half as much again for rows that never go; writing A and B after every removal takes
    ``6 C^2 k + 2 R C^2``. Removed units leave the factors whenever a quarter of what is there has
    gone.
    """

    def __init__(self, w: Tensor, A: Tensor, size: int, scale: float) -> None:
        """w (R, C) and A (C, C) float64 are kept and not modified. Units are of ``size`` columns;
        costs are multiplied by ``scale``."""
        self.size, self.scale = size, scale
        self.unit = torch.arange(len(A) // size, device=A.device)  # whose columns are where
        self.place = self.unit.clone()  # where a unit's columns are
        # Zero, or FORCED or ZERO for those that go before all others.
        self.first = torch.zeros(len(self.unit), dtype=A.dtype, device=A.device)
        by_unit = A.unflatten(0, (-1, size)).unflatten(2, (-1, size))
        self._a = by_unit.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        each = w.unflatten(1, (-1, size)).permute(1, 2, 0)  # (n, b, R)
        self._b = each @ each.mT
        self._A, self._w = A, w
        self._column = torch.arange(len(A), device=A.device)  # of A, of each that is left
        self._count = 0  # of the rows of the factors: columns that have gone
        self._pivot = A.new_empty(0, size, size)  # A_ss of every removal
        self._factors = A.new_empty(2, 0, len(A))  # Q and P
        self._rows = self._factors  # of A and B, of the units that are likely to be next
        self._ahead = dict[int, int]()  # place of a unit -> place of its rows among _rows
        self._since = 0  # rows of the factors that _rows have seen
        self._make_room()

    def ranks(self) -> Tensor:
        """What removing each of ``self.unit`` would cost now, (n,) float64; ``first``, where that
        is below zero, and infinity for units that have gone."""
        cost = self._solved(self._a, self._b).diagonal(dim1=1, dim2=2).sum(1)
        self._cost = cost.mul_(self.scale).clamp_(min=0.0)
        first = self.first[self.unit]
        return torch.where(first < 0, first, self._cost).masked_fill_(self._gone, torch.inf)

    def remove(self, unit: int, rank: Tensor) -> float:
        """Remove it, and return what that costs. Those of ``self.unit`` with the lowest ``rank``
        (n,), which follows from :meth:`ranks`, are likely to be next."""
        b, at = self.size, int(self.place[unit])
        columns, cost = slice(at * b, (at + 1) * b), float(self._cost[at])
        if at not in self._ahead:
            self._look_ahead(at, rank)
        first = self._ahead[at] * b
        A_s, B_s = self._updated(self._rows[:, first : first + b], columns, self._since)
        Q = self._solved(A_s[:, columns], A_s)
        P = B_s - 0.5 * self._product(B_s[:, columns], Q)
        Q_, A_, P_ = (M.unflatten(1, (-1, b)).permute(1, 2, 0) for M in (Q, A_s, P))  # (n, b, b)
        self._a -= self._product(Q_, A_.mT)
        both = self._product(P_, Q_.mT)
        self._b -= both + both.mT
        self._a[at] = torch.eye(b, dtype=Q.dtype, device=Q.device)
        self._pivot[self._count // b] = A_s[:, columns]
        self._factors[0, self._count : self._count + b] = Q
        self._factors[1, self._count : self._count + b] = P
        self._count += b
        self._gone[at] = True
        self._left -= 1
        if 0 < 4 * self._left < 3 * len(self.unit):
            self._squeeze()
        return cost

    # ---- rows of A and B -------------------------------------------------------------------------

    def _look_ahead(self, at: int, rank: Tensor) -> None:
        """Compute the rows of the unit at ``at``, and of others that are likely to be next."""
        order = rank.clone()
        order[at] = -torch.inf
        count = min(max(1, _AHEAD // self.size), self._left)
        chosen = order.topk(count, largest=False).indices.tolist()
        known = [place for place in chosen if place in self._ahead]
        new = [place for place in chosen if place not in self._ahead]
        parts = []
        if known:
            columns = self._columns([self._ahead[place] for place in known])
            rows = self._rows[:, columns]
            parts.append(self._updated(rows, self._columns(known), self._since))
        if new:
            columns = self._columns(new)
            A = self._A[self._column[columns][:, None], self._column]
            B = self._w[:, columns].T @ self._w
            parts.append(self._updated(torch.stack([A, B]), columns, 0))
        self._rows, self._since = torch.cat(parts, 1), self._count
        self._ahead = {place: i for i, place in enumerate(known + new)}

    def _columns(self, places: list[int]) -> Tensor:
        """The columns of the units at some places."""
        at = torch.tensor(places, dtype=torch.int64, device=self.unit.device)
        inside = torch.arange(self.size, device=at.device)
        return (at[:, None] * self.size + inside).view(-1)

    def _updated(self, rows: Tensor, columns: Tensor | slice, since: int) -> Tensor:
        """Rows (2, m, C) of A and B of some columns, after all removals; those that are given are
        of the time when the factors had ``since`` rows."""
        Q, P = self._factors[:, since : self._count]
        q, p = Q[:, columns], P[:, columns]
        pivot = self._pivot[since // self.size : self._count // self.size]
        scaled = self._product(pivot, q.unflatten(0, (-1, self.size))).flatten(0, 1)
        both: Tensor = rows.flatten(0, 1).addmm(torch.cat([scaled, p], 1).T, Q, alpha=-1)
        after: Tensor = both.unflatten(0, (2, -1))
        after[1].addmm_(q.T, P, alpha=-1)
        return after

    def _solved(self, a: Tensor, B: Tensor) -> Tensor:
        """a^-1 B for blocks a (..., b, b); units of one column need no factorisation."""
        if self.size == 1:
            return B / a
        with one_thread():
            solved: Tensor = torch.linalg.solve(a, B)
        return solved

    def _product(self, X: Tensor, Y: Tensor) -> Tensor:
        """X @ Y over the columns of a unit."""
        return X * Y if self.size == 1 else X @ Y

    # ---- what is left ----------------------------------------------------------------------------

    def _squeeze(self) -> None:
        """Leave out what has gone."""
        left = (~self._gone).nonzero()[:, 0]
        columns = self._columns(left.tolist())
        self._a, self._b, self.unit = self._a[left], self._b[left], self.unit[left]
        self.place[self.unit] = torch.arange(len(left), device=left.device)
        self._column, self._w = self._column[columns], self._w[:, columns]
        self._make_room(columns)

    def _make_room(self, columns: Tensor | None = None) -> None:
        """Allocate the factors, of these columns, for all removals until the next squeeze."""
        n, b, count = len(self.unit), self.size, self._count
        room = count + (n // 4 + 1) * b
        pivot, factors = self._pivot, self._factors
        self._pivot = pivot.new_empty(room // b, b, b)
        self._pivot[: count // b] = pivot[: count // b]
        self._factors = factors.new_empty(2, room, n * b)
        for new, old in zip(self._factors, factors, strict=True):
            new[:count] = old[:count] if columns is None else old[:count, columns]
        self._gone = torch.zeros(n, dtype=torch.bool, device=pivot.device)
        self._left = n
        self._rows = factors.new_empty(2, 0, n * b)
        self._ahead = {}
