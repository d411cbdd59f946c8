"""Method "sweep": SparseGPT's order, columns from left to right in blocks, one shared factor."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.costs import Costs
from lobs_native.solvers.extent import Extent, Flops
from lobs_native.solvers.factor import FactorSweep
from lobs_native.solvers.low_rank import FewSamples, LowRankSweep
from lobs_native.solvers.measurement import error_of_nothing
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import FORCED, ZERO, Pattern, goes_first
from lobs_native.solvers.problem import Problem, nearest_count, scaled_

__all__ = ["Sweep"]

_WIDTH = 128  # columns of a block, as published


class Sweep(Method):
    """Chooses the mask of each block by the weights as they are when the sweep arrives.

    Source: Frantar & Alistarh 2023.
    """

    optimal = False
    factor_alone = True

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        super().__init__(problem, pattern, importance)
        self.cuts = pattern.cuts(problem.in_features, problem.order, _WIDTH)
        self._spent: dict[int, Tensor] = {}  # number of removals -> (G, R) what they cost

    @classmethod
    def matrices(cls, extent: Extent) -> int:
        """See :class:`Method`: the factor, in the kernel's type unless more than a sweep needs it,
        and a matrix of its size while the error is measured."""
        size = extent.kernel.itemsize
        square = size + (8 if extent.inverted else size)
        return square * extent.squares + (6 * size + 2) * extent.weights

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`: a factor, the repair of everything right of a block, the error, and
        what it is relative to."""
        work = extent.order * (extent.squares / 3 + 3.0 * extent.weights)
        narrow = extent.kernel == torch.float32
        return Flops(single=work) if narrow else Flops(double=work)

    def choose(self, share: float, scope: str) -> Choice:
        """See :class:`Method`. Every block removes its part of the count: over all rows, or (scope
        "row") in each row."""
        problem, pattern = self.problem, self.pattern
        G, R, _ = problem.before.shape
        units = problem.candidates // pattern.unit
        total = nearest_count(share, G * R * units)
        per_row = nearest_count(share, units)
        if not pattern.is_grouped and (per_row if scope == "row" else total) == 0:
            removed = torch.zeros_like(problem.before, dtype=torch.bool)
            return Choice(removed, problem.before.clone())
        if scope == "row":
            budgets = torch.full((G, R), per_row)
        else:
            budgets = self._budgets(total, R * units)[:, None]
        spent, weights, gone = [], [], []
        for g, budget in enumerate(budgets):
            W = problem.working(g)
            removed, cost = self._sweep(g, W, budget)
            weights.append(W)
            gone.append(removed)
            spent.append(scaled_(cost.mul_(problem.inverses[g].scale), 2 * problem.exponent))
        after, removed = _together(weights), _together(gone)
        self._spent[int(torch.count_nonzero(removed))] = torch.stack(spent)
        return Choice(removed, problem.restored(after, removed, zeroed=True))

    def choose_masked(self) -> Choice:
        """See :class:`Method`."""
        return self.choose(int(self.problem.masked().sum()) / self.problem.total, "layer")

    def costs(self, removed: Tensor, scope: str) -> Costs | None:
        """See :class:`Method`. There is no curve: the mask is chosen for one number of removals."""
        spent = self._spent.get(int(torch.count_nonzero(removed)))
        if spent is None:
            return None
        return Costs(error_of_nothing(self.problem) + float(spent.sum()), rows=spent)

    def _budgets(self, total: int, units: int) -> Tensor:
        """(G,) int64: each group's part of ``total`` removals, in proportion to its free units;
        what the mask removes comes first. Every group has ``units``."""
        problem = self.problem
        forced = torch.zeros(len(problem.before), dtype=torch.int64)
        if problem.mask is not None:
            forced = (~problem.mask).sum((1, 2)).cpu() // self.pattern.unit
        spare = total - int(forced.sum())
        if spare < 0:
            raise problem.over_masked()
        free = (units - forced).cumsum(0)
        ends = forced.cumsum(0) + spare * free // free[-1].clamp_min(1)
        return ends.diff(prepend=torch.zeros(1, dtype=torch.int64))

    def _sweep(self, g: int, W: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Sweep W (R, D) in place; what is removed, and what that cost in each row (R,) float64, in
        units of W. ``budget`` is the number of removals: one for all rows together, or one for
        each."""
        problem, pattern = self.problem, self.pattern
        (R, D), C = W.shape, problem.candidates
        before = problem.before[g][:, :C]
        zero = before == 0
        some_zero = bool(zero.any())
        forced = None
        if problem.mask is not None:
            forced = torch.zeros_like(before, dtype=torch.bool)
            forced[:, : problem.in_features] = ~problem.mask[g]
        spread = _Spread(budget.to(W.device), R, C, forced, pattern.unit)
        if bool((spread.spare < 0).any()):
            raise problem.over_masked()
        removed = torch.empty(R, D, dtype=torch.bool, device=W.device)
        spent = torch.zeros(R, dtype=torch.float64, device=W.device)
        inverse = problem.inverses[g]
        factor: LowRankSweep | FactorSweep
        if isinstance(inverse, FewSamples):
            factor = LowRankSweep(inverse, W)
        else:
            factor = FactorSweep(inverse.factor(), W)
        for begin, end in itertools.pairwise(self.cuts):
            block, inside = slice(begin, end), slice(begin, min(end, C))
            part, u = W[:, block], factor.enter(block)
            E = torch.empty(R, end - begin, dtype=W.dtype, device=W.device)
            code = torch.zeros(R, end - begin, dtype=torch.uint8, device=W.device)
            first = None if forced is None else forced[:, inside]
            empty = zero[:, inside] if some_zero and bool(zero[:, inside].any()) else None
            group, per_group = 0, 0
            if begin < C and pattern.is_grouped:
                group, per_group = pattern.group, pattern.per_group
                if first is not None or empty is not None:
                    none = torch.zeros_like(code, dtype=torch.bool)
                    first, empty = (none if x is None else x for x in (first, empty))
                    code.copy_(goes_first(first, empty, group, per_group))
            elif begin < C:
                width = min(end, C) - begin
                score = (part[:, :width] / u.diagonal()[:width]).to(torch.float64).square_()
                if empty is not None:
                    score.masked_fill_(empty, ZERO)
                if first is not None:
                    score.masked_fill_(first, FORCED)
                count = spread.take(slice(begin // pattern.unit, min(end, C) // pattern.unit))
                code[:, :width] = self._lowest(score, count)
            ops.sweep_block_(
                part,
                u,
                code,
                E,
                group=group,
                per_group=per_group,
                backend=problem.workspace.backend,
            )
            removed[:, block] = code.view(torch.bool)
            spent += torch.linalg.vector_norm(E, dim=1, dtype=torch.float64).square_()
            if end < D:
                factor.leave(E, block)
        return removed, spent

    def _lowest(self, score: Tensor, count: Tensor) -> Tensor:
        """Bool like score (R, B): the ``count`` lowest of all, or of each row, in whole units."""
        backend = self.problem.workspace.backend
        score = self.pattern.unit_scores(score)
        if len(count) == 1:
            chosen = ops.rank_lowest(score.reshape(1, -1), int(count), backend=backend)
        elif bool((count == count[0]).all()):
            chosen = ops.rank_lowest(score, int(count[0]), backend=backend)
        else:
            chosen = score.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
        return self.pattern.expand(chosen.view_as(score))


class _Spread:
    """Divides a number of removals among blocks of columns, in proportion to the free units of
    each, so that they add up exactly; what the mask removes comes first and counts."""

    def __init__(
        self, budget: Tensor, rows: int, columns: int, forced: Tensor | None, unit: int
    ) -> None:
        by_row = len(budget) > 1
        units = columns // unit
        if forced is None:
            demanded = torch.zeros(1, units, dtype=torch.int64, device=budget.device)
        elif by_row:
            demanded = forced[:, ::unit].to(torch.int64)
        else:
            demanded = forced[:, ::unit].sum(0, keepdim=True)
        # (R or 1, units + 1): what the mask removes before each unit
        self.demanded = torch.nn.functional.pad(demanded.cumsum(1), (1, 0))
        self.each = 1 if by_row else rows  # weights that a unit stands for
        self.spare = budget - self.demanded[:, -1]  # negative: the mask removes more
        self.free = (units * self.each - self.demanded[:, -1]).clamp_min(1)

    def take(self, units: slice) -> Tensor:
        """Removals among these columns (units): one number, or one per row."""

        def until(end: int) -> Tensor:
            demanded = self.demanded[:, end]
            seen = end * self.each - demanded
            return demanded + (2 * self.spare * seen + self.free) // (2 * self.free)

        return until(units.stop) - until(units.start)


def _together(groups: list[Tensor]) -> Tensor:
    """(G, R, D) of G times (R, D), without a copy where there is one."""
    return groups[0][None] if len(groups) == 1 else torch.stack(groups)
