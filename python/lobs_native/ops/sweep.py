"""One block of columns of SparseGPT's sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import Status, call, check_status, crossing

__all__ = ["sweep_block_"]


def sweep_block_(
    W: Tensor,
    U: Tensor,
    gone: Tensor,
    E: Tensor,
    *,
    group: int = 0,
    per_group: int = 0,
    backend: str | None = None,
) -> str:
    """Sweep one block of columns as SparseGPT does: choose, remove, and repair within the block.

    For each column j, ``e = w_j / U_jj`` where it goes, and ``w[j:] -= e U[j, j:]``. The caller
    repairs the columns to the right of the block: ``W[:, right] -= E @ U[block, right]``.

    Parameters
    ----------
    W : (R, B) float64 or float32, columns contiguous
        The block, which may be part of a larger matrix. Written in place.
    U : (B, B) of W's dtype, columns contiguous
        Diagonal block of the upper factor, ``U^T U = A``. Not modified.
    gone : (R, B) uint8, contiguous
        Without a group: 1 where a weight goes. With one: values of :class:`WeightState`, where
        those that go first count; overwritten by the choice, 1 where a weight goes.
    E : (R, B) of W's dtype, columns contiguous
        Overwritten by e, zero where a weight stays.
    group, per_group : int
        The ``per_group`` columns of lowest ``w**2 / U_jj**2`` of every ``group`` columns go. B must
        be a multiple of ``group``.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that was used.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NotPositiveDefiniteError
        A diagonal entry of U is not positive; nothing is written.

    Notes
    -----
    Source: Frantar & Alistarh 2023 (SparseGPT), algorithm 1.
    """
    floats = (torch.float64, torch.float32)
    W = checks.output(W, "W", ndim=2, dtypes=floats, rows_apart=True)
    U = checks.tensor(U, "U", ndim=2, dtypes=(W.dtype,))
    E = checks.output(E, "E", ndim=2, dtypes=(W.dtype,), rows_apart=True)
    gone = checks.output(gone, "gone", ndim=2, dtypes=(torch.uint8,))
    R, B = W.shape
    checks.square(U, "U", W, "W")
    U = U if B == 0 or U.stride(1) == 1 else U.contiguous()
    for x, name in ((gone, "gone"), (E, "E")):
        if x.shape != W.shape:
            raise ShapeError(f"{name} is {tuple(x.shape)} but W is ({R}, {B})")
    for x, name in ((U, "U"), (gone, "gone"), (E, "E")):
        checks.same_device(W, "W", x, name)
        checks.apart(W, "W", x, name)
    for x, name in ((U, "U"), (gone, "gone")):
        checks.apart(E, "E", x, name)
    checks.apart(gone, "gone", U, "U")
    group = checks.count(group, "group")
    per_group = checks.count(per_group, "per_group")
    if group and (B % group or per_group > group):
        raise ArgumentError(
            f"group: {per_group} of {group} columns do not fit a block of {B} columns"
        )
    chosen = dispatch.select_backend(backend, W.device)
    if W.numel() == 0:
        return chosen
    if chosen == "reference":
        bad = ~(U.diagonal() > 0)
        status, j = Status.OK, 0
        if bool(bad.any()):
            status, j = Status.NOT_POSITIVE, int(bad.to(torch.uint8).argmax())
        else:
            reference.sweep_block_(W, U, gone, E, group, per_group)
    else:
        status, j = call(
            "sweep_block",
            chosen,
            W.device,
            crossing(W),
            crossing(U),
            gone.data_ptr(),
            crossing(E),
            group,
            per_group,
        )
    if status == Status.NOT_POSITIVE:
        raise NotPositiveDefiniteError(
            f"U: {float(U[j, j])} at ({j}, {j}); it must be positive: raise the damping"
        )
    check_status(status)
    return chosen
