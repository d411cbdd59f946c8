"""Methods that rank every weight once: "lobs" (the paper), "magnitude" and "wanda"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference
from lobs_native.solvers.patterns import FORCED, ZERO, Blocks, GroupsOf, Pattern
from lobs_native.solvers.problem import Problem, nearest_count, scaled_

__all__ = ["Ranked"]


class Ranked:
    """One score for every weight, cheapest first, infinite where nothing may be removed."""

    def __init__(self, problem: Problem, pattern: Pattern, method: str) -> None:
        """Fill ``score`` and ``unit``.

        Powers of two are taken out of W and H, so that squares neither over- nor underflow and the
        ranking does not depend on the scale of either.
        """
        self.problem = problem
        self.pattern = pattern
        self.repairs = method == "lobs"
        before = problem.before
        near_one = scaled_(before.to(torch.float64, copy=True), -problem.exponent)
        common = max((i.scale for i in problem.inverses), default=1.0) if self.repairs else 1.0
        score = torch.empty_like(before, dtype=torch.float64)  # (G, R, D) float64
        for g, H in enumerate(problem.moments):
            if method == "magnitude":
                score[g] = near_one[g].abs()
            elif method == "wanda":
                score[g] = near_one[g].abs() * H.diagonal().sqrt()
            else:
                inverse, dead = problem.inverses[g], problem.dead[g]
                cost = reference.saliency(near_one[g], inverse.A.diagonal())
                score[g] = cost * (inverse.scale / common)
                score[g][:, : len(dead)][:, dead] = 0.0
        score[before == 0] = ZERO
        if problem.bias_dtype is not None and not problem.prune_bias:
            score[:, :, -1] = torch.inf
        if problem.mask is not None:
            score[:, :, : problem.columns][~problem.mask] = FORCED
        self.score = score
        root = math.sqrt(common)  # a power of two, or one times sqrt(2)
        beyond = math.frexp(root)[1] + problem.exponent > 1023
        # for "lobs": w**2 / A_qq is score * unit**2
        self.unit = math.inf if beyond else math.ldexp(root, problem.exponent)

    def prune(self, share: float, scope: str) -> tuple[Tensor, Tensor]:
        """Bool (G, R, D) of what goes, exactly the count asked for, ties to the lowest position;
        and the weights (G, R, D) that are left."""
        gone = self._cheapest(share, scope)
        return gone, self.removed(gone)

    def below(self, threshold: float) -> tuple[Tensor, Tensor]:
        """The same for everything with sqrt(L_q) <= threshold. The paper's L_q has a factor 1/2."""
        root = torch.sqrt(0.5 * self.score.clamp_min(0.0)) * self.unit
        gone = torch.isfinite(self.score) & (root <= threshold)
        return gone, self.removed(gone)

    def removed(self, gone: Tensor) -> Tensor:
        """The weights after a removal; "lobs" repairs the others in the order of the scores."""
        problem = self.problem
        if not self.repairs:
            return torch.where(gone, 0.0, problem.before)
        work = problem.before.to(problem.dtype, copy=True).contiguous()
        for g, inverse in enumerate(problem.inverses):
            order, start = ops.rank_rows(self.score[g], gone[g], backend=problem.backend)
            A = inverse.A.to(work.dtype)
            ops.static_order_prune_(work[g], A, order, start, backend=problem.backend)
        return work

    def _cheapest(self, share: float, scope: str) -> Tensor:
        problem, pattern = self.problem, self.pattern
        G, R, D = self.score.shape
        score = self.score
        if isinstance(pattern, GroupsOf):
            C = problem.columns
            rows = score[:, :, :C].reshape(-1, pattern.size)
            chosen = ops.rank_lowest(rows, pattern.size - pattern.keep, backend=problem.backend)
            gone = torch.zeros_like(score, dtype=torch.bool)
            gone[:, :, :C] = chosen.view(G, R, C)
            return gone
        unit = 1
        if isinstance(pattern, Blocks) and pattern.size > 1:
            unit = pattern.size
            score = pattern.scores(score[:, :, : problem.columns])
        width = score.shape[2]
        if scope == "row":
            rows, count = (
                score.reshape(G * R, width),
                nearest_count(share, problem.candidates // unit),
            )
        else:
            rows = score.reshape(1, -1)
            count = nearest_count(share, G * R * (problem.candidates // unit))
        chosen = ops.rank_lowest(rows, count, backend=problem.backend).view(G, R, width)
        if unit == 1:
            return chosen
        gone = torch.zeros(G, R, D, dtype=torch.bool, device=score.device)
        gone[:, :, : problem.columns] = chosen.repeat_interleave(unit, 2)
        return gone
