"""One linear system per row, row by row and several rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_row_by_row(X: Tensor, M: Tensor, chosen: Tensor) -> Tensor:
    """M[P, P] x = X[r, P] with P = chosen[r], for each row of X (R, C), written naively."""
    out = torch.zeros_like(X)
    for r in range(len(X)):
        P = chosen[r].nonzero()[:, 0]
        factor = torch.linalg.cholesky(M[P][:, P])
        out[r, P] = torch.cholesky_solve(X[r, P, None], factor)[:, 0]
    return out


def solve_together(X: Tensor, M: Tensor, chosen: Tensor, parallel: int = 16) -> Tensor:
    """The same, ``parallel`` rows at a time, smaller systems padded with the identity."""
    out = torch.zeros_like(X)
    C = X.shape[1]
    entries = M.reshape(-1)
    for x, selected, result in zip(
        X.split(parallel), chosen.split(parallel), out.split(parallel), strict=True
    ):
        count = selected.sum(dim=1, keepdim=True)  # (R, 1)
        k = int(count.max())
        P = (~selected).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]  # (R, k)
        beyond = torch.arange(k) >= count
        place = (P[:, :, None] * C + P[:, None, :]).view(-1)
        corner = entries.index_select(0, place).view(-1, k, k)
        corner.masked_fill_(beyond[:, :, None] | beyond[:, None, :], 0)
        corner.diagonal(dim1=1, dim2=2).masked_fill_(beyond, 1)
        b = x.gather(1, P).masked_fill_(beyond, 0)[:, :, None]
        solved = torch.cholesky_solve(b, torch.linalg.cholesky(corner))[:, :, 0]
        result.scatter_(1, P, solved)
    return out
