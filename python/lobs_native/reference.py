"""What is right: every native operation in plain torch, float64, slow and plain to read.

The functions have the names and the meaning of those in :mod:`lobs_native.ops`; they do no checking
(ops does). They are a backend as well: ``backend="reference"``, and the only one for devices
without kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hessian_accumulate_(H: Tensor, X: Tensor, weights: Tensor | None, ones: bool) -> None:
    """Lower triangle of H (D, D) += X^T diag(weights) X, X (N, C), with a ones column if asked."""
    x = X.to(torch.float64)  # (N, C)
    if weights is not None:
        x = x[weights > 0]
        weights = weights[weights > 0]
    if ones:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # (N, C + 1)
    tx = x if weights is None else x * weights.to(torch.float64)[:, None]
    H += torch.tril(tx.T @ x).to(H.dtype)


def inverse_update_(F: Tensor, G: Tensor, m: float) -> int:
    """F (blocks, B, B) takes the samples G (r, d) one at a time, as published: r rank-1 updates.

    Returns -1, or the first block that lost definiteness; then F is as it was.
    """
    blocks, B, _ = F.shape
    padded = torch.zeros(len(G), blocks * B, dtype=torch.float64, device=F.device)
    padded[:, : G.shape[1]] = G
    f = F.to(torch.float64)
    for g in padded.view(-1, blocks, B):  # (blocks, B)
        y = torch.einsum("bij,bj->bi", f, g)
        scale = m + torch.einsum("bi,bi->b", g, y)
        bad = ~((scale > 0) & torch.isfinite(scale))
        if bool(bad.any()):
            return int(bad.to(torch.uint8).argmax())
        f -= torch.einsum("bi,bj->bij", y, y) / scale[:, None, None]
    F.copy_(f)
    return -1


def saliency(W: Tensor, diag: Tensor) -> Tensor:
    """Cost of removing each weight: w**2 / diag, the exact increase of tr(dW H dW^T)."""
    return W * W / diag


def saliency_argmin(W: Tensor, diag: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest live column of each row, the lowest on a tie, -1 if none; and its cost."""
    cost = saliency(W, diag)  # (R, C), rounded as the kernels round it
    cost = torch.where(live, cost, torch.inf)
    value = cost.amin(dim=1)  # (R,)
    column = ((cost == value[:, None]) & live).to(torch.uint8).argmax(dim=1)
    return torch.where(live.any(dim=1), column, -1), value


def static_order_prune_(W: Tensor, A: Tensor, order: Tensor, start: Tensor) -> None:
    """Row r of W (R, C) loses columns order[start[r]:start[r+1]], one after another."""
    w = W.to(torch.float64)
    a = A.to(torch.float64)
    removed = order.tolist()
    bounds = start.tolist()
    for r, row in enumerate(w):
        mine = removed[bounds[r] : bounds[r + 1]]
        for q in mine:
            row -= (row[q] / a[q, q]) * a[:, q]
        row[mine] = 0.0
    W.copy_(w)


def rank_lowest(score: Tensor, count: int) -> Tensor:
    """Bool like score (R, C): the ``count`` lowest of each row, ties to the lowest column."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], True)


def rank_rows(score: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen columns of each row by rising score, row after row, and where each row starts."""
    count = chosen.sum(dim=1)
    start = torch.zeros(len(count) + 1, dtype=torch.int64, device=score.device)
    start[1:] = count.cumsum(0)
    # First by score, then, keeping that order, the chosen before the others.
    by_score = score.argsort(dim=1, stable=True)
    chosen_first = (~chosen.gather(1, by_score)).to(torch.uint8).argsort(dim=1, stable=True)
    ranked = by_score.gather(1, chosen_first)  # (R, C)
    place = torch.arange(score.shape[1], device=score.device)
    return ranked[place < count[:, None]].to(torch.int32), start
