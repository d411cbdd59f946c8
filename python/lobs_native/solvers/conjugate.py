"""The best kept weights for a mask by conjugate gradients, for all rows of a layer at once.

A step costs one product of the layer's size, whatever the mask is. Solving row by row costs the
cube of what a row keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.problem import spectral_norm

__all__ = ["conjugate_gradients_", "times"]


def conjugate_gradients_(
    w: Tensor,
    x: Tensor,
    H: Tensor,
    removed: Tensor,
    *,
    gain: float,
    tolerance: float,
    most: int,
    backend: str | None = None,
) -> bool:
    """Lower ``E = tr((w - x) H (w - x)^T)`` over the kept weights, in place.

    Parameters
    ----------
    w : (G, R, D) contiguous, zero where removed
        Where to begin; overwritten.
    x : (G, R, D) of w's dtype, contiguous
        The weights to come close to. Overwritten.
    H : (G, D, D) of w's dtype
        Symmetric and positive definite, best with a diagonal near one. Not modified.
    removed : (G, R, D) bool
    gain, tolerance : float
        The steps end when the squares of the gradient ``g = (x - w) H`` on the kept weights add up
        to at most ``gain`` times the E of the beginning, and in no row ``||g||`` is above
        ``tolerance`` times ``||H||`` times the distance from x at the beginning. (As a multiple of
        ``D eps``, the latter is an optimality ratio.)
    most : int
        The most steps. Each step, and the beginning, costs one product.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    bool
        Whether they ended before ``most``.
    """
    rows, D = w.shape[0] * w.shape[1], w.shape[2]
    g, h = torch.empty_like(w), torch.empty_like(w)
    times(x.sub_(w), H, out=g)
    below = gain * float(torch.linalg.vecdot(x, g).sum(dtype=torch.float64))
    g.masked_fill_(removed, 0.0)
    norms = torch.tensor([spectral_norm(M) for M in H], dtype=torch.float64, device=w.device)
    enough = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64)
    enough = enough.mul_(tolerance * norms[:, None]).square_().view(rows)
    p = x.copy_(g)
    rr = torch.linalg.vector_norm(g, dim=2, dtype=torch.float64).square_().view(rows)
    flat_w, flat_g, flat_p, flat_h = (t.view(rows, D) for t in (w, g, p, h))
    step = 0
    while True:
        done = float(rr.sum()) <= below and bool((rr <= enough).all())
        if done or step == most:
            return done
        times(p, H, out=h)
        ops.conjugate_step_(
            flat_w, flat_g, flat_p, flat_h, removed.view(rows, D), rr, backend=backend
        )
        step += 1


def times(a: Tensor, M: Tensor, *, out: Tensor) -> Tensor:
    """(G, R, D): a (G, R, D) times M (G, D, D), group by group, in ``out``."""
    if len(a) == 1:  # a batch of one is slower than a product
        torch.mm(a[0], M[0], out=out[0])
    else:
        torch.bmm(a, M, out=out)
    return out
