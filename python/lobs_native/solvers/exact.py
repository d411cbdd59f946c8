"""Method "exact": true Optimal Brain Surgeon, one weight (or block) of a row at a time.

Rows are independent, so one trace of every row, its order of removal and what each removal cost,
answers for every sparsity: a row's own prefix, or, over a whole layer, all removals whose running
maximum of costs stays below one threshold. The weights follow from the set alone, by one solve per
row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.solvers.costs import Costs, along, curve_of
from lobs_native.solvers.patterns import Blocks, GroupsOf, Pattern
from lobs_native.solvers.problem import Problem, in_errors, nearest_count

__all__ = ["Greedy", "rows_together"]

_SAMPLE = 32  # rows of a layer that say how far the others must go, at least
_MARGIN = 1.02  # how much further than that they go
_TOGETHER = 1024  # rows in one call of the kernel, so that its results stay small
_LEAST_IMPORTANCE = 1e-6  # of a row, relative to the mean: its weights must not vanish
_ON_DEVICE = 8 * _TOGETHER  # there, so that few rows are the last to end


@dataclass
class _Rows:
    """What is known of all G * R rows: the first count[r] entries of row r."""

    order: Tensor  # (N, L) int32
    loss: Tensor  # (N, L) float32 or float64, what each removal cost in the row's own unit
    count: Tensor  # (N,) int64
    complete: Tensor  # (N,) float64: every removal whose running maximum is at most this is known


class Greedy:
    """Traces the rows of a problem as far as they are asked for, and cuts them.

    ``importance`` (G, R) multiplies what a row's removals cost, where rows are compared.
    """

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        self.problem = problem
        self.pattern = pattern
        G, R, D = problem.before.shape
        self.unit = pattern.size if isinstance(pattern, Blocks) else 1
        self.group = pattern.size if isinstance(pattern, GroupsOf) else 0
        self.per_group = pattern.size - pattern.keep if isinstance(pattern, GroupsOf) else 0
        self.state: Tensor | None = None  # (N, D) uint8
        stays = problem.bias_dtype is not None and not problem.prune_bias
        if problem.mask is not None or stays:
            state = torch.zeros(G, R, D, dtype=torch.uint8, device=problem.before.device)
            if problem.mask is not None:
                state[:, :, : problem.columns][~problem.mask] = 1
            if stays:
                state[:, :, -1] = 2
            self.state = state.reshape(G * R, D)
        self.first = (
            torch.zeros(G * R, dtype=torch.int64)
            if self.state is None
            else (self.state == 1).sum(1).cpu()
        )  # (N,) removals that the mask demands
        self._most = problem.candidates  # removals that a row can have
        if self.group:
            self._most = problem.columns // self.group * self.per_group
        # A row's weights times a number have costs times its square, in the same order.
        self._factor: Tensor | None = None  # (G, R)
        if importance is not None and float(importance.max()) > 0:
            relative = (importance / importance.mean()).clamp_min(_LEAST_IMPORTANCE)
            self._factor = relative.sqrt().to(problem.before.device)
        self._spent: Tensor | None = None  # (L,) float64, of the k-th removals of all rows together
        self._gone = torch.zeros(0, dtype=torch.int64)  # (L,) how many rows have one
        # Costs are w**2 / A_qq times this, for working weights and the inverse of H / scale.
        common = max(i.scale for i in problem.inverses)
        self.scale = [i.scale / common for i in problem.inverses]
        self.common = common
        each = torch.tensor(self.scale, dtype=torch.float64)
        self.row_scale = each.repeat_interleave(R)[:, None]  # (N, 1)
        self.rows = _Rows(
            order=torch.empty(G * R, 0, dtype=torch.int32),
            loss=torch.empty(G * R, 0, dtype=problem.dtype),
            count=torch.zeros(G * R, dtype=torch.int64),
            complete=torch.full((G * R,), -math.inf, dtype=torch.float64),
        )

    def _working(
        self, g: int, dtype: torch.dtype | None = None, rows: Tensor | None = None
    ) -> Tensor:
        w = self.problem.working(g, dtype, rows)
        if self._factor is None:
            return w
        factor = self._factor[g] if rows is None else self._factor[g][rows.to(w.device)]
        return w.mul_(factor[:, None].to(w.dtype))

    # ---- how far ---------------------------------------------------------------------------------

    def prune(self, share: float, scope: str) -> tuple[Tensor, Tensor]:
        """Bool (G, R, D) of what goes, and the weights (G, R, D) that are left.

        Scope "layer" takes the cheapest removals of the whole layer, "row" as many in every row.
        """
        G, R, _ = self.problem.before.shape
        if self.group:
            if bool((self.rows.complete == math.inf).all()):
                gone = self.cut(self.rows.count)
                return gone, self.problem.best(gone)
            return self._straight(self.width)
        if scope == "row":
            units = nearest_count(share, self.problem.candidates // self.unit)
            if units == 0:
                return self._nothing()
            if bool((self.rows.count >= units * self.unit).all()):  # traced already
                gone = self.cut(torch.full((G * R,), units * self.unit))
                return gone, self.problem.best(gone)
            return self._straight(units * self.unit)
        units = nearest_count(share, self.problem.total // self.unit)
        if units == 0:
            return self._nothing()
        self._reach(units)
        ceilings = self.ceilings()
        backend = "reference" if self.problem.backend == "reference" else "cpu"
        chosen = ops.rank_lowest(ceilings.reshape(1, -1), units, backend=backend)[0]
        gone = self.cut(chosen.view_as(ceilings).sum(1) * self.unit)
        return gone, self.problem.best(gone)

    @property
    def width(self) -> int:
        """D: columns of a row, a bias included."""
        return self.problem.before.shape[2]

    @property
    def together(self) -> int:
        """Rows in one call of the kernel."""
        return rows_together(self.problem.backend)

    @property
    def sparsity(self) -> float:
        """What an N:M pattern removes; 0 without one."""
        return self.per_group / self.group if self.group else 0.0

    def curve(self, scope: str) -> tuple[Tensor, Tensor]:
        """Sparsity and error, (P,) float64 each, as far as every row was traced."""
        rows = self.rows
        cost = self._unit_costs(torch.arange(len(rows.count)))
        if scope == "row":
            common = int(rows.count.min()) // self.unit
            each = cost[:, :common].sum(0)
            removed = torch.arange(common + 1, dtype=torch.float64) * len(cost)
        else:
            ceiling = self.ceilings().reshape(-1)
            known = float(rows.complete.min())
            ranked, place = ceiling.sort(stable=True)
            upto = int(((ranked <= known) & torch.isfinite(ranked)).sum())
            each = cost.reshape(-1)[place[:upto]]
            removed = torch.arange(upto + 1, dtype=torch.float64)
        error = torch.nn.functional.pad(each.cumsum(0), (1, 0)) * self.unit_cost()
        return removed * self.unit / self.problem.total, error

    def costs(self, gone: Tensor, scope: str) -> Costs | None:
        """What the trace says about a cut (G, R, D) that :meth:`prune` made; None for another one
        that it does not reach."""
        problem = self.problem
        chosen, start, unit = int(gone.sum()) / problem.total, problem.least(), self.unit_cost()
        if not bool(gone.any()):
            return Costs(start)
        if unit == math.inf:
            return Costs(unit)
        if self._spent is not None and int(self._gone.sum()) == int(gone.sum()):
            error = start + torch.nn.functional.pad(self._spent.cumsum(0), (1, 0)) * unit
            removed = torch.nn.functional.pad(self._gone.cumsum(0), (1, 0))[:: self.unit]
            pick = along(len(removed), chosen)
            sparsity = removed[pick].to(torch.float64) / problem.total
            return curve_of(float(error[-1]), chosen, sparsity, error[:: self.unit][pick])
        count = gone.sum(2).reshape(-1).cpu()
        if bool((count > self.rows.count).any()):
            return None
        by_row = scope == "row" or bool(self.group)
        stops = None if by_row else self._stops()
        common = int(self.rows.count.min()) // self.unit
        steps = along(common + 1, common * self.unit * len(count) / problem.total)
        spent = removed = torch.zeros((), dtype=torch.float64)
        for some in torch.arange(len(count)).split(_TOGETHER):
            units = self._unit_costs(some)
            if self._factor is not None:
                units /= self._factor.reshape(-1, 1).cpu()[some].to(torch.float64) ** 2
            if stops is None:
                place = steps.repeat(len(some), 1)
            else:
                within = stops.repeat(len(some), 1)
                place = torch.searchsorted(self.ceilings(some), within, right=True)
            place = torch.cat([place, count[some, None] // self.unit], 1)  # (n, P + 1)
            upto = torch.nn.functional.pad(units.cumsum(1), (1, 0))
            spent = spent + upto.gather(1, place).sum(0)
            removed = removed + place.sum(0)
        error, sparsity = start + spent * unit, removed * self.unit / problem.total
        return curve_of(float(error[-1]), chosen, sparsity[:-1], error[:-1])

    def _stops(self) -> Tensor:
        """(P,) float64, rising: running maxima of costs, as far as every row was traced, which cut
        the layer at points of a curve; by a sample of the rows."""
        known = float(self.rows.complete.min())
        some = torch.linspace(0, len(self.rows.count) - 1, 2 * _SAMPLE).round().long().unique()
        ceiling = self.ceilings(some)
        ranked = ceiling[torch.isfinite(ceiling) & (ceiling <= known)].sort().values
        share = len(ranked) * self.unit / (len(some) * self.problem.candidates)
        nothing = torch.tensor([-2.0], dtype=torch.float64)
        return torch.cat([nothing, ranked])[along(len(ranked) + 1, share)]

    def cheapest(self, units: int) -> Tensor:
        """(units,) float64, ascending: what the cheapest removals of the layer cost, each as its
        row's running maximum."""
        if not units:
            return torch.empty(0, dtype=torch.float64)
        self._reach(units)
        return self.ceilings().reshape(-1).sort().values[:units]

    def trace_all(self, limit: int) -> _Rows:
        """Every row traced to ``limit`` removals, or to its end."""
        rows = self.rows
        todo = ((rows.count < limit) & (rows.complete < math.inf)).nonzero()[:, 0]
        self.trace(todo, limit, math.inf)
        return rows

    def unit_cost(self) -> float:
        """What one unit of ``rows.loss`` is in tr(dW H dW^T); infinite beyond float64."""
        return in_errors(self.common, self.problem.exponent)

    # ---- tracing ---------------------------------------------------------------------------------

    def _nothing(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.problem.before, dtype=torch.bool), self.problem.before.clone()

    def _straight(self, limit: int) -> tuple[Tensor, Tensor]:
        """The same number of removals in every row: the kernel repairs the weights on its way."""
        G, R, _ = self.problem.before.shape
        after = torch.empty_like(self.problem.before, dtype=self.problem.dtype)
        gone = torch.zeros_like(after, dtype=torch.bool)
        self._spent = torch.zeros(limit, dtype=torch.float64)
        self._gone = torch.zeros(limit, dtype=torch.int64)
        for g in range(G):
            for within in torch.arange(R).split(self.together):
                order, loss, _, weights = self._run(g, within + g * R, limit, math.inf, update=True)
                gone[g, within] = self._marked(order)
                after[g, within] = weights
                self._spent += loss.sum(0, dtype=torch.float64) * self.scale[g]
                self._gone += (order >= 0).sum(0)
        return gone, self.problem.restored(after, gone)

    def sample(self, limit: int) -> None:
        """Trace some rows, spread over the range of costs; all of them where there are few."""
        N = len(self.first)
        if N <= 2 * _SAMPLE:
            self.trace_all(self.width)
            return
        few = max(_SAMPLE, N // 24)
        energy = []
        for g, (inverse, scale) in enumerate(zip(self.problem.inverses, self.scale, strict=True)):
            w = self._working(g)
            energy.append(w.square_() @ (scale / inverse.A.diagonal()).to(w.dtype))
        spread = (torch.arange(few, dtype=torch.float64) + 0.5) * (N / few)
        chosen = torch.cat(energy).cpu().argsort(stable=True)[spread.long()]
        self.trace(chosen[self.rows.count[chosen] < limit], min(limit, self.width), math.inf)

    def trace(self, todo: Tensor, limit: int, stop: float) -> None:
        """Trace rows ``todo`` (indices) afresh: to ``limit`` removals or the cost ``stop``."""
        R = self.problem.before.shape[1]
        for g in range(self.problem.before.shape[0]):
            mine = todo[(todo >= g * R) & (todo < (g + 1) * R)]
            for some in mine.split(self.together):
                order, loss, count, _ = self._run(
                    g, some, limit, stop / self.scale[g], update=False
                )
                self._keep(some, order, loss, count)
                self._note_complete(some, limit, stop)

    def _keep(self, some: Tensor, order: Tensor, loss: Tensor, count: Tensor) -> None:
        rows = self.rows
        longest = int(count.max()) if len(count) else 0
        more = longest - rows.order.shape[1]
        if more > 0:
            rows.order = torch.nn.functional.pad(rows.order, (0, more), value=-1)
            rows.loss = torch.nn.functional.pad(rows.loss, (0, more))
        pad = rows.order.shape[1] - longest
        order, loss = order[:, :longest], loss[:, :longest].to(rows.loss.dtype)
        rows.order[some] = torch.nn.functional.pad(order, (0, pad), value=-1)
        rows.loss[some] = torch.nn.functional.pad(loss, (0, pad))
        rows.count[some] = count

    def _note_complete(self, some: Tensor, limit: int, stop: float) -> None:
        """A row that ended by itself is complete up to ``stop``; one that was cut off by the limit,
        just short of its running maximum."""
        rows = self.rows
        count = rows.count[some]
        ceiling = self.ceilings(some)
        ceiling = torch.where(torch.isfinite(ceiling), ceiling, -math.inf)
        short = ceiling.amax(1) if ceiling.shape[1] else torch.full((len(some),), -math.inf)
        short = short.to(torch.float64)
        short = torch.nextafter(short, torch.full_like(short, -math.inf))
        complete = torch.where(count + self.unit <= limit, stop, short)
        rows.complete[some] = complete.masked_fill_(count + self.unit > self._most, math.inf)

    def _run(
        self, g: int, rows: Tensor, limit: int, stop: float, *, update: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order, loss, count and weights of some rows of group g; rows that float32 loses are done
        again in float64."""
        problem = self.problem
        within = rows - g * problem.before.shape[1]
        working = problem.working if update else self._working
        W = working(g, rows=within)
        state = None if self.state is None else self.state[rows].contiguous()

        def run(W: Tensor, state: Tensor | None) -> ops.Trace:
            return ops.exact_trace(
                W,
                problem.inverses[g].A.to(W.dtype),
                state=state,
                limit=limit,
                stop=stop,
                block=self.unit,
                group=self.group,
                per_group=self.per_group,
                update=update,
                memory=problem.memory,
                backend=problem.backend,
            )

        found = run(W, state)
        order, loss, count = found.order, found.loss, found.count
        lost = found.lost.cpu().nonzero()[:, 0]  # like ``rows``
        if len(lost) and not problem.precise:
            wide = working(g, torch.float64, within[lost])
            again = run(wide, None if state is None else state[lost].contiguous())
            order[lost], count[lost] = again.order, again.count
            loss[lost] = again.loss.to(loss.dtype)
            if update:
                W[lost] = wide.to(W.dtype)
            problem.widened.update(rows[lost].tolist())
            lost = lost[again.lost.cpu()]
        if len(lost):
            raise NotPositiveDefiniteError(
                f"hessian: rounding in float64 left no positive pivot in row {int(within[lost[0]])}"
                f" after {int(count[lost[0]])} removals, with damping {problem.damping:g}; pass a "
                "larger damping (0.01 is usual)"
            )
        return order.cpu(), loss.cpu(), count.cpu(), W

    def _reach(self, units: int) -> None:
        """Trace far enough that the ``units`` cheapest removals of the layer are known.

        A sample of rows tells at which cost they will end; all rows go that far and a little
        further. Where that turns out too short, those that ended there go again, further.
        """
        total = self.problem.total // self.unit
        if units > 0.8 * total:
            self.trace_all(self.width)
        else:
            self.sample(math.ceil(1.5 * units / total * self.width) + 2 * self.unit)
        factor = _MARGIN
        while True:
            stop = self._quantile(factor * units)
            self.trace((self.rows.complete < stop).nonzero()[:, 0], self.width, stop)
            ceiling = self.ceilings()
            available = int(((ceiling <= stop) & torch.isfinite(ceiling)).sum())
            if available >= units or stop == math.inf:
                return
            factor *= 1.1 * units / max(available, 1)

    def _quantile(self, units: float) -> float:
        """The running maximum below which about ``units`` removals lie, judged by the rows that
        have been traced; infinity where they do not tell."""
        known = self.rows.count > 0
        ceiling = self.ceilings(known.nonzero()[:, 0]).reshape(-1)
        ranked = ceiling[torch.isfinite(ceiling)].sort().values
        at = max(0, math.ceil(units * int(known.sum()) / len(known)) - 1)
        return max(0.0, float(ranked[at])) if at < len(ranked) else math.inf

    # ---- cutting ---------------------------------------------------------------------------------

    def ceilings(self, some: Tensor | None = None) -> Tensor:
        """(N, U) float64: the running maximum of the costs of each row's removals (blocks).

        -1 for those that the mask demands, infinite past a row's end. ``some`` picks rows.
        """
        pick = torch.arange(len(self.rows.count)) if some is None else some
        units = self.rows.loss.shape[1] // self.unit
        out = torch.empty(len(pick), units, dtype=torch.float64)
        if not units:
            return out
        place = torch.arange(units)
        for at in torch.arange(len(pick)).split(_TOGETHER):
            rows = pick[at]
            cost = self._unit_costs(rows)
            cost.masked_fill_(place < (self.first[rows] // self.unit)[:, None], -1.0)
            ceiling = cost.cummax(1).values
            ended = place >= (self.rows.count[rows] // self.unit)[:, None]
            out[at] = ceiling.masked_fill_(ended, torch.inf)
        return out

    def _unit_costs(self, rows: Tensor) -> Tensor:
        """(len(rows), U) float64: what each removal (block) cost, in the layer's common unit."""
        loss = self.rows.loss[rows].to(torch.float64)
        if self.unit > 1:
            units = loss.shape[1] // self.unit
            loss = loss[:, : units * self.unit].reshape(len(loss), units, self.unit).sum(2)
        return loss * self.row_scale[rows]

    def cut(self, counts: Tensor) -> Tensor:
        """Bool (G, R, D): the first counts[r] columns of each row's order."""
        place = torch.arange(self.rows.order.shape[1])
        order = torch.where(place < counts[:, None], self.rows.order, -1)
        return self._marked(order).view(self.problem.before.shape)

    def _marked(self, order: Tensor) -> Tensor:
        D = self.width
        marked = torch.zeros(len(order), D + 1, dtype=torch.bool)
        marked.scatter_(1, torch.where(order < 0, D, order).long(), True)
        return marked[:, :D].to(self.problem.before.device)


def rows_together(backend: str) -> int:
    """Rows that one call of a backend's kernel gets."""
    return _ON_DEVICE if ops.on_device(backend) else _TOGETHER
