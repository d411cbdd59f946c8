"""The best kept weights for a mask by conjugate gradients, for all rows of a layer at once.

A step costs one product of the layer's size, whatever the mask is. Solving row by row costs the
cube of what a row keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.problem import spectral_norm
from lobs_native.solvers.rows import WHOLE, Rows

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
    rows: Rows = WHOLE,
    count: int | None = None,
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
    rows, count : Rows, int, optional
        Where w, x and removed (G = 1) have the own blocks of ``count`` rows that processes share.

    Returns
    -------
    bool
        Whether they ended before ``most``.
    """
    G, R, D = w.shape
    count = R if count is None else count
    inside = rows.own_blocks(count)

    def every(own: Tensor) -> Tensor:  # (G, R) -> of all rows
        return rows.joined(own.reshape(-1), G * count, whole_blocks=True)

    g, h = torch.empty_like(w), torch.empty_like(w)
    times(x.sub_(w), H, inside, out=g)
    below = gain * float(every(torch.linalg.vecdot(x, g)).sum(dtype=torch.float64))
    g.masked_fill_(removed, 0.0)
    norms = torch.tensor([spectral_norm(M) for M in H], dtype=torch.float64, device=w.device)
    far = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64)
    enough = every(far.mul_(tolerance * norms[:, None]).square_())
    p = x.copy_(g)
    rr = torch.linalg.vector_norm(g, dim=2, dtype=torch.float64).square_().view(G * R)
    flat_w, flat_g, flat_p, flat_h = (t.view(G * R, D) for t in (w, g, p, h))
    step = 0
    while True:
        left = every(rr)
        done = float(left.sum()) <= below and bool((left <= enough).all())
        if done or step == most:
            return done
        times(p, H, inside, out=h)
        ops.conjugate_step_(
            flat_w, flat_g, flat_p, flat_h, removed.view(G * R, D), rr, backend=backend
        )
        step += 1


def times(a: Tensor, M: Tensor, inside: Sequence[slice], *, out: Tensor) -> Tensor:
    """(G, R, D): a (G, R, D) times M (G, D, D), group by group, in ``out``; of one group, the rows
    ``inside`` each of these blocks by themselves, see :mod:`lobs_native.solvers.rows`."""
    if len(a) == 1:  # a batch of one is slower than a product
        for some in inside:
            torch.mm(a[0, some], M[0], out=out[0, some])
    else:
        torch.bmm(a, M, out=out)
    return out
