"""The best weights for a mask, and better masks by exchanging single weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.solvers.conjugate import conjugate_gradients_
from lobs_native.solvers.kept_columns import regressed
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.workspace import Workspace

__all__ = ["exchange", "repair", "solve"]

_STEPS = 100  # of conjugate gradients, up to about which they are faster than factorisations
_GAIN = 1e-12  # of the squared gradient over the error, where they end


def solve(
    problem: Problem, removed: Tensor, *, precise: bool | None = None, from_kept: bool = False
) -> Tensor:
    """(G, R, D): the best weights that are zero in ``removed`` (G, R, D).

    Solves for the multipliers of the removed weights or for the change of the kept ones, whichever
    are fewer: ``w - A[:, P] A[P, P]^-1 w[P]``, or ``w[S] + H[S, S]^-1 H[S, P] w[P]``. ``from_kept``
    takes the second, whose error does not grow with the condition of H. ``precise`` computes in
    float64. Where rows keep so many weights that it is faster, the second is solved by conjugate
    gradients, for all rows at once. Rows that all lose the same are served by one inverse, in
    float64, with more damping where samples are few: :func:`regressed`.
    """
    precise = problem.precise if precise is None else precise
    dtype = torch.float64 if precise else torch.float32
    parts = []
    for g, inverse in enumerate(problem.inverses):
        w, P = problem.working(g, dtype), removed[g].contiguous()
        if len(P) > 1 and bool(P[0].any()) and bool((P[0] == P).all()):
            parts.append(_solve_alike(problem, g, P[0]).to(dtype))
            continue
        count = P.sum(1, dtype=torch.float64)
        lost = torch.where(P, w, 0.0)
        fewer = float((count**3).sum()) <= float(((P.shape[1] - count) ** 3).sum())
        if fewer and not from_kept:
            A = inverse.A.to(dtype)
            lost = _solve_rows(problem, lost, A, P)
            parts.append(w.addmm_(lost, A, alpha=-1))
        else:
            H = problem.damped(g).to(dtype)
            # Flops of a factorisation for each row, and of the steps that are usual in float64.
            directly = float(((P.shape[1] - count) ** 3).sum()) / 3
            steps = _STEPS * 2 * w.numel() * len(H)
            narrower = problem.weight_dtype != torch.float64  # whose rounding they do not reach
            if directly > steps and narrower and _approached(w, H, P, problem.workspace):
                parts.append(w)
                continue
            change = _solve_rows(problem, lost @ H, H, ~P)
            parts.append(w.add_(change))
    after = parts[0][None] if len(parts) == 1 else torch.stack(parts)
    return problem.restored(after, removed)


def _solve_rows(problem: Problem, X: Tensor, M: Tensor, chosen: Tensor) -> Tensor:
    """(R, D): :func:`ops.support_solve_`, of which each of the processes that share the rows does
    its own; X (R, D) is overwritten."""
    rows, own = problem.workspace.rows, problem.workspace.rows.own(len(X))
    error = None
    try:
        ops.support_solve_(X[own], M, chosen[own], backend=problem.workspace.backend)
    except NotPositiveDefiniteError as caught:
        error = caught
    if any(failed for (failed,) in rows.values([error is not None])):
        raise error or NotPositiveDefiniteError(
            "hessian: what is kept or removed of it is not positive definite in rows of another "
            "rank; pass a larger damping"
        )
    return rows.joined(X[own], len(X))


def _solve_alike(problem: Problem, g: int, removed: Tensor) -> Tensor:
    """(R, D) float64: the best weights of group g where all rows lose the same, (D,) bool, with
    more damping where its rows are few; see :func:`regressed`."""
    w, scale = problem.working(g, torch.float64), problem.inverses[g].scale
    shift, rows = problem.shift(g) / scale, problem.rows(g)
    found = regressed(problem.moments[g], w[:, removed], removed, shift, rows, scale)
    if found is None:
        raise NotPositiveDefiniteError(
            "hessian: what is kept of it is not positive definite; pass a larger damping"
        )
    problem.solved_with(g, removed, found.factor)
    w[:, ~removed] += found.change
    return w


def _approached(w: Tensor, H: Tensor, removed: Tensor, workspace: Workspace) -> bool:
    """Replace w (R, D) by its best weights for ``removed`` by conjugate gradients. False, and w as
    it was, if they did not arrive."""
    own = workspace.rows.own(len(w), whole_blocks=True)
    s = H.diagonal().sqrt()
    x = w[own] * s
    after = x.masked_fill(removed[own], 0.0)
    arrived = conjugate_gradients_(
        after[None],
        x[None],
        (H / s / s[:, None])[None],
        removed[None, own],
        gain=_GAIN,
        tolerance=torch.finfo(w.dtype).eps ** 0.5,
        most=2 * _STEPS,
        backend=workspace.backend,
        rows=workspace.rows,
        count=len(w),
    )
    if arrived:
        torch.div(workspace.rows.joined(after, len(w), whole_blocks=True), s, out=w)
    return arrived


def repair(problem: Problem, removed: Tensor) -> Tensor:
    """:func:`solve`; in float64, with a note, where float32 is not enough."""
    if not problem.precise:
        try:
            return solve(problem, removed)
        except NotPositiveDefiniteError:
            problem.workspace.note(
                "the kept weights were solved for in float64: float32 was too narrow"
            )
    return solve(problem, removed, precise=True)


def exchange(problem: Problem, pattern: Pattern, removed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Swap kept against removed weights, row by row, in float64, as long as a swap gains.

    Returns what is removed then (G, R, D), the weights (G, R, D) and the number of swaps. Nothing
    that the mask removes comes back.
    """
    workspace = problem.workspace
    kept, after = ~removed, torch.empty_like(problem.before, dtype=torch.float64)
    fixed = problem.masked()
    if problem.bias_stays:
        fixed[:, :, -1] = True
    swaps = 0
    for g, inverse in enumerate(problem.inverses):
        rows, own = workspace.rows, workspace.rows.own(kept.shape[1])
        W, support = problem.working(g, torch.float64)[own], kept[g, own].contiguous()
        count, _, used = ops.exchange_(
            W,
            inverse.A,
            support,
            fixed=fixed[g, own],
            group=pattern.group,
            backend=workspace.backend,
        )
        if used != workspace.backend and g == 0:
            workspace.note(
                f"exchanged on the CPU: {workspace.backend} has no kernel for it, {used} did it"
            )
        kept[g] = rows.joined(support, kept.shape[1])
        after[g] = rows.joined(W, kept.shape[1])
        swaps += sum(made for (made,) in rows.values([int(count.sum())]))
    return ~kept, problem.restored(after, ~kept), swaps
