"""The released L-OBS ranking and removal loop, and the same in torch."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def rank_globally(W: np.ndarray, diag: np.ndarray) -> np.ndarray:
    """Positions of W (C, R), input-major as released, by w^2 / (2 diag): one sort of the layer."""
    return np.argsort((W * W / (2 * diag[:, None])).ravel())


class Ranking(NamedTuple):
    """Which weights go, and in which order within a row."""

    removed: Tensor  # (R, C) bool
    columns: Tensor  # (R, C) int64: row r loses columns[r, :counts[r]], in this order
    counts: Tensor  # (R,) int64
    cut: float  # the highest score that goes

    def removals(self) -> tuple[Tensor, Tensor]:
        """``order`` and ``start`` as ``ops.static_order_prune_`` takes them."""
        position = torch.arange(self.columns.shape[1])
        order = self.columns[position < self.counts[:, None]].to(torch.int32)  # (K,)
        start = torch.zeros(len(self.counts) + 1, dtype=torch.int64)
        torch.cumsum(self.counts, 0, out=start[1:])
        return order, start


def rank_by_row(W: Tensor, diag: Tensor, count: int) -> Ranking:
    """The same ranking by torch: a threshold for the layer, and a sort within each row.

    This suffices because rows are independent.
    """
    score = W * W / diag  # (R, C)
    cut = score.view(-1).kthvalue(count).values
    removed = score <= cut
    counts = removed.sum(dim=1)
    surplus = int(counts.sum()) - count
    if surplus:  # equal scores at the cut: keep the last ones
        row, column = torch.nonzero(score == cut)[-surplus:].T
        removed[row, column] = False
        counts = removed.sum(dim=1)
    columns = torch.where(removed, score, torch.inf).argsort(dim=1, stable=True)
    return Ranking(removed, columns, counts, float(cut))


def remove_one_by_one(
    W: np.ndarray, A: np.ndarray, positions: np.ndarray, *, mask_at_once: bool
) -> np.ndarray:
    """The released L-OBS loop over ``positions`` of W (C, R), in place: in Python, one by one.

    With ``mask_at_once`` the whole matrix is masked after every removal, as in the paper's
    TensorFlow code; without, once at the end, as in the authors' later port. The released code
    computes in float64; this uses W's type, so that both sides of a comparison have the same.
    """
    mask = np.ones_like(W)
    for position in positions.tolist():
        q, unit = divmod(position, W.shape[1])
        W[:, unit] += -(W[q, unit] / A[q, q]) * A[:, q]
        mask[q, unit] = 0
        if mask_at_once:
            W *= mask
    W *= mask
    return W


def remove_in_blocks_(W: Tensor, A: Tensor, ranking: Ranking, width: int = 16) -> Tensor:
    """The best that torch does with W (R, C): ``width`` removals of every row at a time.

    Each step solves c = tril(A[P, P])^-1 w[P] for all rows together and subtracts c A[P, :], where
    c is a sparse (R, C) matrix. Fewer removals at a time would be bound by the memory traffic of W,
    more by gathering A[P, P]. A dense product instead of the sparse one takes more than twice as
    long, and one solve with all removals of a row even longer.
    """
    R, C = W.shape
    entries = A.view(-1)
    columns = ranking.columns.to(torch.int32)
    last = int(ranking.counts.max())
    for first in range(0, last, width):
        P = columns[:, first : min(first + width, last)].contiguous()  # (R, k)
        k = P.shape[1]
        corner = entries.index_select(0, (P[:, :, None] * C + P[:, None, :]).view(-1)).view(R, k, k)
        w = W.gather(1, P.long())[:, :, None]
        c = torch.linalg.solve_triangular(corner, w, upper=False)[:, :, 0]
        beyond = torch.arange(first, first + k) >= ranking.counts[:, None]
        torch.addmm(W, _sparse_rows(P, c.masked_fill(beyond, 0), C), A, alpha=-1, out=W)
    return W.masked_fill_(ranking.removed, 0)


def _sparse_rows(P: Tensor, c: Tensor, columns: int) -> Tensor:
    """Sparse (R, columns) with c[r, i] at column P[r, i]."""
    R, k = P.shape
    start = torch.arange(0, R * k + 1, k, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR support a beta version
        return torch.sparse_csr_tensor(
            start, P.view(-1), c.reshape(-1), (R, columns), check_invariants=False
        )
