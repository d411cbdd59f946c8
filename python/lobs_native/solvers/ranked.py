"""Methods that rank every weight once: "lobs" (the paper), "magnitude" and "wanda"."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference
from lobs_native.solvers.extent import Extent, Flops
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import FORCED, ZERO, Pattern
from lobs_native.solvers.problem import Problem, nearest_count, scaled_

__all__ = ["Lobs", "Magnitude", "Ranked", "Wanda"]

_ROWS = 64  # in one temporary


class Ranked(Method):
    """Removes the weights (units) of the lowest scores; what is kept stays as it is.

    ``score`` (G, R, D) float64 is the lower the sooner a weight is removed, and infinite where
    nothing may be removed. A power of two is taken out of the weights first, so that squares
    neither over- nor underflow and the ranking does not depend on their scale.
    """

    inverts = False
    optimal = False

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        super().__init__(problem, pattern, importance)
        before = problem.before
        near_one = scaled_(before.to(torch.float64, copy=True), -problem.exponent)
        scores = [self.scored(g, w) for g, w in enumerate(near_one)]
        score = scores[0][None] if len(scores) == 1 else torch.stack(scores)
        zero = before == 0
        if bool(zero.any()):
            score.masked_fill_(zero, ZERO)
        if problem.bias_stays:
            score[:, :, -1] = torch.inf
        if problem.mask is not None:
            score[:, :, : problem.in_features][~problem.mask] = FORCED
        self.score = score

    @abstractmethod
    def scored(self, g: int, w: Tensor) -> Tensor:
        """Scores (R, D) >= 0 of group g's weights w (R, D) float64, which are near one and may be
        overwritten."""

    def left(self, removed: Tensor) -> Tensor | None:
        """The weights (G, R, D) that a removal leaves; None for the best ones for its mask."""
        return torch.where(removed, 0.0, self.problem.before)

    def choose(self, share: float, scope: str) -> Choice:
        """See :class:`Method`."""
        return self._choice(self._cheapest(share, scope))

    def choose_masked(self) -> Choice:
        """See :class:`Method`."""
        return self._choice(self.problem.masked())

    def _choice(self, removed: Tensor) -> Choice:
        return Choice(removed, self.left(removed))

    def _cheapest(self, share: float, scope: str) -> Tensor:
        """Bool (G, R, D) of what is removed."""
        problem, pattern, score = self.problem, self.pattern, self.score
        backend = problem.workspace.backend
        G, R, D = score.shape
        if pattern.is_grouped:
            groups = score[:, :, : problem.in_features].reshape(-1, pattern.group)
            chosen = ops.rank_lowest(groups, pattern.per_group, backend=backend)
            return _with_bias(chosen.view(G, R, -1), D)
        if pattern.unit > 1:
            score = pattern.unit_scores(score[:, :, : problem.in_features])
        units = problem.candidates // pattern.unit
        if scope == "row":
            rows, count = score.reshape(G * R, -1), nearest_count(share, units)
        else:
            rows, count = score.reshape(1, -1), nearest_count(share, G * R * units)
        chosen = ops.rank_lowest(rows, count, backend=backend).view(G, R, -1)
        return _with_bias(pattern.expand(chosen), D)


class Magnitude(Ranked):
    """Ranks by ``abs(w)``."""

    def scored(self, g: int, w: Tensor) -> Tensor:
        """See :class:`Ranked`."""
        return w.abs_()


class Wanda(Ranked):
    """Ranks by ``abs(w) * sqrt(H_qq)``. Source: Sun et al. 2024."""

    def scored(self, g: int, w: Tensor) -> Tensor:
        """See :class:`Ranked`."""
        return w.abs_() * self.problem.moments[g].diagonal().sqrt()


class Lobs(Ranked):
    """Ranks by ``w**2 / A_qq`` and, in this order, repairs the others of a row after each removal.

    Source: Dong, Chen & Pan 2017, algorithm 1.
    """

    inverts = True
    thresholds = True

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        self.common = max(i.scale for i in problem.inverses)  # taken out of H
        super().__init__(problem, pattern, importance)
        root = math.sqrt(self.common)  # a power of two, or one times sqrt(2)
        beyond = math.frexp(root)[1] + problem.exponent > 1023
        # w**2 / A_qq is score * unit**2
        self.unit = math.inf if beyond else math.ldexp(root, problem.exponent)

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`."""
        return super().flops(extent) + cls.flops_by_row(extent)

    @classmethod
    def flops_by_row(cls, extent: Extent) -> Flops:
        """See :class:`Method`: each removal changes its row, as fast as the cache allows."""
        return Flops(removal=2.0 * extent.share * extent.order * extent.weights)

    def scored(self, g: int, w: Tensor) -> Tensor:
        """See :class:`Ranked`."""
        inverse, dead = self.problem.inverses[g], self.problem.dead[g]
        diag = inverse.A.diagonal() * (self.common / inverse.scale)  # scales are powers of two
        for rows in w.split(_ROWS):  # temporaries stay in the cache
            rows.copy_(reference.saliency(rows, diag))
        if bool(dead.any()):
            w[:, : len(dead)][:, dead] = 0.0
        return w

    def choose_below(self, threshold: float) -> Choice:
        """Remove everything with sqrt(L_q) <= threshold. The paper's L_q has a factor 1/2."""
        root = torch.sqrt(0.5 * self.score.clamp_min(0.0)) * self.unit
        return self._choice(torch.isfinite(self.score) & (root <= threshold))

    def left(self, removed: Tensor) -> Tensor:
        """See :class:`Ranked`; A is never downdated."""
        problem = self.problem
        backend = problem.workspace.backend
        rows, count = problem.workspace.rows, problem.before.shape[1]
        own = rows.own(count)
        work = problem.before.to(problem.dtype, copy=True).contiguous()
        for g, inverse in enumerate(problem.inverses):
            order, start = ops.rank_rows(self.score[g, own], removed[g, own], backend=backend)
            A = inverse.A.to(work.dtype)
            ops.static_order_prune_(work[g, own], A, order, start, backend=backend)
            if rows.size > 1:
                work[g] = rows.joined(work[g, own], count)
        return work


def _with_bias(removed: Tensor, order: int) -> Tensor:
    """Bool (G, R, D): ``removed`` (G, R, C or D), no bias where it has none."""
    return torch.nn.functional.pad(removed, (0, order - removed.shape[2]))
