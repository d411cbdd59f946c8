"""The cheapest removal of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing

__all__ = ["saliency_argmin"]


def saliency_argmin(
    W: Tensor, diag: Tensor, live: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Find the live weight of every row that costs least to remove, ``w_q**2 / diag_q``.

    Parameters
    ----------
    W : (R, C) float64 or float32
        One output unit per row. Not modified.
    diag : (C,) or (R, C), W's dtype, positive where live
        Diagonal of the inverse second moment. Not modified.
    live : (C,) or (R, C) bool
        True where a removal is allowed. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    column : (R,) int64
        The lowest column on a tie; -1 where nothing is live.
    value : (R,) W's dtype
        Its cost, the exact increase of tr(dW H dW^T); infinity where nothing is live.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NotPositiveDefiniteError
        A live entry of ``diag`` is not positive and finite; the message names row and column.
    NonFiniteError
        A live weight is not finite; the message names row and column.

    Notes
    -----
    All backends agree exactly, ties included: there is no sum to reorder.
    Source: Hassibi & Stork 1993; Dong, Chen & Pan 2017, eq. 6, without its factor 1/2.
    """
    W = checks.tensor(W, "W", ndim=2, dtypes=(torch.float64, torch.float32))
    diag = checks.tensor(diag, "diag", dtypes=(W.dtype,))
    live = checks.tensor(live, "live", dtypes=(torch.bool,))
    R, C = W.shape
    for x, name in ((diag, "diag"), (live, "live")):
        if tuple(x.shape) not in ((C,), (R, C)):
            raise ShapeError(
                f"{name} is {tuple(x.shape)} but W is ({R}, {C}): it must be ({C},) or ({R}, {C})"
            )
        checks.same_device(W, "W", x, name)
    chosen = dispatch.select_backend(backend, W.device)
    W, diag, live = (x.contiguous().expand(R, C) for x in (W, diag, live))
    column = torch.empty(R, dtype=torch.int64, device=W.device)
    value = torch.empty(R, dtype=W.dtype, device=W.device)
    if R == 0:
        return column, value
    if chosen == "reference" or C == 0:
        fault = live & ~((diag > 0) & torch.isfinite(diag) & torch.isfinite(W))
        where = int(fault.reshape(-1).to(torch.uint8).argmax()) if bool(fault.any()) else -1
        if where < 0:
            if C:
                column, value = reference.saliency_argmin(W, diag, live)
            else:
                column.fill_(-1)
                value.fill_(torch.inf)
    else:
        status, where = call(
            "saliency_argmin",
            chosen,
            W.device,
            column.data_ptr(),
            value.data_ptr(),
            crossing(W),
            crossing(diag),
            crossing(live),
        )
        if status not in (Status.NOT_FINITE, Status.NOT_POSITIVE):
            check_status(status)
            where = -1
    if where >= 0:
        r, q = divmod(where, C)
        if not 0 < float(diag[r, q]) < float("inf"):
            raise NotPositiveDefiniteError(
                f"diag: {float(diag[r, q])} at row {r}, column {q}; it must be positive and "
                "finite where live: raise the damping"
            )
        raise NonFiniteError(
            f"W: {float(W[r, q])} at row {r}, column {q}, which is live; inputs must be finite"
        )
    return column, value
