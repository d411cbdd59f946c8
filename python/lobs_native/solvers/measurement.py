"""Errors of a layer's final weights, in float64, and how far the weights are from the best."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native.errors import NonFiniteError
from lobs_native.solvers.problem import Problem

__all__ = [
    "PIECE",
    "condition",
    "energy",
    "error",
    "error_and_optimality",
    "error_of_nothing",
    "lost_in_rounding",
    "quadratic_form",
]

PIECE = 1 << 19  # elements of a float64 temporary
_COLUMNS = 512  # of H in one product


def energy(problem: Problem) -> float:
    """tr(W H W^T) of the original weights; with a drift, that of the desired outputs."""
    if problem.drift is not None:
        return _finite(problem.drift.energy)
    total = 0.0
    for g, H in enumerate(problem.moments):
        for rows in _pieces(problem):
            total += quadratic_form(problem.before[g, rows].to(torch.float64), H)
    return _finite(total)


def error(problem: Problem, weight: Tensor, bias: Tensor | None) -> float:
    """tr(dW H dW^T) of final weights (G, R, C) and biases (G, R), without damping; with a drift,
    the distance of their outputs from the desired ones."""
    total = 0.0 if problem.drift is None else problem.drift.inherited
    for g, H in enumerate(problem.moments):
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows)
            total += quadratic_form(dW, H) - _gained(problem, dW, g, rows)
    return _finite(total)


def error_and_optimality(
    problem: Problem, weight: Tensor, bias: Tensor | None, removed: Tensor
) -> tuple[float, float]:
    """:func:`error`, and the optimality ratio of the kept weights.

    The ratio is the worst row's ``||(dw H) on kept|| / (D eps ||dw|| ||H||)`` with the damped H and
    the eps of the weight's type: below about 30 the kept weights are the best there are for their
    mask as far as this type can tell.
    """
    total = 0.0 if problem.drift is None else problem.drift.inherited
    worst = 0.0
    eps = torch.finfo(problem.weight_dtype).eps
    for g, H in enumerate(problem.moments):
        shift = problem.shift(g)
        norm = problem.norm(g) + shift or 1.0
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows)
            G = dW @ H
            total += _dot(G, dW) - _gained(problem, dW, g, rows)
            if problem.drift is not None:
                dW -= (problem.before - problem.original)[g, rows]
                G = dW @ H
            G.add_(dW, alpha=shift).masked_fill_(removed[g, rows], 0.0)
            # Taken out of both, so that squares keep in range.
            largest = dW.abs().amax(1, keepdim=True)
            moved = largest > 0
            residual = torch.where(moved, G / norm / largest, 0.0).norm(dim=1)
            size = torch.where(moved, dW / largest, 1.0).norm(dim=1) * (eps * H.shape[0])
            worst = max(worst, float((residual / size).max()))
    return _finite(total), worst


def error_of_nothing(problem: Problem) -> float:
    """The damped objective with nothing removed: removals add their costs to it. 0 without a
    drift."""
    if problem.drift is None:
        return 0.0
    moved = problem.before - problem.original
    gained = sum(float((p.T * d).sum()) for p, d in zip(problem.drift.pull, moved, strict=True))
    return problem.drift.inherited - gained


def condition(problem: Problem) -> float | None:
    """An estimate of the largest 2-norm condition number of the damped second moments: the product
    of the norms of H and of its inverse, each by a few steps of the power method, so from below, by
    less than a factor of two in tests. None where nothing was inverted.

    It takes a few products of a matrix and a vector: nothing beside the factorisation.
    """
    estimates = [
        (problem.norm(g) + problem.shift(g)) / inverse.scale * inverse.norm()
        for g, inverse in enumerate(problem.inverses)
    ]
    return max(estimates, default=None)


def lost_in_rounding(problem: Problem, weight: Tensor, removed: Tensor) -> list[str]:
    """A note, if kept weights (G, R, C) became zero in their own type."""
    C = problem.in_features
    lost = int(((weight == 0) & ~removed[:, :, :C] & (problem.before[:, :, :C] != 0)).sum())
    kind = str(problem.weight_dtype).removeprefix("torch.")
    return [f"{lost} kept weights became zero when they were rounded to {kind}"] if lost else []


def _pieces(problem: Problem) -> Iterator[slice]:
    """Rows a few at a time, so that float64 temporaries stay small."""
    _, R, D = problem.before.shape
    step = max(1, PIECE // D)
    for first in range(0, R, step):
        yield slice(first, first + step)


def _change(problem: Problem, weight: Tensor, bias: Tensor | None, g: int, rows: slice) -> Tensor:
    after = weight[g, rows].to(torch.float64)
    if bias is not None:
        after = torch.cat([after, bias[g, rows, None].to(torch.float64)], 1)
    return after - problem.original[g, rows]


def _gained(problem: Problem, dW: Tensor, g: int, rows: slice) -> float:
    """What a change of the original weights gains by following the drift."""
    if problem.drift is None:
        return 0.0
    return 2.0 * float((problem.drift.pull[g][:, rows].T * dW).sum())


def quadratic_form(dW: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T) in float64, from the upper triangle of H: half of the product dW H."""
    total = 0.0
    for first in range(0, len(H), _COLUMNS):
        J = slice(first, first + _COLUMNS)
        G = torch.addmm(dW[:, J] @ H[J, J], dW[:, :first], H[:first, J], alpha=2.0)
        total += _dot(G, dW[:, J])
    return total


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of all products of two matrices' entries."""
    return float(torch.linalg.vecdot(a, b).sum())


def _finite(total: float) -> float:
    """``total``, never below zero; NonFiniteError where it is beyond float64."""
    if not math.isfinite(total):
        raise NonFiniteError(
            "weight: tr(W H W^T) is beyond float64; scale the weight or the hessian down"
        )
    return max(0.0, total)
