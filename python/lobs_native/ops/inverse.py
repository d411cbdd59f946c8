"""Updates of inverse second moments, in diagonal blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import DTYPES, Status, call, check_status, crossing, full_precision

__all__ = ["inverse_update_"]

_SAMPLES = 4096  # samples in one native call, so that Ctrl-C takes effect soon
_LARGE_BLOCK = 512  # larger blocks are one large matrix product, which torch does best
_TOGETHER = 1 << 24  # entries of such blocks that torch updates at once


def inverse_update_(F: Tensor, G: Tensor, m: float, *, backend: str | None = None) -> str:
    """Update inverse second moments with r samples.

    For every block: ``F <- F - F G^T (m I + G F G^T)^-1 G F``. This equals r rank-1 updates.

    Parameters
    ----------
    F : (blocks, B, B) float64 or float32, contiguous, symmetric
        Written in place.
    G : (r, d) of F's dtype, (blocks - 1) * B < d <= blocks * B
        One sample per row. Block b sees columns b*B .. b*B+B-1; missing columns count as zero. Not
        modified.
    m : float > 0
        Number of samples in the mean.
    backend : str, optional
        A name from ``backends()``. On any backend but ``"reference"``, torch's matrix products
        update blocks larger than 512, and on a device also blocks that its shared memory does not
        hold.

    Returns
    -------
    str
        The backend that was used, or ``"torch"`` for large blocks.

    Raises
    ------
    NonFiniteError
        G holds a NaN or an infinity; F is untouched.
    NotPositiveDefiniteError
        F lost definiteness; the message names the block. Discard F.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, section 3.4.1; WoodFisher and oBERT for blocks.
    """
    F = checks.output(F, "F", ndim=3, dtypes=(torch.float64, torch.float32))
    G = checks.tensor(G, "G", ndim=2, dtypes=(F.dtype,))
    blocks, B, _ = F.shape
    d = G.shape[1]
    if F.shape[2] != B or not (blocks - 1) * B < d <= blocks * B:
        raise ShapeError(
            f"F is {tuple(F.shape)} and G is {tuple(G.shape)}: F must be (blocks, B, B), and G "
            "must have more than (blocks - 1) * B and at most blocks * B columns"
        )
    checks.same_device(F, "F", G, "G")
    checks.apart(F, "F", G, "G")
    m = checks.real(m, "m")
    if not 0 < m <= torch.finfo(F.dtype).max:
        raise ArgumentError(f"m: {m}; it must be positive and fit into {F.dtype}")
    chosen = dispatch.select_backend(backend, F.device)
    if G.shape[0] == 0:
        return chosen
    if chosen == "reference":
        checks.check_finite(G, "G")
        if (block := reference.inverse_update_(F, G, m)) >= 0:
            raise _lost_definiteness(block)
        return chosen
    if B > _LARGE_BLOCK:
        checks.check_finite(G, "G")
        _update_large(F, G, m)
        return "torch"
    G = G.contiguous()
    if G.shape[0] > _SAMPLES:
        checks.check_finite(G, "G")  # all of it, before the first part is written
    for part in G.split(_SAMPLES):
        status, where = call(
            "inverse_update",
            chosen,
            F.device,
            F.data_ptr(),
            DTYPES[F.dtype],
            blocks,
            B,
            crossing(part),
            float(m),
        )
        if status == Status.UNSUPPORTED:  # the device's shared memory does not hold a block
            checks.check_finite(G, "G")
            _update_large(F, G, m)
            return "torch"
        if status == Status.NOT_FINITE:
            raise checks.not_finite("G", G, where)
        if status == Status.NOT_POSITIVE:
            raise _lost_definiteness(where)
        check_status(status)
    return chosen


def _lost_definiteness(block: int) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"F: block {block} is no longer positive definite; discard F. Start from a smaller alpha, "
        "or use float64."
    )


@full_precision()
def _update_large(F: Tensor, G: Tensor, m: float) -> None:
    """Update blocks with torch's products, several at once if they are small."""
    blocks, B, _ = F.shape
    together = max(1, _TOGETHER // (B * B))
    for first in range(0, blocks, together):
        f = F[first : first + together]  # (b, B, B), a view
        part = G[:, first * B : (first + together) * B]
        if missing := f.shape[0] * B - part.shape[1]:
            part = torch.nn.functional.pad(part, (0, missing))
        for g in part.unflatten(1, (-1, B)).transpose(0, 1).split(min(B, _LARGE_BLOCK), dim=1):
            y = g @ f  # (b, r, B)
            s = y @ g.mT  # (b, r, r)
            s.diagonal(dim1=1, dim2=2).add_(m)
            factor, info = torch.linalg.cholesky_ex(s)
            finite = torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(dim=1)
            if bool((lost := (info != 0) | ~finite).any()):
                raise _lost_definiteness(first + int(lost.to(torch.uint8).argmax()))
            z = torch.linalg.solve_triangular(factor, y, upper=False)  # (b, r, B)
            f.baddbmm_(z.mT, z, alpha=-1)
