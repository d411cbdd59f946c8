"""Accumulation of second moments, one chunk of inputs at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing

__all__ = ["hessian_accumulate_"]


def hessian_accumulate_(
    H: Tensor,
    X: Tensor,
    weights: Tensor | None = None,
    *,
    ones: bool = False,
    backend: str | None = None,
) -> str:
    """Add a chunk's second moment to the lower triangle of ``H``: ``H += X^T diag(weights) X``.

    Parameters
    ----------
    H : (D, D) float64 or float32, contiguous
        Written in place; only the lower triangle is read or written.
    X : (N, C) float64, float32, float16 or bfloat16, any strides
        Not modified. D = C, or C + 1 with ``ones``.
    weights : (N,) float, finite, >= 0, optional
        Weight of each row. Rows of weight 0 are not read.
    ones : bool
        Treat X as if a last column of ones followed it (for a bias).
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that was used.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NonFiniteError
        X or weights holds a NaN or an infinity; H is untouched.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, eq. 9 (times the number of rows).
    """
    H = checks.output(H, "H", ndim=2, dtypes=(torch.float64, torch.float32))
    X = checks.tensor(X, "X", ndim=2)
    checks.flag(ones, "ones")
    D = X.shape[1] + (1 if ones else 0)
    if H.shape != (D, D):
        raise ShapeError(f"H is {tuple(H.shape)} but X is {tuple(X.shape)}: H must be ({D}, {D})")
    checks.same_device(H, "H", X, "X")
    checks.apart(H, "H", X, "X")
    if weights is not None:
        checks.apart(H, "H", checks.tensor(weights, "weights", dtypes=checks.WEIGHTS), "weights")
        weights = checks.token_weights(weights, X.shape[0], X.device)
    chosen = dispatch.select_backend(backend, H.device)
    if X.shape[0] == 0:
        return chosen
    if chosen == "reference":
        checks.check_finite(X, "X", None if weights is None else weights > 0)
        reference.hessian_accumulate_(H, X, weights, ones)
        return chosen
    pointer = 0 if weights is None else weights.data_ptr()
    status, where = call(
        "hessian_accumulate", chosen, H.device, crossing(H), crossing(X), pointer, ones
    )
    if status == Status.NOT_FINITE:
        raise checks.not_finite("X", X, where)
    check_status(status)
    return chosen
