"""Removal of inputs from all rows at once, for pattern "columns": what is left is a smaller layer.

With W (R, C), A = H^-1, and the best repair of what is kept, removing the inputs S costs

    tr(W_S (A_SS)^-1 W_S^T) = tr((A_SS)^-1 B_SS),    B = W^T W,

so that the rows matter through B alone: a removal costs the same for one row and for ten thousand.
Removing a unit s from A and B, with q = A_:s (A_ss)^-1 and c = B_:s - q B_ss / 2, leaves

    A - q A_ss q^T    and    B - c q^T - q c^T.

These updates are put off and made for many units together, as products of matrices: until then,
only the columns of the unit that is removed and the blocks on the diagonal are kept up to date.
Source: the block form of Optimal Brain Surgeon (Hassibi & Stork 1993); Kurtic et al. 2023 (ZipLM)
for removing structures of one layer by it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lobs_native.ops import one_thread
from lobs_native.solvers.costs import Costs, along, curve_of
from lobs_native.solvers.extent import Extent, Flops
from lobs_native.solvers.measurement import error_of_nothing
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import FORCED, ZERO, Pattern
from lobs_native.solvers.problem import Problem, in_errors, nearest_count
from lobs_native.solvers.ranked import Magnitude, Ranked, Wanda
from lobs_native.solvers.repair import solve

__all__ = ["ColumnGroup", "ExactColumns", "MagnitudeColumns", "WandaColumns"]

_PANEL = 64  # columns whose updates are made together


class ExactColumns(Method):
    """Removes the unit that costs least, repairs all others by it, and repeats.

    Every prefix of the order of removal is the choice for its length. Importances count: a row's
    error is multiplied by its own.
    """

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        super().__init__(problem, pattern, importance)
        self.units = problem.in_features // pattern.unit  # of one group
        self.common = max(i.scale for i in problem.inverses)
        self.order: list[int] = []  # of removal: g * units + unit
        self.spent: list[float] = []  # what each removal cost
        self._groups: list[ColumnGroup] | None = None
        self._latest = -1  # units that the latest choice removes

    # ---- plans -----------------------------------------------------------------------------------

    @classmethod
    def matrices(cls, extent: Extent) -> int:
        """See :class:`Method`: the inverse, A and B; then H, what is kept of it, and its factor."""
        return 4 * 8 * extent.squares + 4 * 8 * extent.weights

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`: three rank-one updates of a matrix for every column that goes."""
        kept = 1 - extent.share
        removing = 6.0 * extent.share * extent.order * extent.squares
        repairing = kept**3 * extent.order * extent.squares / 3
        base = super().flops(extent)
        return dataclasses.replace(base, double=base.double + removing + repairing)

    # ---- choices ---------------------------------------------------------------------------------

    def choose(self, share: float, scope: str) -> Choice:
        """See :class:`Method`; every row loses the same inputs, whatever the scope."""
        problem, G = self.problem, len(self.problem.moments)
        count = nearest_count(share, G * self.units)
        self._latest = count
        removed = torch.zeros_like(problem.before, dtype=torch.bool)
        if count == 0:
            return Choice(removed, problem.before.clone())
        self._remove(count)
        for each in self.order[:count]:
            g, unit = divmod(each, self.units)
            removed[g, :, unit * self.pattern.unit : (unit + 1) * self.pattern.unit] = True
        return Choice(removed, self._repaired(removed))

    def choose_masked(self) -> Choice:
        """See :class:`Method`."""
        removed = self.problem.masked()
        return Choice(removed, self._repaired(removed))

    def _repaired(self, removed: Tensor) -> Tensor:
        return solve(self.problem, removed, precise=True, from_kept=True)

    def costs(self, removed: Tensor, scope: str) -> Costs | None:
        """See :class:`Method`: the sum of the removals' costs, with a curve."""
        problem, total = self.problem, len(self.problem.moments) * self.units
        start, unit_cost = error_of_nothing(problem), in_errors(self.common, problem.exponent)
        of_a_unit = removed.shape[1] * self.pattern.unit
        if self._latest < 0 or int(removed.sum()) != self._latest * of_a_unit:
            return None
        spent = torch.tensor([0.0, *self.spent[: self._latest]], dtype=torch.float64).cumsum(0)
        error = start + spent * unit_cost
        pick = along(len(error), self._latest / total)
        sparsity = pick.to(torch.float64) / total
        return curve_of(float(error[-1]), self._latest / total, sparsity, error[pick])

    # ---- the removal -----------------------------------------------------------------------------

    def _remove(self, count: int) -> None:
        """Remove further units, until ``count`` are."""
        if self._groups is None:
            self._groups = [self._group(g) for g in range(len(self.problem.moments))]
        groups = self._groups
        while len(self.order) < count:
            cheapest = [group.cheapest() for group in groups]
            g = min(range(len(groups)), key=lambda g: (cheapest[g][0], g))
            unit = cheapest[g][1]
            self.spent.append(groups[g].remove(unit))
            self.order.append(g * self.units + unit)

    def _group(self, g: int) -> ColumnGroup:
        problem, pattern = self.problem, self.pattern
        C = problem.in_features
        w = problem.working(g, torch.float64)[:, :C]
        zero = (problem.before[g, :, :C] == 0).view(len(w), self.units, -1).all(0).all(1)
        if self.importance is not None and float(self.importance.max()) > 0:
            w *= (self.importance[g] / self.importance.mean()).sqrt()[:, None]
        inverse = problem.inverses[g]
        group = ColumnGroup(w, inverse.A[:C, :C], pattern.unit, inverse.scale / self.common)
        group.first[zero] = ZERO
        if problem.mask is not None:
            forced = ~problem.mask[g, 0].view(self.units, -1)[:, 0]
            group.first[forced] = FORCED
        return group


