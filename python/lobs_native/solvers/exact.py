"""Method "exact": true Optimal Brain Surgeon, one weight (or block) of a row at a time.

A trace of every row, its order of removal and what each removal cost, answers for every sparsity:
a row's own prefix, or, over a whole layer, all removals whose running maximum of costs stays below
one threshold. The weights follow from the mask alone, by one solve per row.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.costs import Costs, along, curve_of
from lobs_native.solvers.extent import Extent, Flops, MemoryPlan
from lobs_native.solvers.measurement import error_of_nothing
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.removals import ROWS_TOGETHER, Removals, rows_together

__all__ = ["Exact"]

_SAMPLE = 32  # rows of a layer that say how far the others must be traced, at least
_MARGIN = 1.02  # how much further than that they are


class Exact(Method):
    """Traces the rows of a problem as far as a choice requires, and cuts them.

    Importances count where rows are compared. Source: Hassibi & Stork 1993; Frantar, Singh &
    Alistarh 2022 (ExactOBS).
    """

    compares_layers = True

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        super().__init__(problem, pattern, importance)
        self.removals = Removals(problem, pattern, importance)
        # Of the latest choice that was made without a trace, for its costs:
        self._spent: Tensor | None = None  # (L,) float64, of the k-th removals of all rows together
        self._removed = torch.zeros(0, dtype=torch.int64)  # (L,) how many rows have a k-th

    # ---- plans -----------------------------------------------------------------------------------

    @classmethod
    def memory(
        cls, extent: Extent, *, limit: int | None = None, backend: str | None = None
    ) -> MemoryPlan:
        """See :class:`Method`: as many rows at a time as the limit allows, and the trace."""
        plan = super().memory(extent, limit=limit, backend=backend)
        D, kernel = extent.order, extent.kernel
        most = min(plan.rows, rows_together(backend or "cpu"))
        threads = ops.affordable_threads(D, kernel, rows=most, memory=limit, backend=backend)
        longest = min(D, round(1.5 * extent.share * D) + 1)  # rows of a layer differ in length
        return dataclasses.replace(
            plan,
            threads=threads,
            scratch=threads * ops.exact_bytes(D, kernel, backend=backend),
            trace=plan.rows * longest * (4 + kernel.itemsize),
        )

    @classmethod
    def least_scratch(cls, extent: Extent, backend: str | None) -> int:
        """See :class:`Method`."""
        return ops.exact_bytes(extent.order, extent.kernel, backend=backend)

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`."""
        return super().flops(extent) + cls.flops_by_row(extent)

    @classmethod
    def flops_by_row(cls, extent: Extent) -> Flops:
        """See :class:`Method`: a row that loses k of D weights takes ``D k^2 - 2 k^3 / 3``, and its
        repair the cube of what it keeps or loses."""
        rows, D = extent.groups * extent.rows, extent.order
        k = D * extent.share
        return Flops(
            single=rows * 2 * min(k, D - k) ** 3 / 3,
            removal=(2 if extent.shared else 1) * rows * (D * k**2 - 2 * k**3 / 3),
        )

    # ---- choices ---------------------------------------------------------------------------------

    def choose(self, share: float, scope: str) -> Choice:
        """See :class:`Method`. Scope "layer" takes the cheapest removals of the whole layer."""
        problem, removals, unit = self.problem, self.removals, self.pattern.unit
        if self.pattern.is_grouped:
            if bool((removals.complete == math.inf).all()):
                return Choice(removals.cut(removals.count))
            return self._straight(problem.order)
        if scope == "row":
            units = nearest_count(share, problem.candidates // unit)
            if units == 0:
                return self._nothing()
            if bool((removals.count >= units * unit).all()):  # traced already
                return Choice(removals.cut(torch.full_like(removals.count, units * unit)))
            return self._straight(units * unit)
        units = nearest_count(share, problem.total // unit)
        if units == 0:
            return self._nothing()
        self._reach(units)
        ceilings = removals.ceilings()
        backend = "reference" if problem.workspace.backend == "reference" else "cpu"
        chosen = ops.rank_lowest(ceilings.reshape(1, -1), units, backend=backend)[0]
        return Choice(removals.cut(chosen.view_as(ceilings).sum(1) * unit))

    def prepare(self) -> None:
        """See :class:`Method`."""
        self.removals.trace_all(self.problem.order)

    def cheapest(self, units: int) -> tuple[Tensor, float]:
        """See :class:`Method`; a removal costs its row's running maximum."""
        unit_cost = self.removals.unit_cost()
        if not units:
            return torch.empty(0, dtype=torch.float64), unit_cost
        self._reach(units)
        return self.removals.ceilings().reshape(-1).sort().values[:units], unit_cost

    def _nothing(self) -> Choice:
        before = self.problem.before
        return Choice(torch.zeros_like(before, dtype=torch.bool), before.clone())

    def _straight(self, limit: int) -> Choice:
        removed, after, self._spent, self._removed = self.removals.straight(limit)
        return Choice(removed, after)

    # ---- costs -----------------------------------------------------------------------------------

    def curve(self, scope: str) -> tuple[Tensor, Tensor]:
        """Sparsity and error, (P,) float64 each, as far as every row was traced."""
        removals, unit = self.removals, self.pattern.unit
        cost = removals.costs(torch.arange(len(removals.count)))
        if scope == "row":
            common = int(removals.count.min()) // unit
            each = cost[:, :common].sum(0)
            removed = torch.arange(common + 1, dtype=torch.float64) * len(cost)
        else:
            ceiling = removals.ceilings().reshape(-1)
            known = float(removals.complete.min())
            ranked, place = ceiling.sort(stable=True)
            upto = int(((ranked <= known) & torch.isfinite(ranked)).sum())
            each = cost.reshape(-1)[place[:upto]]
            removed = torch.arange(upto + 1, dtype=torch.float64)
        error = torch.nn.functional.pad(each.cumsum(0), (1, 0)) * removals.unit_cost()
        return removed * unit / self.problem.total, error

    def costs(self, removed: Tensor, scope: str) -> Costs | None:
        """See :class:`Method`: what the trace says about a cut, with a curve."""
        problem, unit_cost = self.problem, self.removals.unit_cost()
        total = int(removed.sum())
        if total == 0:
            return Costs(error_of_nothing(problem))
        if unit_cost == math.inf:
            return Costs(unit_cost)
        if self._spent is not None and int(self._removed.sum()) == total:
            return self._costs_without_trace(self._spent, total / problem.total)
        count = removed.sum(2).reshape(-1).cpu()
        if bool((count > self.removals.count).any()):
            return None
        by_row = scope == "row" or self.pattern.is_grouped
        return self._costs_of_cut(count, total / problem.total, by_row=by_row)

    def _costs_without_trace(self, spent: Tensor, chosen: float) -> Costs:
        """Of the latest straight removal; ``chosen`` is its sparsity."""
        problem, unit = self.problem, self.pattern.unit
        start, unit_cost = error_of_nothing(problem), self.removals.unit_cost()
        error = start + torch.nn.functional.pad(spent.cumsum(0), (1, 0)) * unit_cost
        removed = torch.nn.functional.pad(self._removed.cumsum(0), (1, 0))[::unit]
        pick = along(len(removed), chosen)
        sparsity = removed[pick].to(torch.float64) / problem.total
        return curve_of(float(error[-1]), chosen, sparsity, error[::unit][pick])

    def _costs_of_cut(self, count: Tensor, chosen: float, *, by_row: bool) -> Costs:
        """Of the first count[r] removals of each row (N,); the curve goes through cuts at one count
        (``by_row``) or at one running maximum of costs."""
        problem, removals, unit = self.problem, self.removals, self.pattern.unit
        stops = None if by_row else self._stops()
        common = int(removals.count.min()) // unit
        steps = along(common + 1, common * unit * len(count) / problem.total)
        spent = removed = torch.zeros((), dtype=torch.float64)
        for some in torch.arange(len(count)).split(ROWS_TOGETHER):
            if stops is None:
                place = steps.repeat(len(some), 1)
            else:
                within = stops.repeat(len(some), 1)
                place = torch.searchsorted(removals.ceilings(some), within, right=True)
            place = torch.cat([place, count[some, None] // unit], 1)  # (n, P + 1)
            upto = torch.nn.functional.pad(removals.own_costs(some).cumsum(1), (1, 0))
            spent = spent + upto.gather(1, place).sum(0)
            removed = removed + place.sum(0)
        error = error_of_nothing(problem) + spent * removals.unit_cost()
        sparsity = removed * unit / problem.total
        return curve_of(float(error[-1]), chosen, sparsity[:-1], error[:-1])

    def _stops(self) -> Tensor:
        """(P,) float64, rising: running maxima of costs, as far as every row was traced, which cut
        the layer at points of a curve; by a sample of the rows."""
        removals = self.removals
        known = float(removals.complete.min())
        some = torch.linspace(0, len(removals.count) - 1, 2 * _SAMPLE).round().long().unique()
        ceiling = removals.ceilings(some)
        ranked = ceiling[torch.isfinite(ceiling) & (ceiling <= known)].sort().values
        share = len(ranked) * self.pattern.unit / (len(some) * self.problem.candidates)
        nothing = torch.tensor([-2.0], dtype=torch.float64)
        return torch.cat([nothing, ranked])[along(len(ranked) + 1, share)]

    # ---- how far to trace ------------------------------------------------------------------------

    def _reach(self, units: int) -> None:
        """Trace far enough that the ``units`` cheapest removals of the layer are known.

        A sample of rows tells at which cost they will end; all rows are traced that far and a
        little further. Where that turns out too short, those that ended there are traced again,
        further.
        """
        removals, order = self.removals, self.problem.order
        total = self.problem.total // self.pattern.unit
        if units > 0.8 * total:
            removals.trace_all(order)
        else:
            self._sample(math.ceil(1.5 * units / total * order) + 2 * self.pattern.unit)
        factor = _MARGIN
        while True:
            stop = self._quantile(factor * units)
            removals.trace((removals.complete < stop).nonzero()[:, 0], order, stop)
            ceiling = removals.ceilings()
            available = int(((ceiling <= stop) & torch.isfinite(ceiling)).sum())
            if available >= units or stop == math.inf:
                return
            factor *= 1.1 * units / max(available, 1)

    def _sample(self, limit: int) -> None:
        """Trace some rows, spread over the range of costs; all of them where there are few."""
        removals, order = self.removals, self.problem.order
        N = len(removals.count)
        if N <= 2 * _SAMPLE:
            removals.trace_all(order)
            return
        few = max(_SAMPLE, N // 24)
        energy = []
        for g, (inverse, scale) in enumerate(
            zip(self.problem.inverses, removals.scale, strict=True)
        ):
            w = removals.working(g)
            energy.append(w.square_() @ (scale / inverse.A.diagonal()).to(w.dtype))
        spread = (torch.arange(few, dtype=torch.float64) + 0.5) * (N / few)
        chosen = torch.cat(energy).cpu().argsort(stable=True)[spread.long()]
        removals.trace(chosen[removals.count[chosen] < limit], min(limit, order), math.inf)

    def _quantile(self, units: float) -> float:
        """The running maximum below which about ``units`` removals lie, judged by the rows that
        have been traced; infinity where they do not tell."""
        known = self.removals.count > 0
        ceiling = self.removals.ceilings(known.nonzero()[:, 0]).reshape(-1)
        ranked = ceiling[torch.isfinite(ceiling)].sort().values
        at = max(0, math.ceil(units * int(known.sum()) / len(known)) - 1)
        return max(0.0, float(ranked[at])) if at < len(ranked) else math.inf
