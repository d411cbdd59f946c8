"""The block inverse Fisher: rank-1 updates as oBERT makes them, and several at once."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_update_one_by_one_(F: Tensor, G: Tensor, m: float) -> Tensor:
    """F (blocks, B, B) takes the gradients G (r, blocks * B) in turn, as oBERT and SparseML do."""
    blocks, B, _ = F.shape
    for g in G.view(len(G), blocks, B):
        y = torch.einsum("bij,bj->bi", F, g)
        y /= torch.sqrt(m + torch.einsum("bi,bi->b", g, y))[:, None]
        F.baddbmm_(y[:, :, None], y[:, None, :], alpha=-1)
    return F


def inverse_update_together_(
    F: Tensor, G: Tensor, m: float, at_once: int = 16, group_elements: int = 400_000
) -> Tensor:
    """The same, ``at_once`` gradients together by the matrix inversion lemma.

    Goes through F in groups of blocks that stay in the second-level cache for all gradients.
    """
    blocks, B, _ = F.shape
    per_block = G.view(len(G), blocks, B)
    group = max(1, group_elements // (B * B))
    for first in range(0, blocks, group):
        f = F[first : first + group]  # (group, B, B)
        for chunk in per_block[:, first : first + group].split(at_once):
            g = chunk.transpose(0, 1).contiguous()  # (group, r, B)
            y = torch.bmm(g, f)
            s = torch.bmm(y, g.mT)  # (group, r, r)
            s.diagonal(dim1=1, dim2=2).add_(m)
            factor, _ = torch.linalg.cholesky_ex(s)
            z = torch.linalg.solve_triangular(factor, y, upper=False)
            f.baddbmm_(z.mT, z, alpha=-1)
    return F
