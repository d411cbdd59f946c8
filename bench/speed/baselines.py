"""The rivals: what has been published, and the best that plain torch can do, in our own words.

Every operation has both. A published way is kept as it is, slow habits included, except where
noted; a tuned way may use anything that torch offers. None checks its inputs, which the native
operations do. Block sizes were chosen by timing on two cores with AVX-512.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- second moment -----------------------------------------------------------------------------


def gram(X: Tensor) -> Tensor:
    """X^T X (C, C) float32 by one product; nothing is accumulated, which favours it."""
    x = X.float()  # (N, C)
    return x.T @ x


def gram_running_mean_(H: Tensor, seen: int, X: Tensor) -> Tensor:
    """H (C, C) float32 becomes the mean of 2 x x^T over all rows, as SparseGPT and GPTQ keep it."""
    total = seen + len(X)
    H *= seen / total
    x = X.float() * (2 / total) ** 0.5  # (N, C)
    H += x.T @ x
    return H


def gram_block_triangle_(H: Tensor, X: Tensor, rows: int = 4096, width: int = 256) -> Tensor:
    """Lower block triangle of H (C, C) float64 += X^T X; sums in float32 over ``rows`` rows."""
    for chunk in X.split(rows):
        x = chunk.float()
        for first in range(0, X.shape[1], width):
            last = first + width
            H[first:, first:last] += x[:, first:].T @ x[:, first:last]
    return H


# ---- block inverse -----------------------------------------------------------------------------


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


# ---- saliency ----------------------------------------------------------------------------------


def saliency_argmin(W: Tensor, diag: Tensor, live: Tensor) -> Tensor:
    """Cheapest live column of each row, written as one would: a new tensor at every step."""
    return torch.where(live, W * W / diag, torch.inf).argmin(dim=1)


def saliency_argmin_in_place(W: Tensor, diag: Tensor, dead: Tensor, cost: Tensor) -> Tensor:
    """The same without a fresh tensor: the caller keeps ``cost`` (R, C), and not live but dead."""
    torch.mul(W, W, out=cost)
    cost.div_(diag).masked_fill_(dead, torch.inf)
    return cost.argmin(dim=1)


# ---- static order: ranking ---------------------------------------------------------------------


def rank_globally(W: np.ndarray, diag: np.ndarray) -> np.ndarray:
    """Positions of W (C, R), input-major as released, by w^2 / (2 diag): one sort of the layer."""
    return np.argsort((W * W / (2 * diag[:, None])).ravel())


class Ranking(NamedTuple):
    """Which weights go, and in which order within a row."""

    gone: Tensor  # (R, C) bool
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
    """The same ranking by torch.

    Rows are independent, so a threshold for the whole layer and a sort within each row will do.
    """
    score = W * W / diag  # (R, C)
    cut = score.view(-1).kthvalue(count).values
    gone = score <= cut
    counts = gone.sum(dim=1)
    surplus = int(counts.sum()) - count
    if surplus:  # equal scores at the cut: keep the last ones
        row, column = torch.nonzero(score == cut)[-surplus:].T
        gone[row, column] = False
        counts = gone.sum(dim=1)
    columns = torch.where(gone, score, torch.inf).argsort(dim=1, stable=True)
    return Ranking(gone, columns, counts, float(cut))


# ---- static order: removal ---------------------------------------------------------------------


def remove_one_by_one(
    W: np.ndarray, A: np.ndarray, positions: np.ndarray, *, mask_at_once: bool
) -> np.ndarray:
    """The released L-OBS loop over ``positions`` of W (C, R), in place: in Python, one by one.

    With ``mask_at_once`` the whole matrix is masked after every removal, as in the paper's
    TensorFlow code; without, once at the end, as in the authors' later port. The released code
    computes in float64; this takes W's type, so that both sides of a comparison have the same.
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
    c is a sparse (R, C) matrix. Fewer removals at a time would be bound by W's traffic, more by
    gathering A[P, P]. A dense product instead of the sparse one takes more than twice as long, and
    one solve with all removals of a row more than that.
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
    return W.masked_fill_(ranking.gone, 0)


