"""Removal in a fixed order: the paper's method."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing

__all__ = ["static_order_prune_"]


def static_order_prune_(
    W: Tensor, A: Tensor, order: Tensor, start: Tensor, *, backend: str | None = None
) -> str:
    """Remove given weights from every row in a given order, without downdating the inverse.

    This is the paper's update. For each q in the order of a row, ``w -= (w_q / A_qq) * A[:, q]``
    with the current ``w_q``; then the removed weights become zero. It equals one triangular solve:
    ``c = -tril(A[P, P])^-1 w[P]``, ``w += A[:, P] c``, ``w[P] = 0``.

    Parameters
    ----------
    W : (R, C) float64 or float32, contiguous
        Written in place.
    A : (C, C) of W's dtype, symmetric
        Inverse second moment, shared by all rows. Not modified.
    order : (K,) int32
        Columns to remove, row after row, each at most once per row. Not modified.
    start : (R + 1,) int64
        Row r owns ``order[start[r]:start[r + 1]]``. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that was used.

    Raises
    ------
    ShapeError, ArgumentError
        Shapes disagree, or order and start do not describe removals.
    NotPositiveDefiniteError
        The diagonal entry of A of a column to be removed is not positive; W is untouched.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, algorithm 1 and eq. 6.
    """
    W = checks.output(W, "W", ndim=2, dtypes=(torch.float64, torch.float32))
    checks.check_finite(W, "W")
    A = checks.tensor(A, "A", ndim=2, dtypes=(W.dtype,)).contiguous()
    order = checks.tensor(order, "order", ndim=1, dtypes=(torch.int32,)).contiguous()
    start = checks.tensor(start, "start", ndim=1, dtypes=(torch.int64,)).contiguous()
    R, C = W.shape
    checks.square(A, "A", W, "W")
    if start.shape != (R + 1,):
        raise ShapeError(
            f"W is ({R}, {C}) but start is {tuple(start.shape)}: it must be ({R + 1},)"
        )
    for x, name in ((A, "A"), (order, "order"), (start, "start")):
        checks.same_device(W, "W", x, name)
        checks.apart(W, "W", x, name)
    K = order.numel()
    in_range = int(start.min()) >= 0 and int(start.max()) <= K  # so that differences fit
    count = start.diff()  # (R,)
    if not in_range or int(start[0]) != 0 or int(start[-1]) != K or (R and int(count.min()) < 0):
        raise ArgumentError(f"start: it must rise from 0 to {K}, the length of order")
    chosen = dispatch.select_backend(backend, W.device)
    if K == 0:
        return chosen
    checks.check_finite(A, "A")
    if chosen == "reference":
        status, where = _check_order(A, order, start)
        if status == Status.OK:
            reference.static_order_prune_(W, A, order, start)
    else:
        status, where = call(
            "static_order_prune",
            chosen,
            W.device,
            crossing(W),
            A.data_ptr(),
            order.data_ptr(),
            start.data_ptr(),
        )
    if status == Status.BAD_ORDER:
        r = int(torch.searchsorted(start, where, right=True)) - 1
        raise ArgumentError(
            f"order: column {int(order[where])} of row {r} is not in 0 to {C - 1}, or occurs twice"
        )
    if status == Status.NOT_POSITIVE:
        q = int(order[where])
        raise NotPositiveDefiniteError(
            f"A: {float(A[q, q])} at ({q}, {q}), but it must be positive to remove column {q}: "
            "raise the damping"
        )
    check_status(status)
    return chosen


def _check_order(A: Tensor, order: Tensor, start: Tensor) -> tuple[Status, int]:
    """The native check in plain Python: the status, and the position of the first fault."""
    positive = (A.diagonal() > 0).tolist()
    bounds = start.tolist()
    for first, last in itertools.pairwise(bounds):
        seen: set[int] = set()
        for place, q in enumerate(order[first:last].tolist(), first):
            if not 0 <= q < len(positive) or q in seen:
                return Status.BAD_ORDER, place
            if not positive[q]:
                return Status.NOT_POSITIVE, place
            seen.add(q)
    return Status.OK, 0
