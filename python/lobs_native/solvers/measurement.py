"""Errors of a layer's final weights, and how far the weights are from the best.

Errors of large layers are sums of float32 products, ``tr(dW H dW^T) = sum(H * (dW^T dW))``. The
inner product is a second moment, so the kernel of those computes it: half of the arithmetic of
``dW H``, in float32. What that may lose is known afterwards, and where it could
be more than a millionth, as for small layers and float64 weights, all of it is done in float64.
At 2048 x 2048 on one AVX-512 core that took error, optimality and energy from 0.63 to 0.16 s.

Where a method knows what its removals cost, the error is their sum less what damping adds, and
some rows are measured in float64 to see how far off that is: another 0.07 s less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NonFiniteError
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.extent import Extent
from lobs_native.solvers.problem import Problem

__all__ = [
    "condition",
    "energy",
    "error",
    "error_and_optimality",
    "error_and_optimality_of_some",
    "error_elsewhere",
    "error_of_nothing",
    "lost_in_rounding",
    "measuring_bytes",
    "pieces",
    "quadratic_form",
    "unmet",
]

_PIECE = 1 << 19  # elements of a float64 temporary
_COLUMNS = 512  # of H in one product
_STRIP = 64  # rows of it that stay in the cache
_LARGE = 1 << 26  # products of numbers from which on float32 takes less time; below, milliseconds
_LEAST_ROWS = 128  # as many as pay for passes over dW^T dW
_ROUNDING = 2.0**-24  # of float32
_LOST = 1e-6  # of an error: the most that float32 may lose
_NARROW_ROWS = 4096  # up to which sums of 256 rows may be added up in float32 as well
_LARGEST = 64  # exponent of weights whose changes float32 holds for certain
_SAMPLE = 32  # rows that show how far from the best a layer is, and how far off its costs are
_SURE = 2.0  # standard errors


def energy(problem: Problem) -> float:
    """tr(W H W^T) of the original weights; with a drift, that of the desired outputs."""
    if problem.desired is not None:
        return _finite(problem.desired.energy)
    found = _in_float32(problem, lambda g: problem.before[g], 0.0)
    if found is not None:
        return _finite(found)
    total = 0.0
    for g, H in enumerate(problem.moments):
        for rows in _pieces(problem):
            total += quadratic_form(problem.before[g, rows].to(torch.float64), H)
    return _finite(total)


def error(problem: Problem, weight: Tensor, bias: Tensor | None) -> float:
    """tr(dW H dW^T) of final weights (G, R, C) and biases (G, R), without damping; with a drift,
    the distance of their outputs from the desired ones."""
    total = inherited = 0.0 if problem.desired is None else problem.desired.inherited
    found = _in_float32(problem, lambda g: _change(problem, weight, bias, g), inherited)
    if found is not None:
        return _finite(found)
    for g, H in enumerate(problem.moments):
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows, torch.float64)
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
    total = 0.0 if problem.desired is None else problem.desired.inherited
    worst = 0.0
    for g, H in enumerate(problem.moments):
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows, torch.float64)
            G = dW @ H
            total += _dot(G, dW) - _gained(problem, dW, g, rows)
            worst = max(worst, _optimality(problem, dW, G, removed, g, rows))
    return _finite(total), worst


def error_elsewhere(
    before: tuple[Tensor, Tensor | None],
    after: tuple[Tensor, Tensor | None],
    moments: Sequence[Tensor],
    drift: Drift | None,
) -> tuple[float, float]:
    """:func:`error` and :func:`energy` on other inputs than those a layer was pruned by.

    ``before`` and ``after`` are weights (G, R, C) and biases (G, R); moments G times (D, D) float64
    and the drift are those of the other inputs, with the weights ``before``.
    """
    error, energy = (0.0, 0.0) if drift is None else (drift.inherited, drift.energy)
    for g, H in enumerate(moments):
        for rows in pieces(before[0].shape[1], len(H)):
            old, new = (_rows_of(*side, g, rows) for side in (before, after))
            error += quadratic_form(new - old, H)
            if drift is None:
                energy += quadratic_form(old, H)
            else:
                error -= 2.0 * float((drift.pull[g][:, rows].T * (new - old)).sum())
    return _finite(error), _finite(energy)


def _rows_of(weight: Tensor, bias: Tensor | None, g: int, rows: slice) -> Tensor:
    """Some rows (n, D) float64 of a group, with the bias as the last column."""
    chosen = weight[g, rows].to(torch.float64)
    if bias is None:
        return chosen
    return torch.cat([chosen, bias[g, rows, None].to(torch.float64)], 1)


def error_and_optimality_of_some(
    problem: Problem,
    weight: Tensor,
    bias: Tensor | None,
    removed: Tensor,
    costs: Tensor | None,
    apart: float,
) -> tuple[float, float]:
    """:func:`error`, and the optimality ratio as in :func:`error_and_optimality` of 32 rows of each
    group, evenly spaced: enough for weights that are not meant to be the best.

    ``costs`` (G, R) float64 is what the removals cost in each row with the damped H, as far as
    known. The error of a large layer is then their sum, less what damping adds, and less what they
    are off on average on the 32 rows, unless they are off by too different amounts there; and
    ``apart``, see :func:`unmet`.
    """
    R = problem.before.shape[1]
    rows = slice(None, None, -(-R // _SAMPLE))
    known = _costs_without_damping(problem, weight, bias, costs) if costs is not None else None
    total, doubt, worst = error_of_nothing(problem), 0.0, 0.0
    for g, H in enumerate(problem.moments):
        dW = _change(problem, weight, bias, g, rows, torch.float64)
        G = dW @ H
        if known is not None:
            off = torch.linalg.vecdot(G, dW) - known[g, rows]
            if problem.drift is not None:  # costs are what is lost on the best weights
                moved = problem.before[g, rows] - problem.original[g, rows]
                off -= ((2.0 * dW - moved) * problem.drift.pull[g][:, rows].T).sum(1)
            total += float(known[g].sum() + R * off.mean())
            doubt += R * float(off.std()) / math.sqrt(len(off))
        worst = max(worst, _optimality(problem, dW, G, removed, g, rows))
    total += apart
    if known is not None and _SURE * doubt <= _LOST * total:
        return _finite(total), worst
    return error(problem, weight, bias), worst


def _costs_without_damping(
    problem: Problem, weight: Tensor, bias: Tensor | None, costs: Tensor
) -> Tensor | None:
    """(G, R) float64: the costs of the removals without what damping adds to them; None for small
    layers. The kernels do not see weights of dead inputs."""
    _, R, D = problem.before.shape
    if not _is_large(R, D, problem.before.dtype) or problem.exponent > _LARGEST:
        return None
    known = costs.clone()
    for g, dead in enumerate(problem.dead):
        some_dead = bool(dead.any())
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows)
            if some_dead:
                dW[:, : len(dead)][:, dead] = 0.0
            norm = torch.linalg.vector_norm(dW, dim=1, dtype=torch.float64)
            known[g, rows] -= norm.square_().mul_(problem.shift(g))
    return known


def _optimality(
    problem: Problem, dW: Tensor, G: Tensor, removed: Tensor, g: int, rows: slice
) -> float:
    """The worst ratio of some rows of group g, which changed by dW (n, D) float64; ``G = dW H``.
    Both are overwritten."""
    H, shift = problem.moments[g], problem.shift(g) * problem.repair_factor(g, removed[g])
    norm = problem.norm(g) + shift or 1.0
    if problem.drift is not None:
        dW -= problem.before[g, rows] - problem.original[g, rows]
        G = dW @ H
    G.add_(dW, alpha=shift).masked_fill_(removed[g, rows], 0.0)
    # Taken out of both, so that squares keep in range.
    largest = dW.abs().amax(1, keepdim=True)
    moved = largest > 0
    eps = torch.finfo(problem.weight_dtype).eps
    residual = torch.where(moved, G / norm / largest, 0.0).norm(dim=1)
    size = torch.where(moved, dW / largest, 1.0).norm(dim=1) * (eps * H.shape[0])
    return float((residual / size).max())


def unmet(problem: Problem, weight: Tensor, bias: Tensor | None) -> float:
    """How much farther from the desired outputs those of these weights are than from what the
    solver aims at, where that is a share of the way."""
    left, desired = 1.0 - problem.trusted, problem.desired
    if desired is None or not left:
        return 0.0
    moved = 0.0
    for g in range(len(problem.moments)):
        for rows in _pieces(problem):
            dW = _change(problem, weight, bias, g, rows, torch.float64)
            moved += _gained(problem, dW, g, rows)
    return left * ((2.0 - left) * desired.inherited - moved)


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

    It takes a few products of a matrix and a vector: nothing beside the factorisation. Of many
    small second moments it is exact.
    """
    if problem.inverses and problem.extremes is not None:
        eps = torch.finfo(torch.float64).eps
        shifted = [
            (low + problem.shift(g), high + problem.shift(g))
            for g, (low, high) in enumerate(problem.extremes)
        ]
        return max(high / max(low, eps * high) for low, high in shifted)
    estimates = [
        (problem.norm(g) + problem.shift(g)) / inverse.scale * inverse.norm()
        for g, inverse in enumerate(problem.inverses)
    ]
    return max(estimates, default=None)


