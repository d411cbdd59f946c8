"""The result of pruning one layer: its weights rounded, measured and described."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native.solvers import measurement
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.pruning import Pruned
from lobs_native.solvers.repair import solve

__all__ = ["OPTIMAL", "PrunedWeight", "finish", "first_group"]

OPTIMAL = 30.0  # optimality ratio (LAPACK's threshold for its own) above which weights are redone


@dataclass(frozen=True)
class PrunedWeight:
    """The result of :func:`lobs_native.prune_weight`."""

    weight: Tensor  # (R, C), dtype and device of the input; removed entries are exactly zero
    bias: Tensor | None  # (R,), updated together with the weights
    mask: Tensor  # (R, C) bool, True = kept
    bias_mask: Tensor | None  # (R,) bool, only with prune_bias=True
    # tr(dW H dW^T) of the final weights, with the bias, without damping: to a millionth, or in
    # float64 for float64 weights
    error: float
    relative_error: float  # error / tr(W H W^T)
    sparsity: float  # share of removed entries among those that could be removed
    # the fraction that was used; 0 where the method inverts nothing. Where all rows lose the same,
    # the one that the kept weights were solved for with
    damping: float
    method: str
    backend: str  # the backend that was used
    status: str  # "ok", or "damping raised"
    notes: tuple[str, ...] = ()  # everything that was done differently from the request
    dead_columns: int = 0  # inputs whose second moment is zero
    # worst row's ||(dw H) on kept|| / (D eps ||dw|| ||H||), see Notes; of 32 rows where the method
    # does not aim at the best weights
    optimality: float = 0.0
    swaps: int = 0  # exchanges of a kept against a removed weight (refine="exchange")
    seconds: float = 0.0
    # the sum of the removals' costs before ``refine``, in units of ``error`` with the damped H, so
    # that it is at least ``error`` up to rounding. None: the method does not compute it, or the
    # kept weights were solved for with more damping than the removals were.
    predicted: float | None = None
    # the same at other sparsities: as many errors as sparsities, rising, the chosen one included
    curve_sparsity: tuple[float, ...] | None = None
    curve_error: tuple[float, ...] | None = None
    energy: float | None = None  # tr(W H W^T): the unit of relative errors
    condition: float | None = None  # estimate for the damped H, from below; None if not inverted


def finish(
    problem: Problem,
    pruned: Pruned,
    *,
    method: str,
    begun: float,
    notes: Sequence[str] = (),
) -> PrunedWeight:
    """Round the weights to their own types and measure what is left of them.

    Where they are meant to be the best for their mask and are not, they are solved for again.
    Tensors of the result have a leading G; ``begun`` is a time of ``time.perf_counter``.
    """
    removed = pruned.removed
    weight, bias = problem.rounded(pruned.weights)
    if pruned.optimal:
        error, optimality = measurement.error_and_optimality(problem, weight, bias, removed)
        if optimality > OPTIMAL:
            problem.workspace.note(
                f"the kept weights were solved for again in float64: their optimality ratio was "
                f"{optimality:.3g}"
            )
            weight, bias = problem.rounded(solve(problem, removed, precise=True, from_kept=True))
            error, optimality = measurement.error_and_optimality(problem, weight, bias, removed)
    factor = _repair_factor(problem, removed)
    costs = None if factor > 1 else pruned.costs  # which reckon with less damping
    unmet = 0.0 if costs is None else measurement.unmet(problem, weight, bias)
    if not pruned.optimal:
        error, optimality = measurement.error_and_optimality_of_some(
            problem, weight, bias, removed, None if costs is None else costs.rows, unmet
        )
    damping = problem.damping * factor
    if factor > 1:
        problem.workspace.note(
            f"the kept weights were solved for with damping {damping:.3g}, not "
            f"{problem.damping:.3g}: with less they would follow the noise of few rows "
            "(generalised cross-validation); more calibration data would help"
        )
    energy = measurement.energy(problem)
    C = problem.in_features
    lost = measurement.lost_in_rounding(problem, weight, removed)
    return PrunedWeight(
        weight=weight,
        bias=bias,
        mask=~removed[:, :, :C],
        bias_mask=~removed[:, :, C] if problem.prune_bias else None,
        error=error,
        relative_error=error / energy if energy > 0 else (0.0 if error == 0 else math.inf),
        sparsity=int(torch.count_nonzero(removed)) / problem.total,
        damping=damping,
        method=method,
        backend=problem.workspace.backend,
        status="damping raised" if problem.damping_raised else "ok",
        notes=(*notes, *problem.workspace.summary(), *lost),
        dead_columns=sum(int(d.sum()) for d in problem.dead),
        optimality=optimality,
        swaps=pruned.swaps,
        predicted=None if costs is None else max(0.0, costs.predicted + unmet),
        curve_sparsity=None if costs is None else costs.sparsity,
        curve_error=None if costs is None else _raised(costs.error, unmet),
        energy=energy,
        condition=measurement.condition(problem),
        seconds=time.perf_counter() - begun,
    )


def _repair_factor(problem: Problem, removed: Tensor) -> float:
    """How many times the damping the kept weights were solved for with, at the most."""
    return max(problem.repair_factor(g, gone) for g, gone in enumerate(removed))


def _raised(errors: tuple[float, ...] | None, by: float) -> tuple[float, ...] | None:
    return None if errors is None else tuple(max(0.0, error + by) for error in errors)


def first_group(out: PrunedWeight) -> PrunedWeight:
    """The result for a layer of one group, without the leading 1 of its tensors."""

    def first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[0]

    changed = {name: first(getattr(out, name)) for name in ("weight", "bias", "mask", "bias_mask")}
    return PrunedWeight(**{**vars(out), **changed})