class ColumnGroup:
    """What is left of one second moment's inputs, unit by unit.

    Removed units leave the matrices whenever a quarter of what is there has gone.
    """

    def __init__(self, w: Tensor, A: Tensor, size: int, scale: float) -> None:
        """w (R, C) and A (C, C) float64; neither is modified. Costs are multiplied by ``scale``."""
        self.size, self.scale = size, scale
        self.A, self.B = A.clone(memory_format=torch.contiguous_format), w.T @ w
        self.unit = torch.arange(len(A) // size, device=A.device)  # whose columns are where
        self.place = self.unit.clone()  # where a unit's columns are
        # Zero, or FORCED or ZERO for those that go before all others.
        self.first = torch.zeros(len(self.unit), dtype=torch.float64, device=A.device)
        self._gone = torch.zeros(len(self.unit), dtype=torch.bool, device=A.device)
        self._begin()

    def _begin(self) -> None:
        """Take the blocks on the diagonal from the matrices, and put off no update."""
        n, b = len(self.unit), self.size
        self.a, self.b = (
            M.view(n, b, n, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
            for M in (self.A, self.B)
        )
        self.late = self.A.new_empty(3, max(_PANEL, b), n * b)  # q, A q and c, transposed
        self.count = 0  # of their rows

    def costs(self) -> Tensor:
        """What removing each of ``self.unit`` would cost now, (n,) float64; for units that have
        gone, anything."""
        if self.size == 1:
            cost = (self.b / self.a).view(-1)
        else:
            with one_thread():
                cost = torch.linalg.solve(self.a, self.b).diagonal(dim1=1, dim2=2).sum(1)
        self.cost = cost.mul_(self.scale).clamp_(min=0.0)
        return self.cost

    def cheapest(self) -> tuple[float, int]:
        """What goes next: its rank, which is below zero for those that go first and else its cost;
        and its unit."""
        first, cost = self.first[self.unit], self.costs()
        rank = torch.where(first < 0, first, cost)
        rank[self._gone[self.unit]] = torch.inf
        lowest = int(rank.argmin())
        return float(rank[lowest]), int(self.unit[lowest])

    def remove(self, unit: int) -> float:
        """Remove it, and return what that costs; :meth:`costs` was called since the last."""
        n, b, at = len(self.unit), self.size, int(self.place[unit])
        columns = slice(at * b, (at + 1) * b)
        q, a, c = self.late[:, : self.count]
        # The unit's rows as they are now; both matrices are symmetric.
        A_s = self.A[columns] - q[:, columns].T @ a
        B_s = self.B[columns] - c[:, columns].T @ q - q[:, columns].T @ c
        with one_thread():
            Q = torch.linalg.solve(A_s[:, columns], A_s)
        C = B_s - 0.5 * (B_s[:, columns] @ Q)
        Q_, A_, C_ = (M.view(b, n, b).permute(1, 2, 0) for M in (Q, A_s, C))  # (n, b, columns)
        self.a -= Q_ @ A_.mT
        both = C_ @ Q_.mT
        self.b -= both + both.mT
        self.a[at] = torch.eye(b, dtype=self.a.dtype, device=self.a.device)
        self._gone[unit] = True
        self.late[:, self.count : self.count + b] = torch.stack([Q, A_s, C])
        self.count += b
        if self.count + b > self.late.shape[1]:
            self._catch_up()
        return float(self.cost[at])

    def _catch_up(self) -> None:
        """Make the updates that were put off."""
        q, a, c = self.late[:, : self.count]
        gone = self._gone[self.unit]
        self.A.addmm_(q.T, a, alpha=-1)
        self.B.addmm_(c.T, q, alpha=-1).addmm_(q.T, c, alpha=-1)
        self.count = 0
        if 4 * int(gone.sum()) > len(gone):
            left = (~gone).nonzero()[:, 0]
            inside = torch.arange(self.size, device=left.device)
            columns = (left[:, None] * self.size + inside).view(-1)
            self.A, self.B = (M[columns][:, columns] for M in (self.A, self.B))
            self.unit = self.unit[left]
            self.place[self.unit] = torch.arange(len(left), device=left.device)
            self._begin()


class _RankedColumns(Ranked):
    """Ranks units by the squares of their scores, over all rows."""

    def _cheapest(self, share: float, scope: str) -> Tensor:
        """See :class:`Ranked`; every row loses the same inputs, whatever the scope."""
        score, C = self.score, self.problem.in_features
        G, R, D = score.shape
        units = score[:, :, :C].reshape(G, R, -1, self.pattern.unit)
        total = units.clamp_min(0.0).square_().sum((1, 3))  # (G, units)
        for first in (ZERO, FORCED):
            total[(units <= first).all(3).all(1)] = first
        count = nearest_count(share, total.numel())
        lowest = total.view(-1).argsort(stable=True)[:count]
        chosen = torch.zeros_like(total, dtype=torch.bool).view(-1)
        chosen[lowest] = True
        removed = self.pattern.expand(chosen.view(G, 1, -1)).expand(G, R, C)
        return torch.nn.functional.pad(removed, (0, D - C))


class MagnitudeColumns(_RankedColumns, Magnitude):
    """Ranks inputs by the norms of their columns."""


class WandaColumns(_RankedColumns, Wanda):
    """Ranks inputs by the norms of their columns times the root mean squares of their values."""
