"""Method "sweep": SparseGPT's order, columns from left to right in blocks, one shared factor."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.costs import Costs
from lobs_native.solvers.patterns import FORCED, ZERO, Blocks, GroupsOf, Pattern, Unstructured
from lobs_native.solvers.problem import Problem, in_errors, nearest_count

__all__ = ["Sweep"]

_WIDTH = 128  # columns of a block, as published


class Sweep:
    """Chooses the mask of each block from the weights as they stand when the sweep arrives."""

    def __init__(self, problem: Problem, pattern: Pattern) -> None:
        self.problem = problem
        self.pattern = pattern
        self.upper = [i.U.to(problem.dtype) for i in problem.inverses]
        self.unit = pattern.size if isinstance(pattern, Blocks) else 1
        self._spent: dict[int, float] = {}  # what so many removals cost
        C, D = problem.columns, problem.before.shape[2]
        if isinstance(pattern, Unstructured):
            self.cuts = [*range(0, D, _WIDTH), D]
        else:  # whole groups or blocks; a bias comes after them
            step = max(pattern.size, _WIDTH // pattern.size * pattern.size)
            self.cuts = [*range(0, C, step), C] + ([D] if D > C else [])

    def prune(self, share: float, scope: str) -> tuple[Tensor, Tensor]:
        """Bool (G, R, D) of what goes, exactly the count asked for, and the weights (G, R, D) that
        are left.

        Every block removes its part of the count: over all rows, or (scope "row") in each row.
        """
        problem = self.problem
        G, R, _ = problem.before.shape
        gone = torch.zeros_like(problem.before, dtype=torch.bool)
        after = torch.empty_like(problem.before, dtype=problem.dtype)
        units = problem.candidates // self.unit
        total = nearest_count(share, G * R * units)
        per_row = nearest_count(share, units)
        if not isinstance(self.pattern, GroupsOf) and (per_row if scope == "row" else total) == 0:
            return gone, problem.before.clone()
        spent = 0.0
        for g in range(G):
            W = problem.working(g)
            if scope == "row":
                budget = torch.full((R,), per_row)
            else:
                budget = torch.tensor([total * (g + 1) // G - total * g // G])
            gone[g], cost = self._sweep(g, W, budget)
            after[g] = W
            spent += cost * problem.inverses[g].scale
        self._spent[int(gone.sum())] = in_errors(spent, problem.exponent)
        return gone, problem.restored(after, gone)

    def costs(self, gone: Tensor) -> Costs | None:
        """What the removals of :meth:`prune` cost together; there is no curve: the mask is chosen
        for one number of removals."""
        spent = self._spent.get(int(gone.sum()))
        return None if spent is None else Costs(self.problem.least() + spent)

    def _sweep(self, g: int, W: Tensor, budget: Tensor) -> tuple[Tensor, float]:
        """Sweep W (R, D) in place; what goes, and what that cost in units of W. ``budget`` is the
        number of removals: one for all rows together, or one for each."""
        problem, U, pattern = self.problem, self.upper[g], self.pattern
        (R, D), C = W.shape, problem.candidates
        zero = problem.before[g][:, :C] == 0
        some_zero = bool(zero.any())
        forced = torch.zeros_like(zero)
        some_forced = problem.mask is not None
        if problem.mask is not None:
            forced[:, : problem.columns] = ~problem.mask[g]
        gone = torch.zeros(R, D, dtype=torch.bool, device=W.device)
        spread = _Spread(budget.to(W.device), forced[:, :: self.unit])
        if bool((spread.spare < 0).any()):
            raise problem.over_masked()
        spent = torch.zeros((), dtype=torch.float64, device=W.device)
        for begin, end in itertools.pairwise(self.cuts):
            block, inside = slice(begin, end), slice(begin, min(end, C))
            part, u = W[:, block], U[block, block]
            E = torch.empty(R, end - begin, dtype=W.dtype, device=W.device)
            code = torch.zeros(R, end - begin, dtype=torch.uint8, device=W.device)
            group, per_group = 0, 0
            if begin < C and isinstance(pattern, GroupsOf):
                group, per_group = pattern.size, pattern.size - pattern.keep
                if some_zero or some_forced:
                    code.copy_(_first(forced[:, inside], zero[:, inside], group, per_group))
            elif begin < C:
                width = min(end, C) - begin
                score = (part[:, :width] / u.diagonal()[:width]).to(torch.float64).square_()
                if some_zero:
                    score.masked_fill_(zero[:, inside], ZERO)
                if some_forced:
                    score.masked_fill_(forced[:, inside], FORCED)
                count = spread.take(slice(begin // self.unit, min(end, C) // self.unit))
                code[:, :width] = self._choose(score, count)
            ops.sweep_block_(
                part, u, code, E, group=group, per_group=per_group, backend=problem.backend
            )
            gone[:, block] = code == 1
            spent += E.to(torch.float64).square().sum()
            if end < D:
                W[:, end:].addmm_(E, U[block, end:], alpha=-1)
        return gone, float(spent)

    def _choose(self, score: Tensor, count: Tensor) -> Tensor:
        """Bool like score (R, B): the ``count`` lowest of all, or of each row, in whole blocks."""
        backend = self.problem.backend
        if isinstance(self.pattern, Blocks):
            score = self.pattern.scores(score)
        if len(count) == 1:
            chosen = ops.rank_lowest(score.reshape(1, -1), int(count), backend=backend)
        elif bool((count == count[0]).all()):
            chosen = ops.rank_lowest(score, int(count[0]), backend=backend)
        else:
            chosen = score.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
        chosen = chosen.view_as(score)
        return chosen.repeat_interleave(self.unit, 1) if self.unit > 1 else chosen


def _first(forced: Tensor, zero: Tensor, group: int, per_group: int) -> Tensor:
    """Which weights (R, B) of a block go before all others: those that the mask demands, and zeros
    that are there already as far as the group has room for them."""
    groups = (len(forced), -1, group)
    demanded, extra = forced.reshape(groups), (zero & ~forced).reshape(groups)
    room = per_group - demanded.sum(2, keepdim=True)
    return (demanded | (extra & (extra.cumsum(2) <= room))).view_as(forced)


class _Spread:
    """Spreads a number of removals over blocks of columns in proportion to what is free in each,
    so that they add up exactly; what the mask demands comes first and counts."""

    def __init__(self, budget: Tensor, forced: Tensor) -> None:
        demanded = forced.to(torch.int64) if len(budget) > 1 else forced.sum(0, keepdim=True)
        each = 1 if len(budget) > 1 else len(forced)
        self.demanded = torch.nn.functional.pad(demanded.cumsum(1), (1, 0))  # (R or 1, units + 1)
        self.each = each  # weights that a unit stands for
        self.spare = budget - self.demanded[:, -1]  # negative: the mask demands more
        self.free = (forced.shape[1] * each - self.demanded[:, -1]).clamp_min(1)

    def take(self, units: slice) -> Tensor:
        """Removals among these columns (units): one number, or one per row."""

        def until(end: int) -> Tensor:
            demanded = self.demanded[:, end]
            seen = end * self.each - demanded
            return demanded + (2 * self.spare * seen + self.free) // (2 * self.free)

        return until(units.stop) - until(units.start)
