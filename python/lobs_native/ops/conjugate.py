"""A step of conjugate gradients for every row, each with its own support."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import call, check_status, crossing, has

__all__ = ["conjugate_step_"]


def conjugate_step_(
    w: Tensor,
    g: Tensor,
    p: Tensor,
    h: Tensor,
    removed: Tensor,
    rr: Tensor,
    *,
    backend: str | None = None,
) -> str:
    """Step towards the solution of ``H[S, S] w[S] = b[S]`` in every row, S its kept columns.

    ``a = rr / <p, h>``, ``w += a p``, ``g -= a h``, ``t = <g, g>``, ``p = g + (t / rr) p``,
    ``rr = t``, all on S. To start, ``g = p = b - w H`` on S and zero elsewhere, ``rr = <g, g>``.

    Parameters
    ----------
    w : (R, C) float64 or float32, columns contiguous
        The weights. Written in place where kept.
    g, p : (R, C) of w's dtype, columns contiguous, zero where removed
        The residual and the direction. Written in place.
    h : (R, C) of w's dtype
        The product ``p H``. Not modified.
    removed : (R, C) bool
        False where a weight is kept. Not modified.
    rr : (R,) float64, contiguous
        ``<g, g>`` of every row. Written in place. A row where it is 0 is left alone, and one where
        ``<p, h>`` is not positive and finite ends: it keeps its weights, and rr becomes 0.
    backend : str, optional
        A name from ``backends()``. Without one, a backend that lacks this operation leaves it to
        plain torch.

    Returns
    -------
    str
        The backend that was used.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit; nothing is written.

    Notes
    -----
    Source: Hestenes & Stiefel 1952; Meng et al. 2024 (ALPS).
    """
    floats = (torch.float64, torch.float32)
    w = checks.output(w, "w", ndim=2, dtypes=floats, rows_apart=True)
    g = checks.output(g, "g", ndim=2, dtypes=(w.dtype,), rows_apart=True)
    p = checks.output(p, "p", ndim=2, dtypes=(w.dtype,), rows_apart=True)
    h = checks.tensor(h, "h", ndim=2, dtypes=(w.dtype,))
    removed = checks.tensor(removed, "removed", ndim=2, dtypes=(torch.bool,)).contiguous()
    rr = checks.output(rr, "rr", ndim=1, dtypes=(torch.float64,))
    R, C = w.shape
    h = h if C == 0 or h.stride(1) == 1 else h.contiguous()
    written = ((w, "w"), (g, "g"), (p, "p"), (rr, "rr"))
    for i, (x, name) in enumerate((*written, (h, "h"), (removed, "removed"))):
        shape = (R,) if x is rr else (R, C)
        if x.shape != shape:
            raise ShapeError(f"{name} is {tuple(x.shape)} but w is ({R}, {C}): it must be {shape}")
        checks.same_device(w, "w", x, name)
        for out, other in written[:i]:
            checks.apart(out, other, x, name)
    chosen = dispatch.select_backend(backend, w.device)
    if w.numel() == 0:
        return chosen
    if chosen == "reference" or not has(chosen, "conjugate_step"):
        reference.conjugate_step_(w, g, p, h, removed, rr)
        return "reference"
    status, _ = call(
        "conjugate_step",
        chosen,
        w.device,
        crossing(w),
        crossing(g),
        crossing(p),
        crossing(h),
        removed.data_ptr(),
        rr.data_ptr(),
    )
    check_status(status)
    return chosen
