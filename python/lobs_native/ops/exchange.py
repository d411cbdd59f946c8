"""Exchange of kept weights for removed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing, has

__all__ = ["exchange_"]


def exchange_(
    W: Tensor,
    A: Tensor,
    kept: Tensor,
    *,
    fixed: Tensor | None = None,
    group: int = 0,
    limit: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, str]:
    """Swap a kept weight of a row for a removed one, as long as a swap lowers the error.

    Each round makes the one swap, among all pairs, that lowers ``dw H dw^T`` most. At the end the
    kept weights are optimal for the final set.

    Parameters
    ----------
    W : (R, C) float64, contiguous
        The original weights. Overwritten by the repaired ones, zero where removed.
    A : (C, C) float64, symmetric positive definite
        Damped inverse second moment. Not modified.
    kept : (R, C) bool, contiguous
        The kept set to start from. Overwritten by the final one.
    fixed : (R, C) bool, optional
        True where a weight stays on its side. Not modified.
    group : int
        Swap only within groups of this many columns (N:M patterns); 0 = anywhere in the row.
    limit : int, optional
        Maximum number of swaps per row; 0 only solves for the best weights.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    swaps : (R,) int64
        The number of swaps made.
    left : (R,) float64
        The remaining error of the row, in the damped second moment.
    str
        The backend that was used. Tensors of a device whose backend has no exchange are copied to
        the CPU and back; then this is a CPU level.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NonFiniteError
        W or A holds a NaN or an infinity; nothing is written.
    NotPositiveDefiniteError
        A is not positive definite on the columns of some row; discard W and kept.

    Notes
    -----
    Source: exchange steps of subset selection (Miller 2002, section 3.5).
    """
    W = checks.output(W, "W", ndim=2, dtypes=(torch.float64,))
    A = checks.tensor(A, "A", ndim=2, dtypes=(torch.float64,)).contiguous()
    kept = checks.output(kept, "kept", ndim=2, dtypes=(torch.bool,))
    R, C = W.shape
    checks.square(A, "A", W, "W")
    if fixed is not None:
        fixed = checks.tensor(fixed, "fixed", ndim=2, dtypes=(torch.bool,)).contiguous()
        checks.apart(W, "W", fixed, "fixed")
        checks.apart(kept, "kept", fixed, "fixed")
    for x, name in ((kept, "kept"), (fixed, "fixed")):
        if x is not None and x.shape != W.shape:
            raise ShapeError(f"{name} is {tuple(x.shape)} but W is ({R}, {C})")
        if x is not None:
            checks.same_device(W, "W", x, name)
    checks.same_device(W, "W", A, "A")
    checks.apart(W, "W", A, "A")
    checks.apart(W, "W", kept, "kept")
    group = checks.count(group, "group")
    group = min(group, C + 1)  # more columns than there are
    rounds = 10 * C if limit is None else min(10 * C, checks.count(limit, "limit"))
    checks.check_finite(W, "W")
    checks.check_finite(A, "A")
    chosen = dispatch.select_backend(backend, W.device)
    swaps = torch.zeros(R, dtype=torch.int64, device=W.device)
    left = torch.zeros(R, dtype=torch.float64, device=W.device)
    if W.numel() == 0:
        return swaps, left, chosen
    if chosen == "reference":
        swaps, left, row = reference.exchange_(W, A, kept, fixed, group, rounds)
    elif not has(chosen, "exchange"):
        return _exchange_on_host(W, A, kept, fixed, group, rounds)
    else:
        status, row = call(
            "exchange",
            chosen,
            W.device,
            kept.data_ptr(),
            swaps.data_ptr(),
            left.data_ptr(),
            crossing(W),
            A.data_ptr(),
            0 if fixed is None else fixed.data_ptr(),
            group,
            rounds,
        )
        if status != Status.NOT_POSITIVE:
            check_status(status)
            row = -1
    if row >= 0:
        raise NotPositiveDefiniteError(
            f"A: not positive definite on the removed columns of row {row}: raise the damping"
        )
    return swaps, left, chosen


def _exchange_on_host(
    W: Tensor, A: Tensor, kept: Tensor, fixed: Tensor | None, group: int, limit: int
) -> tuple[Tensor, Tensor, str]:
    """Run :func:`exchange_` on the CPU for tensors of a device."""
    w, k = W.cpu(), kept.cpu()
    swaps, left, used = exchange_(
        w,
        A.cpu(),
        k,
        fixed=None if fixed is None else fixed.cpu(),
        group=group,
        limit=limit,
        backend="cpu",
    )
    W.copy_(w)
    kept.copy_(k)
    return swaps.to(W.device), left.to(W.device), used
