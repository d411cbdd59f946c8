"""Inputs that no row reads any more, pattern "columns": what is left is a smaller layer."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.costs import Costs, along, curve_of
from lobs_native.solvers.extent import Extent, Flops
from lobs_native.solvers.measurement import error_of_nothing
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import FORCED, ZERO, Pattern
from lobs_native.solvers.problem import Problem, in_errors, nearest_count
from lobs_native.solvers.ranked import Magnitude, Ranked, Wanda
from lobs_native.solvers.repair import solve

__all__ = ["ExactColumns", "MagnitudeColumns", "WandaColumns"]


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
        self._traces: list[ops.ColumnsTrace] | None = None
        self._first: list[list[float]] = []  # of the units of each group
        self._gone: list[int] = []  # units of each group that have gone
        self._latest = -1  # units that the latest choice removes

    # ---- plans -----------------------------------------------------------------------------------

    @classmethod
    def matrices(cls, extent: Extent) -> int:
        """See :class:`Method`: the inverse, and half as much for the factors of the removal; then
        what is kept of H twice. (Factors grow to three quarters where a quarter of H has gone.)"""
        return 28 * extent.squares + 4 * 8 * extent.weights

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`: a row of A and one of B for every column that goes, from the inverse
        and the weights of those that are left and the factors of those that are not."""
        s = extent.share
        removing = (3 - 2 * s) * s**2 * extent.order * extent.squares
        removing += (2 - s) * s * extent.order * extent.weights
        repairing = (1 - s) ** 3 * extent.order * extent.squares
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
        """Remove further units, until ``count`` are.

        Groups do not depend on each other: the order of all is that of their own, merged.
        """
        G = len(self.problem.moments)
        if self._traces is None:
            self._traces = [self._trace(g) for g in range(G)]
            self._gone = [0] * G
        ranks = [self._next_rank(g, count) for g in range(G)]
        while len(self.order) < count:
            g = ranks.index(min(ranks))
            at = self._gone[g]
            self.spent.append(self._traces[g].cost[at])
            self.order.append(g * self.units + self._traces[g].order[at])
            self._gone[g] += 1
            ranks[g] = self._next_rank(g, count)

    def _next_rank(self, g: int, count: int) -> float:
        """What decides over the next unit of a group; infinite where none is left or needed."""
        assert self._traces is not None
        trace, at = self._traces[g], self._gone[g]
        if at == self.units or len(self.order) >= count:
            return math.inf
        if at == len(trace.order):  # the only group, to the count; of many, few more than needed
            trace.extend(count if len(self._traces) == 1 else at + 8 + at // 2)
        first = self._first[g][trace.order[at]]
        return first if first < 0 else trace.cost[at]

    def _trace(self, g: int) -> ops.ColumnsTrace:
        problem, pattern = self.problem, self.pattern
        C = problem.in_features
        w = problem.working(g, torch.float64)[:, :C]
        zero = (problem.before[g, :, :C] == 0).view(len(w), self.units, -1).all(0).all(1)
        if self.importance is not None and float(self.importance.max()) > 0:
            w *= (self.importance[g] / self.importance.mean()).sqrt()[:, None]
        first = torch.zeros(self.units, dtype=torch.float64, device=w.device)
        first[zero] = ZERO
        if problem.mask is not None:
            first[~problem.mask[g, 0].view(self.units, -1)[:, 0]] = FORCED
        self._first.append(first.tolist())
        inverse = problem.inverses[g]
        start = torch.arange(self.units + 1, device=w.device) * pattern.unit
        layer = ops.ColumnLayer(w, inverse.A[:C, :C], start, inverse.scale / self.common)
        return ops.columns_trace([layer], 0, first=first, backend=problem.workspace.backend)


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