def _sparse_rows(P: Tensor, c: Tensor, columns: int) -> Tensor:
    """Sparse (R, columns) with c[r, i] at column P[r, i]."""
    R, k = P.shape
    start = torch.arange(0, R * k + 1, k, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR support a beta version
        return torch.sparse_csr_tensor(
            start, P.view(-1), c.reshape(-1), (R, columns), check_invariants=False
        )


# ---- exact removal -----------------------------------------------------------------------------


class Exact(NamedTuple):
    """What exact removal did to R rows; costs are ``w_q**2 / D_qq``, without the published half."""

    order: Tensor  # (R, k) int64, columns as they went
    loss: Tensor  # (R, k)
    weights: Tensor  # (R, C), repaired


class PublishedRows:
    """Rows on their way through the loop that came with OBC, which has no licence: imitated.

    As published, each row owns a (C, C) inverse, all of which is rewritten at every removal, and
    the weights after every removal are kept (not with groups). A removal takes the same time
    early and late, so that a sample of them tells how long all of them take.
    """

    def __init__(self, W: Tensor, A: Tensor, keep: int = 0, size: int = 0) -> None:
        R, C = W.shape
        self.w = W.clone()
        self.inverse = A.expand(R, C, C).clone()
        self.dead = torch.zeros(R, C, dtype=torch.bool)
        self.size = size
        self.room = size - keep  # removals that a group may have
        self.last = C // size * self.room if size else C
        self.taken = torch.zeros(R, C // size if size else 0, dtype=torch.int64)
        self.history = None if size else torch.zeros(C + 1, R, C, dtype=W.dtype)
        if self.history is not None:
            self.history[0] = self.w
        self.order = torch.zeros(R, self.last, dtype=torch.int64)
        self.loss = torch.zeros(R, self.last, dtype=W.dtype)
        self.removed = 0

    def remove(self, count: int) -> None:
        """Take ``count`` more weights out of every row."""
        rows = torch.arange(len(self.w))
        for step in range(self.removed, self.removed + count):
            diag = self.inverse.diagonal(dim1=1, dim2=2)
            score = self.w**2 / diag
            if self.size:
                full = (self.taken >= self.room).repeat_interleave(self.size, dim=1)
                score[self.dead | full] = torch.inf
            else:
                score[self.dead] = torch.inf
            q = score.argmin(dim=1)
            self.order[:, step] = q
            self.loss[:, step] = score[rows, q]
            d = diag[rows, q]
            row = self.inverse[rows, q]
            self.w -= row * (self.w[rows, q] / d)[:, None]
            self.dead[rows, q] = True
            self.w[self.dead] = 0
            if self.history is not None:
                self.history[step + 1] = self.w
            else:
                self.taken[rows, q // self.size] += 1
            self.removed += 1
            if self.removed < self.last:
                row /= d.sqrt()[:, None]
                self.inverse -= torch.bmm(row[:, :, None], row[:, None, :])


def obc_unstructured(W: Tensor, A: Tensor, until: int | None = None, parallel: int = 32) -> Exact:
    """ExactOBS as published, ``until`` weights of every row, ``parallel`` rows at a time."""
    return _published(W, A, until, parallel)


def obc_groups(W: Tensor, A: Tensor, keep: int, size: int, parallel: int = 32) -> Exact:
    """The published N:M loop: ``keep`` of every ``size`` neighbours stay."""
    return _published(W, A, None, parallel, keep, size)


def _published(
    W: Tensor, A: Tensor, until: int | None, parallel: int, keep: int = 0, size: int = 0
) -> Exact:
    parts = []
    for w in W.split(parallel):
        rows = PublishedRows(w, A, keep, size)
        count = rows.last if until is None else until
        rows.remove(count)
        parts.append(Exact(rows.order[:, :count], rows.loss[:, :count], rows.w))
    return _joined(parts)


def exact_torch(
    W: Tensor,
    A: Tensor,
    until: int,
    keep: int = 0,
    size: int = 0,
    panel: int = 128,
    parallel: int = 32,
) -> Exact:
    """The best that torch does: a pivoted Cholesky of every row, ``parallel`` rows in step.

    A column of the current inverse is formed when it is needed, from the inverse as it was at the
    start of the panel and the vectors since; every ``panel`` removals these go into the rows'
    private inverses by one product. When half of the columns are gone they are dropped. Forming
    every column from A and all vectors (``panel`` >= ``until``, no private inverses) takes 1.5 to 4
    times as long, because all vectors are then read again for every removal.
    """
    return _joined([_in_panels(w, A, until, keep, size, panel) for w in W.split(parallel)])


def _joined(parts: list[Exact]) -> Exact:
    return Exact(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _in_panels(W: Tensor, A: Tensor, until: int, keep: int, size: int, panel: int) -> Exact:
    R, C = W.shape
    panel = max(1, min(panel, until))
    rows = torch.arange(R)
    order = torch.empty(R, until, dtype=torch.int64)
    loss = torch.empty(R, until, dtype=W.dtype)
    name = torch.arange(C).expand(R, C)  # column of W that a working column stands for
    taken = torch.zeros(R, -(-C // size) if size else 0, dtype=torch.int64)
    w, diag = W.clone(), A.diagonal().expand(R, C).clone()
    dead = torch.zeros(R, C, dtype=torch.bool)
    closed = dead.clone() if size else dead  # what must not go, or is gone
    score = torch.empty_like(w)
    inverse: Tensor | None = None  # (R, C, C); None while it is A for every row
    for first in range(0, until, panel):
        width = min(panel, until - first)
        V = torch.empty(R, width, w.shape[1], dtype=W.dtype)
        for i in range(width):
            torch.mul(w, w, out=score).div_(diag).masked_fill_(closed, torch.inf)
            cost, q = score.min(dim=1, keepdim=True)  # (R, 1)
            column = A[q[:, 0]] if inverse is None else inverse[rows, q[:, 0]]
            if i:
                pick = q[:, :, None].expand(R, i, 1)
                coefficients = V[:, :i].gather(2, pick).mT  # (R, 1, i)
                column = torch.baddbmm(column[:, None], coefficients, V[:, :i], alpha=-1)[:, 0]
            scale = column.gather(1, q).rsqrt_()
            v = torch.mul(column, scale, out=V[:, i])
            w.addcmul_(v, w.gather(1, q) * scale, value=-1)
            diag.addcmul_(v, v, value=-1)
            dead.scatter_(1, q, True)
            gone = name.gather(1, q)
            order[:, first + i], loss[:, first + i] = gone[:, 0], cost[:, 0]
            if size:
                closed.scatter_(1, q, True)
                group = gone // size
                taken.scatter_add_(1, group, torch.ones_like(group))
                full = taken.gather(1, group) >= size - keep
                closed |= (name // size == group) & full
        done = first + width
        if done == until:
            break
        start = A.expand(R, C, C) if inverse is None else inverse
        inverse = torch.baddbmm(start, V.mT, V, alpha=-1)
        if 2 * (C - done) <= w.shape[1]:
            live = (~dead).nonzero()[:, 1].view(R, C - done)
            across = live[:, None].expand(R, C - done, C - done)
            inverse = inverse.gather(1, live[:, :, None].expand(R, C - done, w.shape[1]))
            inverse = inverse.gather(2, across)
            name, w, diag, closed = (x.gather(1, live) for x in (name, w, diag, closed))
            dead = torch.zeros_like(closed)
            closed, score = (closed if size else dead), torch.empty_like(w)
    weights = torch.zeros_like(W).scatter_(1, name, w.masked_fill_(dead, 0))
    return Exact(order, loss, weights)


# ---- one small system per row ------------------------------------------------------------------


def solve_row_by_row(X: Tensor, M: Tensor, chosen: Tensor) -> Tensor:
    """M[P, P] x = X[r, P] with P = chosen[r], for each row of X (R, C), as one would write it."""
    out = torch.zeros_like(X)
    for r in range(len(X)):
        P = chosen[r].nonzero()[:, 0]
        factor = torch.linalg.cholesky(M[P][:, P])
        out[r, P] = torch.cholesky_solve(X[r, P, None], factor)[:, 0]
    return out


def solve_together(X: Tensor, M: Tensor, chosen: Tensor, parallel: int = 16) -> Tensor:
    """The same, ``parallel`` rows at a time, smaller systems filled up with the identity."""
    out = torch.zeros_like(X)
    C = X.shape[1]
    entries = M.reshape(-1)
    for x, mine, result in zip(
        X.split(parallel), chosen.split(parallel), out.split(parallel), strict=True
    ):
        count = mine.sum(dim=1, keepdim=True)  # (R, 1)
        k = int(count.max())
        P = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]  # (R, k)
        beyond = torch.arange(k) >= count
        place = (P[:, :, None] * C + P[:, None, :]).view(-1)
        corner = entries.index_select(0, place).view(-1, k, k)
        corner.masked_fill_(beyond[:, :, None] | beyond[:, None, :], 0)
        corner.diagonal(dim1=1, dim2=2).masked_fill_(beyond, 1)
        b = x.gather(1, P).masked_fill_(beyond, 0)[:, :, None]
        solved = torch.cholesky_solve(b, torch.linalg.cholesky(corner))[:, :, 0]
        result.scatter_(1, P, solved)
    return out


# ---- swaps -------------------------------------------------------------------------------------


def exchange_(W: Tensor, A: Tensor, kept: Tensor, limit: int) -> Tensor:
    """Swap kept against removed weights of W (R, C), best swap first; both are written in place.

    Per row a tableau as in Beaton's sweep, built by Cholesky's factorisation and kept up to date by
    two rank-1 updates per swap. Returns the number of swaps (R,).
    """
    C = W.shape[1]
    swaps = torch.zeros(len(W), dtype=torch.int64)
    for r in range(len(W)):
        w0 = W[r].clone()
        S, P = kept[r].nonzero()[:, 0], (~kept[r]).nonzero()[:, 0]  # by slot
        K = torch.cholesky_inverse(torch.linalg.cholesky(A[P][:, P]))
        across = A[S][:, P]
        E = across @ K  # (kept, removed)
        M = A.new_zeros(C + 1, C + 1)  # [-K, E^T; E, D], and a border of the weights
        M[P[:, None], P], M[S[:, None], P], M[P[:, None], S] = -K, E, E.T
        M[S[:, None], S] = torch.addmm(A[S][:, S], E, across.T, alpha=-1)
        M[C, P], M[C, S] = K @ w0[P], w0[S] - E @ w0[P]
        M[:, C] = M[C]
        for _ in range(limit if len(S) and len(P) else 0):
            E = M[S][:, P]
            t, variance, precision = M[C], M.diagonal()[S], -M.diagonal()[P]
            ratio = t[P] / precision
            net = torch.addcmul(t[S, None], E, ratio).square_()
            net /= torch.addcmul(variance[:, None], E, E / precision)
            net -= t[P] * ratio
            best = int(net.argmin())
            i, j = divmod(best, len(P))
            if not float(net.view(-1)[best]) < -1e-9 * float(t[P] @ w0[P]):
                break
            for q in (int(P[j]), int(S[i])):
                pivot = float(M[q, q])
                column = M[q].clone()
                M.addr_(column, column, alpha=-1 / pivot)
                M[q] = column / abs(pivot)
                M[:, q] = M[q]
                M[q, q] = -1 / pivot
            S[i], P[j] = P[j].clone(), S[i].clone()
            swaps[r] += 1
        W[r, S], W[r, P] = M[C, S], 0.0
        kept[r, S], kept[r, P] = True, False
    return swaps


# ---- sweep -------------------------------------------------------------------------------------


def sparsegpt_(
    W: Tensor, U: Tensor, sparsity: float, group: int = 0, per_group: int = 0, width: int = 128
) -> Tensor:
    """W (R, C) is pruned in place with U^T U the damped inverse, as in the loop that Frantar &
    Alistarh released with SparseGPT in 2023.

    Without groups a block loses what is below the sorted scores' ``sparsity`` quantile; with
    them, ``per_group`` of every ``group`` columns. Every column takes a dozen small operations on
    fresh tensors and one outer product over what is left of the block, masked or not.
    """
    for begin in range(0, W.shape[1], width):
        end = min(begin + width, W.shape[1])
        block = W[:, begin:end].clone()  # (R, B)
        u = U[begin:end, begin:end]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        if group:
            gone = torch.zeros_like(block, dtype=torch.bool)
        else:
            score = block**2 / u.diagonal().reshape(1, -1) ** 2
            ranked = torch.sort(score.flatten()).values
            gone = score <= ranked[int(score.numel() * sparsity)]
        for j in range(end - begin):
            column, pivot = block[:, j], u[j, j]
            if group and j % group == 0:
                members = slice(j, j + group)
                score = block[:, members] ** 2 / u.diagonal()[members].reshape(1, -1) ** 2
                lowest = torch.topk(score, per_group, dim=1, largest=False).indices
                gone.scatter_(1, j + lowest, True)
            left = column.clone()
            left[gone[:, j]] = 0
            error = (column - left) / pivot
            block[:, j:] -= error.unsqueeze(1).matmul(u[j, j:].unsqueeze(0))
            kept[:, j] = left
            errors[:, j] = error
        W[:, begin:end] = kept
        W[:, end:] -= errors.matmul(U[begin:end, end:])
    return W


def sweep_transposed_(
    W: Tensor, U: Tensor, sparsity: float, group: int = 0, per_group: int = 0, width: int = 128
) -> Tensor:
    """The best that torch does with the same sweep: three operations a column, all in place.

    A block lies transposed, so that a column of W is a row of memory; kthvalue instead of a sort;
    errors go straight into the block that repairs what is right of it.
    """
    C = W.shape[1]
    for begin in range(0, C, width):
        end = min(begin + width, C)
        block = W[:, begin:end].T.contiguous()  # (B, R)
        u = U[begin:end, begin:end].contiguous()
        inverse = u.diagonal().reciprocal()
        errors = torch.empty_like(block)
        if group:
            kept = torch.empty(block.shape, dtype=torch.bool)
        else:
            score = (block * inverse[:, None]).square_()
            count = int(score.numel() * sparsity)
            kept = score > score.view(-1).kthvalue(max(count, 1)).values if count else score >= 0
        for j in range(end - begin):
            if group and j % group == 0:
                members = slice(j, j + group)
                score = (block[members] * inverse[members, None]).square_()
                lowest = score.topk(per_group, dim=0, largest=False).indices
                kept[members] = True
                kept[members].scatter_(0, lowest, False)
            torch.mul(block[j], inverse[j], out=errors[j]).masked_fill_(kept[j], 0)
            if j + 1 < end - begin:
                block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        W[:, begin:end] = block.masked_fill_(~kept, 0).T
        W[:, end:].addmm_(errors.T, U[begin:end, end:], alpha=-1)
    return W


def sparsegpt_factor(H: Tensor, damping: float) -> Tensor:
    """U (C, C) for :func:`sparsegpt_` from H, as published: three factorisations in H's type."""
    damped = H.clone()
    damped.diagonal().add_(damping * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
