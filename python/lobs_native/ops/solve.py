"""Small symmetric systems, one per row: the optimal weights for given masks."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing, full_precision, has

__all__ = ["support_solve_"]

_SOLVED_TOGETHER = 256 << 20  # bytes of systems that torch solves at once
_SIZES = 32  # torch solves systems together if their sizes round up to the same multiple of this


def support_solve_(X: Tensor, M: Tensor, chosen: Tensor, *, backend: str | None = None) -> str:
    """Solve one small symmetric system per row: ``M[P, P] x = b[P]``, with one M for all rows.

    Parameters
    ----------
    X : (R, C) float64 or float32, contiguous
        Right-hand sides. Overwritten by the solutions; entries outside P become zero.
    M : (C, C) of X's dtype, symmetric positive definite
        Not modified.
    chosen : (R, C) bool
        P of each row. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that was used. One without this operation leaves it to torch, on its device.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NonFiniteError
        X or M holds a NaN or an infinity; X is untouched.
    NotPositiveDefiniteError
        M[P, P] is not positive definite for some row; the message names it. Discard X.

    Notes
    -----
    With M = A (inverse second moment) and P removed, ``w - A[:, P] x`` is the best repair of w
    (Hassibi & Stork 1993 for several weights at once).
    """
    X = checks.output(X, "X", ndim=2, dtypes=(torch.float64, torch.float32))
    M = checks.tensor(M, "M", ndim=2, dtypes=(X.dtype,)).contiguous()
    P = checks.tensor(chosen, "chosen", ndim=2, dtypes=(torch.bool,)).contiguous()
    R, C = X.shape
    checks.square(M, "M", X, "X")
    if P.shape != X.shape:
        raise ShapeError(f"chosen is {tuple(P.shape)} but X is ({R}, {C})")
    for x, name in ((M, "M"), (P, "chosen")):
        checks.same_device(X, "X", x, name)
        checks.apart(X, "X", x, name)
    checks.check_finite(X, "X")
    checks.check_finite(M, "M")
    name = dispatch.select_backend(backend, X.device)
    if X.numel() == 0:
        return name
    if name == "reference":
        row = reference.support_solve_(X, M, P)
    elif not has(name, "support_solve"):
        row = _solve_in_batches(X, M, P)
    else:
        status, row = call("support_solve", name, X.device, crossing(X), M.data_ptr(), P.data_ptr())
        if status != Status.NOT_POSITIVE:
            check_status(status)
            row = -1
    if row >= 0:
        raise NotPositiveDefiniteError(
            f"M: not positive definite on the {int(P[row].sum())} columns of row {row}: raise the "
            "damping, or use float64"
        )
    return name


@full_precision()
def _solve_in_batches(X: Tensor, M: Tensor, P: Tensor) -> int:
    """Solve by torch's batched Cholesky: -1, or the lowest row without a solution.

    Systems of similar sizes are padded with the identity and solved together.
    """
    C = X.shape[1]
    counts = P.sum(1)  # (R,)
    rounded = ((counts + _SIZES - 1) // _SIZES * _SIZES).clamp_max(C)
    failed = torch.zeros(len(X), dtype=torch.bool, device=X.device)
    for k in rounded.unique().tolist():
        rows = (rounded == k).nonzero()[:, 0]
        if k == 0:
            X[rows] = 0
            continue
        # The systems, their factors, torch's copies of both while it solves, and the sort.
        each = 4 * X.element_size() * k * k + 16 * C
        for some in rows.split(max(1, _SOLVED_TOGETHER // each)):
            inside = torch.arange(k, device=X.device) < counts[some, None]  # (n, k)
            # The chosen columns in order, then others as padding.
            columns = P[some].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
            systems = M[columns[:, :, None], columns[:, None, :]]  # (n, k, k)
            systems.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0)
            systems.diagonal(dim1=1, dim2=2).masked_fill_(~inside, 1)
            sides = X[some].gather(1, columns).masked_fill_(~inside, 0)
            factors, info = torch.linalg.cholesky_ex(systems)
            del systems
            finite = torch.isfinite(factors.diagonal(dim1=1, dim2=2)).all(1)
            failed[some] = (info != 0) | ~finite
            solved = torch.cholesky_solve(sides[:, :, None], factors)[:, :, 0]
            X[some] = torch.zeros_like(X[some]).scatter_(1, columns, solved)
    return int(failed.to(torch.uint8).argmax()) if bool(failed.any()) else -1
