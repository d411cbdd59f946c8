"""The order and the cost of exact removals, row by row, as far as rows have been traced.

Rows are independent: one trace of every row answers for every sparsity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem, in_errors

__all__ = ["ROWS_TOGETHER", "Removals", "rows_together"]

ROWS_TOGETHER = 1024  # in one call of the kernel, so that its results stay small
_ON_DEVICE = 8 * ROWS_TOGETHER  # there, so that few rows are the last to end
_LEAST_IMPORTANCE = 1e-6  # of a row, relative to the mean: its weights must not vanish


class Removals:
    """Removals from the N = G * R rows of a problem: the first ``count[r]`` of row r are known.

    ``importance`` (G, R) multiplies what a row's removals cost, where rows are compared.

    Attributes
    ----------
    order : (N, L) int32
        Columns in order of removal; -1 past ``count``.
    loss : (N, L) float32 or float64
        What each removal cost, in the row's own unit: times ``row_scale`` (N, 1) and ``unit_cost``
        it is an error. A block's cost is spread over its columns.
    count : (N,) int64
    complete : (N,) float64
        Every removal of the row whose running maximum of costs is at most this is known.
    first : (N,) int64
        Removals that the mask demands.
    """

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        self.problem = problem
        self.pattern = pattern
        G, R, _ = problem.before.shape
        self._state = _states(problem)
        self.first = (
            torch.zeros(G * R, dtype=torch.int64)
            if self._state is None
            else (self._state == ops.WeightState.GOES_FIRST).sum(1).cpu()
        )
        self._most = problem.candidates  # removals that a row can have
        if pattern.is_grouped:
            self._most = problem.in_features // pattern.group * pattern.per_group
        # A row's weights times a number have costs times its square, in the same order.
        self._factor: Tensor | None = None  # (G, R)
        if importance is not None and float(importance.max()) > 0:
            relative = (importance / importance.mean()).clamp_min(_LEAST_IMPORTANCE)
            self._factor = relative.sqrt().to(problem.before.device)
        # Costs are w**2 / A_qq times this, for working weights and the inverse of H / scale.
        common = max(i.scale for i in problem.inverses)
        self.scale = [i.scale / common for i in problem.inverses]
        self._common = common
        each = torch.tensor(self.scale, dtype=torch.float64)
        self.row_scale = each.repeat_interleave(R)[:, None]
        self.order = torch.empty(G * R, 0, dtype=torch.int32)
        self.loss = torch.empty(G * R, 0, dtype=problem.dtype)
        self.count = torch.zeros(G * R, dtype=torch.int64)
        self.complete = torch.full((G * R,), -math.inf, dtype=torch.float64)

    def unit_cost(self) -> float:
        """One unit of ``loss`` in tr(dW H dW^T); infinite beyond float64."""
        return in_errors(self._common, self.problem.exponent)

    def working(
        self, g: int, dtype: torch.dtype | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """:meth:`Problem.working`, times the roots of the rows' importances."""
        w = self.problem.working(g, dtype, rows)
        if self._factor is None:
            return w
        factor = self._factor[g] if rows is None else self._factor[g][rows.to(w.device)]
        return w.mul_(factor[:, None].to(w.dtype))

    # ---- tracing ---------------------------------------------------------------------------------

    def trace_all(self, limit: int) -> None:
        """Trace every row to ``limit`` removals, or to its end."""
        todo = ((self.count < limit) & (self.complete < math.inf)).nonzero()[:, 0]
        self.trace(todo, limit, math.inf)

    def trace(self, todo: Tensor, limit: int, stop: float) -> None:
        """Trace the rows ``todo`` (indices) from their start, to ``limit`` removals or the cost
        ``stop``."""
        R = self.problem.before.shape[1]
        for g in range(self.problem.before.shape[0]):
            in_group = todo[(todo >= g * R) & (todo < (g + 1) * R)]
            for some in in_group.split(rows_together(self.problem.workspace.backend)):
                order, loss, count, _ = self._run(
                    g, some, limit, stop / self.scale[g], update=False
                )
                self._keep(some, order, loss, count)
                self._note_complete(some, limit, stop)

    def straight(self, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same number of removals from every row, by a kernel that repairs on its way.

        Nothing of it is kept here. Returns what is removed (G, R, D), the weights (G, R, D), and
        for the k-th removals of all rows together their cost (limit,) and number (limit,).
        """
        G, R, _ = self.problem.before.shape
        after = torch.empty_like(self.problem.before, dtype=self.problem.dtype)
        removed = torch.zeros_like(after, dtype=torch.bool)
        spent = torch.zeros(limit, dtype=torch.float64)
        count = torch.zeros(limit, dtype=torch.int64)
        together = rows_together(self.problem.workspace.backend)
        for g in range(G):
            for within in torch.arange(R).split(together):
                order, loss, _, weights = self._run(g, within + g * R, limit, math.inf, update=True)
                removed[g, within] = self._marked(order)
                after[g, within] = weights
                spent += loss.sum(0, dtype=torch.float64) * self.scale[g]
                count += (order >= 0).sum(0)
        return removed, self.problem.restored(after, removed), spent, count

    def _keep(self, some: Tensor, order: Tensor, loss: Tensor, count: Tensor) -> None:
        longest = int(count.max()) if len(count) else 0
        more = longest - self.order.shape[1]
        if more > 0:
            self.order = torch.nn.functional.pad(self.order, (0, more), value=-1)
            self.loss = torch.nn.functional.pad(self.loss, (0, more))
        pad = self.order.shape[1] - longest
        order, loss = order[:, :longest], loss[:, :longest].to(self.loss.dtype)
        self.order[some] = torch.nn.functional.pad(order, (0, pad), value=-1)
        self.loss[some] = torch.nn.functional.pad(loss, (0, pad))
        self.count[some] = count

    def _note_complete(self, some: Tensor, limit: int, stop: float) -> None:
        """A row that ended by itself is complete up to ``stop``; one that was cut off by the limit,
        just short of its running maximum."""
        unit, count = self.pattern.unit, self.count[some]
        ceiling = self.ceilings(some)
        ceiling = torch.where(torch.isfinite(ceiling), ceiling, -math.inf)
        short = ceiling.amax(1) if ceiling.shape[1] else torch.full((len(some),), -math.inf)
        short = short.to(torch.float64)
        short = torch.nextafter(short, torch.full_like(short, -math.inf))
        complete = torch.where(count + unit <= limit, stop, short)
        self.complete[some] = complete.masked_fill_(count + unit > self._most, math.inf)

    def _run(
        self, g: int, rows: Tensor, limit: int, stop: float, *, update: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order, loss, count and weights of some rows of group g, of which each of the processes
        that share them does its own; rows that float32 loses are redone in float64."""
        problem, pattern = self.problem, self.pattern
        shared, every = problem.workspace.rows, len(rows)
        rows = rows[shared.own(every)]
        within = rows - g * problem.before.shape[1]
        working = problem.working if update else self.working
        W = working(g, rows=within)
        state = None if self._state is None else self._state[rows].contiguous()

        def run(W: Tensor, state: Tensor | None) -> ops.Trace:
            return ops.exact_trace(
                W,
                problem.inverses[g].A.to(W.dtype),
                state=state,
                limit=limit,
                stop=stop,
                block=pattern.unit,
                group=pattern.group,
                per_group=pattern.per_group,
                update=update,
                memory=problem.workspace.memory,
                backend=problem.workspace.backend,
            )

        trace = run(W, state)
        order, loss, count = trace.order, trace.loss, trace.count
        lost = trace.lost.cpu().nonzero()[:, 0]  # like ``rows``
        widened: list[int] = []
        if len(lost) and not problem.precise:
            wide = working(g, torch.float64, within[lost])
            again = run(wide, None if state is None else state[lost].contiguous())
            order[lost], count[lost] = again.order, again.count
            loss[lost] = again.loss.to(loss.dtype)
            if update:
                W[lost] = wide.to(W.dtype)
            widened = rows[lost].tolist()
            lost = lost[again.lost.cpu()]
        if len(lost):
            raise NotPositiveDefiniteError(
                f"hessian: rounding in float64 left no positive pivot in row {int(within[lost[0]])}"
                f" after {int(count[lost[0]])} removals, with damping {problem.damping:g}; pass a "
                "larger damping (0.01 is usual)"
            )
        for some in shared.values(widened):
            problem.workspace.widened.update(some)
        order, loss, count = (shared.joined(x.cpu(), every) for x in (order, loss, count))
        return order, loss, count, shared.joined(W, every) if update else W

    # ---- what is known ---------------------------------------------------------------------------

    def costs(self, rows: Tensor) -> Tensor:
        """(len(rows), U) float64: what each removal (unit of the pattern) cost, in the layer's
        common unit."""
        loss, unit = self.loss[rows].to(torch.float64), self.pattern.unit
        if unit > 1:
            units = loss.shape[1] // unit
            loss = loss[:, : units * unit].reshape(len(loss), units, unit).sum(2)
        return loss * self.row_scale[rows]

    def own_costs(self, rows: Tensor) -> Tensor:
        """:meth:`costs` without the rows' importances."""
        costs = self.costs(rows)
        if self._factor is not None:
            costs /= self._factor.reshape(-1, 1).cpu()[rows].to(torch.float64) ** 2
        return costs

    def ceilings(self, some: Tensor | None = None) -> Tensor:
        """(N, U) float64: the running maximum of the costs of each row's removals (units).

        -1 for those that the mask demands, infinite past a row's end. ``some`` picks rows.
        """
        pick = torch.arange(len(self.count)) if some is None else some
        unit = self.pattern.unit
        units = self.loss.shape[1] // unit
        out = torch.empty(len(pick), units, dtype=torch.float64)
        if not units:
            return out
        place = torch.arange(units)
        for at in torch.arange(len(pick)).split(ROWS_TOGETHER):
            rows = pick[at]
            cost = self.costs(rows)
            cost.masked_fill_(place < (self.first[rows] // unit)[:, None], -1.0)
            ceiling = cost.cummax(1).values
            ended = place >= (self.count[rows] // unit)[:, None]
            out[at] = ceiling.masked_fill_(ended, torch.inf)
        return out

    def cut(self, counts: Tensor) -> Tensor:
        """Bool (G, R, D): the first counts[r] columns of each row's order."""
        place = torch.arange(self.order.shape[1])
        order = torch.where(place < counts[:, None], self.order, -1)
        return self._marked(order).view(self.problem.before.shape)

    def _marked(self, order: Tensor) -> Tensor:
        D = self.problem.order
        marked = torch.zeros(len(order), D + 1, dtype=torch.bool)
        marked.scatter_(1, torch.where(order < 0, D, order).long(), True)
        return marked[:, :D].to(self.problem.before.device)


def rows_together(backend: str) -> int:
    """Rows that one call of a backend's kernel gets."""
    return _ON_DEVICE if ops.on_device(backend) else ROWS_TOGETHER


def _states(problem: Problem) -> Tensor | None:
    """(N, D) uint8: which weights are removed first and which stay; None where all are alike."""
    if problem.mask is None and not problem.bias_stays:
        return None
    state = problem.masked().to(torch.uint8) * ops.WeightState.GOES_FIRST
    if problem.bias_stays:
        state[:, :, -1] = ops.WeightState.STAYS
    return state.reshape(-1, problem.order)