def lost_in_rounding(problem: Problem, weight: Tensor, removed: Tensor) -> list[str]:
    """A note, if kept weights (G, R, C) became zero in their own type."""
    C = problem.in_features
    zero = weight == 0
    if int(torch.count_nonzero(zero)) == int(torch.count_nonzero(removed[:, :, :C])):
        return []  # what was kept is not zero
    lost = int((zero & ~removed[:, :, :C] & (problem.before[:, :, :C] != 0)).sum())
    kind = str(problem.weight_dtype).removeprefix("torch.")
    return [f"{lost} kept weights became zero when they were rounded to {kind}"] if lost else []


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows a few at a time, so that float64 temporaries stay small."""
    step = max(1, _PIECE // columns)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _pieces(problem: Problem) -> Iterator[slice]:
    return pieces(*problem.before.shape[1:])


def _change(
    problem: Problem,
    weight: Tensor,
    bias: Tensor | None,
    g: int,
    rows: slice = slice(None),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    after = weight[g, rows].to(dtype)
    if bias is not None:
        after = torch.cat([after, bias[g, rows, None].to(dtype)], 1)
    return after - problem.original[g, rows]


def _gained(problem: Problem, dW: Tensor, g: int, rows: slice) -> float:
    """What a change of the original weights gains by following the drift."""
    if problem.desired is None:
        return 0.0
    return 2.0 * float((problem.desired.pull[g][:, rows].T * dW).sum())


def _in_float32(
    problem: Problem, change: Callable[[int], Tensor], inherited: float
) -> float | None:
    """``inherited`` plus the sum of tr(dW H dW^T) over the groups g, less what is gained, for
    dW = change(g) (R, D) float32, by float32 products. None where the problem is too small for
    them, or where they could lose more than :data:`_LOST` of the result.

    An entry (j, k) of ``dW^T dW`` loses less than a rounding of its two columns' norms, at random,
    and ``H_jk^2 <= H_jj H_kk``. So all of them together lose about a rounding of the diagonals'
    product: of what the error would be if no column made up for another.
    """
    _, R, D = problem.before.shape
    if not _is_large(R, D, problem.before.dtype) or problem.exponent > _LARGEST:
        return None
    total, doubt = inherited, 0.0
    for g, H in enumerate(problem.moments):
        dW = change(g)
        S = torch.zeros_like(H, dtype=_products(R))
        ops.hessian_accumulate_(S, dW, backend=problem.workspace.backend)
        # Sums of squares are the same way off again and again where weights have few digits.
        squares = H.new_zeros(D)
        for rows in _pieces(problem):
            squares += dW[rows].to(torch.float64).square_().sum(0)
        apart = _dot(H.diagonal(), squares)
        S.diagonal().copy_(squares)
        below = 0.0
        for first in range(0, D, _STRIP):  # above its diagonal, S is zero
            rows, upto = slice(first, first + _STRIP), slice(0, first + _STRIP)
            below += _dot(H[rows, upto], S[rows, upto].to(torch.float64))
        gained = 0.0
        for rows in _pieces(problem) if problem.desired is not None else ():
            gained += _gained(problem, dW[rows], g, rows)
        total += 2 * below - apart - gained
        doubt += _ROUNDING * (apart + abs(gained))
    return total if doubt <= _LOST * total else None


def measuring_bytes(extent: Extent) -> int:
    """The most bytes of temporaries that measuring takes at one time."""
    R, D = extent.rows, extent.order
    small = 5 * 8 * min(extent.weights, _PIECE)
    if not _is_large(R, D, extent.kernel):
        return small
    return max(small, 4 * R * D + _products(R).itemsize * D * D)


def _is_large(rows: int, order: int, dtype: torch.dtype) -> bool:
    """Whether weights of a group are measured by float32 products."""
    worth = rows >= _LEAST_ROWS and rows * order * order >= _LARGE
    return worth and dtype != torch.float64


def _products(rows: int) -> torch.dtype:
    """The type of dW^T dW."""
    return torch.float32 if rows <= _NARROW_ROWS else torch.float64


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
