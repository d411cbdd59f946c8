"""Swaps of kept against removed weights, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def exchange_(W: Tensor, A: Tensor, kept: Tensor, limit: int) -> Tensor:
    """Swap kept against removed weights of W (R, C), best swap first; W and kept are modified.

    Each row has a tableau as in Beaton's sweep, built by a Cholesky factorisation and updated by
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
