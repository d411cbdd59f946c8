"""One layer: prune a weight matrix by its inputs' second moment, and say what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.checks import check_choice
from lobs_native.solvers.costs import Costs
from lobs_native.solvers.exact import Greedy
from lobs_native.solvers.hessian import Hessian, few_rows, second_moment
from lobs_native.solvers.patterns import (
    GroupsOf,
    Pattern,
    check_fit,
    pattern_of,
)
from lobs_native.solvers.problem import OPTIMAL, Drift, Problem
from lobs_native.solvers.ranked import Ranked
from lobs_native.solvers.settings import METHODS, SCOPES, Target, check_damping, check_refine
from lobs_native.solvers.sweep import Sweep

__all__ = ["PrunedWeight", "prune_groups", "prune_weight"]


@dataclass(frozen=True)
class PrunedWeight:
    """What :func:`prune_weight` returns."""

    weight: Tensor  # (R, C), dtype and device of the input; removed entries are exactly zero
    bias: Tensor | None  # (R,), updated together with the weights
    mask: Tensor  # (R, C) bool, True = kept
    bias_mask: Tensor | None  # (R,) bool, only with prune_bias=True
    error: float  # tr(dW H dW^T) of the final weights in float64, with the bias, without damping
    relative_error: float  # error / tr(W H W^T)
    sparsity: float  # share of removed entries among those that could be removed
    damping: float  # the fraction that was used; 0 where the method inverts nothing
    method: str
    backend: str  # which backend made it
    status: str  # "ok", or "damping raised"
    notes: tuple[str, ...] = field(
        default=()
    )  # everything that was done differently from what was asked
    dead_columns: int = 0  # inputs whose second moment is zero
    optimality: float = 0.0  # worst row's ||(dw H) on kept|| / (D eps ||dw|| ||H||); see Notes
    swaps: int = 0  # exchanges of a kept against a removed weight (refine="exchange")
    seconds: float = 0.0
    # what the costs of the removals add up to in units of ``error`` with the damped H, so that it
    # is not below ``error`` but for rounding; before ``refine``. None: the method does not know.
    predicted: float | None = None
    # the same for other sparsities: rising points of equal number, the chosen one among them
    curve_sparsity: tuple[float, ...] | None = None
    curve_error: tuple[float, ...] | None = None
    energy: float | None = None  # tr(W H W^T): the unit of relative errors
    condition: float | None = None  # estimate for the damped H, from below; None if not inverted


def prune_weight(
    weight: Any,
    hessian: Any,
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    threshold: float | None = None,
    method: str = "exact",
    pattern: Any = "unstructured",
    scope: str = "layer",
    bias: Any = None,
    prune_bias: bool = False,
    mask: Any = None,
    damping: float = 0.01,
    refine: str | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> PrunedWeight:
    """Remove weights from one layer and repair the rest.

    ``"exact"`` is true Optimal Brain Surgeon: the weight whose removal costs least,
    ``w_q**2 / A_qq``, goes; all others of its row make up for it; A is downdated; and so on. Lowest
    error of all methods here. ``"sweep"`` is SparseGPT's: columns from left to right in blocks of
    128, one shared factor; several times faster and about twice the error. ``"lobs"`` is the
    paper's procedure: rank all weights once by ``w**2 / A_qq``, remove them in that order, and
    after each removal add ``-(w_q / A_qq) A[:, q]`` to its row, with ``A = (H + damping * mean(diag
    H) * I)^-1`` never downdated. ``"magnitude"`` ranks by ``abs(w)`` and ``"wanda"`` by ``abs(w) *
    sqrt(H_qq)``; neither changes the kept weights.

    Parameters
    ----------
    weight : (R, C) float64, float32, float16 or bfloat16
        One output unit per row. Not modified. Gradients are not tracked.
    hessian : Hessian, or (C, C) tensor
        Mean second moment of the layer's inputs; with ``bias``, (C + 1, C + 1), the ones column
        last. Not modified.
    sparsity : float in [0, 1]
        Share of the weights that are zero afterwards: exactly the nearest whole number of them (a
        half rounds down), zeros that were there before included.
    threshold : float >= 0
        The paper's epsilon: remove every weight with ``sqrt(L_q) <= threshold``, where ``L_q = w**2
        / (2 A_qq)`` (eq. 5-7).
    max_error : float >= 0
        Remove as many as leave the incurred ``error`` at or below this (found by bisection over the
        ranking).
    method : "exact", "sweep", "lobs", "magnitude" or "wanda"
    pattern : "unstructured", "N:M" or "1xB"
        ``"2:4"`` keeps 2 of every 4 neighbouring inputs of a row: it says itself how far to go, so
        leave the three targets out. ``"1x4"`` removes 4 neighbouring inputs of a row together. Rows
        must be whole groups.
    scope : "layer" or "row"
        Compare weights over the whole layer, or give every row the same number of removals. Under
        "sweep", the whole layer means all rows of a block of columns.
    bias : (R,), optional
        Updated together with the weights; never removed unless ``prune_bias``. Not modified.
    prune_bias : bool
        Rank and remove biases like weights, as the authors' code does. They then count in
        ``sparsity``.
    mask : (R, C) bool, optional
        True = may stay. Entries that are False are removed first, whatever they cost. Without a
        target exactly those are removed, and the rest is repaired for that.
    damping : float >= 0
        Fraction of the mean diagonal of H that is added to the diagonal. Where Cholesky fails, 10
        and 100 times as much is tried, and ``damping``, ``status`` and ``notes`` of the result say
        so.
    refine : None, "solve" or "exchange"
        "solve" recomputes the kept weights for the final mask in float64, whatever the method.
        "exchange" then swaps a kept weight of a row against a removed one as long as one swap
        lowers the error, and takes C * C / 2 doubles per thread. Not with 1xB patterns; what the
        mask demands stays. For CUDA tensors the exchanges are made on the CPU, and ``notes`` says
        so.
    memory : int, optional
        Bytes of scratch for "exact" at most: it then uses fewer threads (on a device, fewer rows at
        a time), or raises MemoryError; see :func:`plan_memory`.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    PrunedWeight
        New tensors like the inputs, the mask, and what was incurred, used and noted.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, PatternError, BackendError
        An argument does not fit; the message names it.
    NonFiniteError
        A NaN or an infinity in weight, bias or hessian (either triangle).
    NotPositiveDefiniteError
        The second moment cannot be inverted even at the end of the ladder.

    Notes
    -----
    Ties go to the lowest row, then column. Inputs that are zero in every row ("dead") cost nothing,
    so their weights go first under ``"lobs"`` and ``"wanda"``. With a damping below 1e-4 the
    removal runs in float64 whatever the weight's type. ``optimality`` of the result says how far
    the kept weights are from the best for their mask and the damped H, in units of rounding: below
    about 30, they are it. Source: Dong, Chen & Pan 2017, algorithm 1; Hassibi & Stork 1993 and
    Frantar, Singh & Alistarh 2022 for "exact"; Frantar & Alistarh 2023 for "sweep"; Sun et al. 2024
    for "wanda".
    """
    W, H, b, allowed, notes = one_layer(weight, hessian, bias, mask)
    out = prune_groups(
        W,
        [H],
        target=Target.of(
            sparsity,
            threshold,
            max_error,
            check_choice(method, "method", METHODS),
            pattern_of(pattern),
            allowed is not None,
        ),
        method=method,
        pattern=pattern,
        scope=scope,
        bias=b,
        prune_bias=prune_bias,
        mask=allowed,
        damping=damping,
        refine=refine,
        memory=memory,
        backend=backend,
        notes=notes,
    )
    return first_group(out)


def one_layer(
    weight: Any, hessian: Any, bias: Any, mask: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[str]]:
    """Check a layer's tensors: weight (1, R, C), second moment, bias (1, R), mask (1, R, C), and
    what is to be noted about the second moment."""
    W = checks.tensor(weight, "weight", ndim=2)
    H = hessian.matrix() if isinstance(hessian, Hessian) else second_moment(hessian, "hessian")
    notes = []
    if isinstance(hessian, Hessian) and 1 < hessian.rows < hessian.columns:
        notes.append(few_rows(hessian.rows, hessian.columns))
    b = None if bias is None else checks.tensor(bias, "bias", ndim=1)[None]
    allowed = None
    if mask is not None:
        allowed = checks.tensor(mask, "mask", ndim=2, dtypes=(torch.bool,))[None]
    return W[None], H, b, allowed, notes


def first_group(out: PrunedWeight) -> PrunedWeight:
    def first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[0]

    changed = {name: first(getattr(out, name)) for name in ("weight", "bias", "mask", "bias_mask")}
    return PrunedWeight(**{**vars(out), **changed})


# ---- the work, over G groups that are ranked together (grouped convolutions; G = 1 otherwise) ----


@ops.full_precision()
def prune_groups(
    W: Tensor,
    moments: Sequence[Tensor],
    *,
    target: Target,
    method: str,
    pattern: Any = "unstructured",
    scope: str = "layer",
    bias: Tensor | None = None,
    prune_bias: bool = False,
    mask: Tensor | None = None,
    damping: float = 0.01,
    refine: str | None = None,
    memory: int | None = None,
    backend: str | None = None,
    notes: Sequence[str] = (),
    drift: Drift | None = None,
    importance: Tensor | None = None,
) -> PrunedWeight:
    """:func:`prune_weight` for a layer of G groups, each with its own second moment, ranked as one
    layer.

    W (G, R, C), moments G times (C, C) or (C + 1, C + 1), bias (G, R), mask (G, R, C). With a
    drift, the weights that make up for it are pruned instead of W, whatever the method, and errors
    are relative to the outputs that it wants. ``importance`` (G, R) multiplies the costs of a row
    where "exact" compares rows. Returns a PrunedWeight whose tensors have the leading G.
    """
    begun = time.perf_counter()
    pattern = pattern_of(pattern)
    check_choice(scope, "scope", SCOPES)
    check_refine(refine, pattern)
    checks.flag(prune_bias, "prune_bias")
    if memory is not None:
        memory = checks.positive_int(memory, "memory")
    inverted = method in ("exact", "sweep", "lobs") or refine is not None
    problem = Problem.of(
        W,
        bias,
        moments,
        damping=check_damping(damping),
        inverted=inverted,
        prune_bias=prune_bias,
        mask=mask,
        backend=ops.select_backend(backend, W.device),
        memory=memory,
        drift=drift,
    )
    check_fit(pattern, W.shape[2], mask, prune_bias)
    solver = _solver(problem, pattern, method, importance)
    gone, after = _removed(problem, solver, target, scope)
    costs = _costs(solver, gone, scope)
    del solver  # and what it made for itself
    problem.check_mask(gone)
    swaps = 0
    if not bool(gone.any()):
        refine = None  # the weights are the best there are, and stay bit for bit
    if refine == "solve":
        after = problem.repaired(gone, precise=True, from_kept=True)
    elif refine == "exchange":
        gone, after, swaps = _exchanged(problem, pattern, gone)
    optimal = method == "exact" or refine is not None
    return finished(
        problem,
        gone,
        after,
        method=method,
        optimal=optimal,
        swaps=swaps,
        costs=costs,
        notes=notes,
        begun=begun,
    )


def finished(
    problem: Problem,
    gone: Tensor,
    after: Tensor,
    *,
    method: str,
    optimal: bool,
    begun: float,
    swaps: int = 0,
    costs: Costs | None = None,
    notes: Sequence[str] = (),
) -> PrunedWeight:
    """Round the weights to their own types and measure what is left of them.

    Where they claim to be ``optimal`` for their mask and are not, they are solved for again.
    """
    weight, new_bias = problem.rounded(after)
    error, optimality = problem.measured(weight, new_bias, gone)
    if optimal and optimality > OPTIMAL:
        problem.said.append(
            f"the kept weights were solved for again in float64: their optimality ratio was "
            f"{optimality:.3g}"
        )
        after = problem.repaired(gone, precise=True, from_kept=True)
        weight, new_bias = problem.rounded(after)
        error, optimality = problem.measured(weight, new_bias, gone)
    energy = problem.energy()
    C = problem.columns
    return PrunedWeight(
        weight=weight,
        bias=new_bias,
        mask=~gone[:, :, :C],
        bias_mask=~gone[:, :, C] if problem.prune_bias else None,
        error=error,
        relative_error=error / energy if energy > 0 else (0.0 if error == 0 else math.inf),
        sparsity=int(gone.sum()) / problem.total,
        damping=problem.damping,
        method=method,
        backend=problem.backend,
        status="damping raised" if any(i.raised for i in problem.inverses) else "ok",
        notes=(*notes, *problem.notes(weight, gone)),
        dead_columns=sum(int(d.sum()) for d in problem.dead),
        optimality=optimality,
        swaps=swaps,
        predicted=None if costs is None else max(0.0, costs.predicted),
        curve_sparsity=None if costs is None else costs.sparsity,
        curve_error=None if costs is None else costs.error,
        energy=energy,
        condition=problem.condition(),
        seconds=time.perf_counter() - begun,
    )


def _solver(
    problem: Problem, pattern: Pattern, method: str, importance: Tensor | None
) -> Greedy | Sweep | Ranked:
    if method == "exact":
        return Greedy(problem, pattern, importance)
    if method == "sweep":
        return Sweep(problem, pattern)
    return Ranked(problem, pattern, method)


def _removed(
    problem: Problem, solver: Greedy | Sweep | Ranked, target: Target, scope: str
) -> tuple[Tensor, Tensor]:
    """Bool (G, R, D) of what goes, and the weights (G, R, D) that are left."""
    if target.max_error is not None:
        return _bisect(problem, solver, scope, target.max_error)
    if target.threshold is not None:
        assert isinstance(solver, Ranked)
        return solver.below(target.threshold)
    if target.sparsity is not None:
        return solver.prune(target.sparsity, scope)
    assert problem.mask is not None
    gone = torch.zeros_like(problem.before, dtype=torch.bool)
    gone[:, :, : problem.columns] = ~problem.mask
    if isinstance(solver, Sweep):
        return solver.prune(int(gone.sum()) / problem.total, "layer")
    return gone, problem.best(gone) if isinstance(solver, Greedy) else solver.removed(gone)


def _costs(solver: Greedy | Sweep | Ranked, gone: Tensor, scope: str) -> Costs | None:
    """What the solver says about a removal it made; rankings make no sum of their costs."""
    if isinstance(solver, Greedy):
        return solver.costs(gone, scope)
    return solver.costs(gone) if isinstance(solver, Sweep) else None


def _exchanged(problem: Problem, pattern: Pattern, gone: Tensor) -> tuple[Tensor, Tensor, int]:
    """Swap kept against removed weights, row by row, in float64."""
    group = pattern.size if isinstance(pattern, GroupsOf) else 0
    kept, after = ~gone, torch.empty_like(problem.before, dtype=torch.float64)
    swaps = 0
    for g, inverse in enumerate(problem.inverses):
        fixed = torch.zeros_like(kept[g])
        if problem.mask is not None:
            fixed[:, : problem.columns] = ~problem.mask[g]
        if problem.bias_dtype is not None and not problem.prune_bias:
            fixed[:, -1] = True
        W, mine = problem.working(g, torch.float64), kept[g].contiguous()
        made, _, used = ops.exchange_(
            W, inverse.A, mine, fixed=fixed, group=group, backend=problem.backend
        )
        if used != problem.backend and g == 0:
            problem.said.append(
                f"exchanged on the CPU: {problem.backend} has no kernel for it, {used} did it"
            )
        kept[g], after[g] = mine, W
        swaps += int(made.sum())
    return ~kept, problem.restored(after, ~kept), swaps


def _bisect(
    problem: Problem, solver: Greedy | Sweep | Ranked, scope: str, limit: float
) -> tuple[Tensor, Tensor]:
    """The largest removal found whose incurred error is at or below ``limit``."""
    if isinstance(solver, Greedy):
        solver.trace_all(problem.before.shape[2])
    steps = problem.candidates if scope == "row" else problem.total
    low, high = 0, steps  # low is feasible; nothing above high is
    best = solver.prune(0.0, scope)
    while low < high:
        middle = (low + high + 1) // 2
        tried = solver.prune(middle / steps, scope)
        if problem.error(*problem.rounded(tried[1])) <= limit:
            low, best = middle, tried
        else:
            high = middle - 1
    return best
