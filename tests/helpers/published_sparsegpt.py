"""SparseGPT by the published program's rules, written from the algorithm alone, in float64: the
reference for ``lobs_native.compat.sparsegpt``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Published(NamedTuple):
    weight: Tensor  # (R, C) float64
    gone: Tensor  # (R, C) bool
    error: float


def second_moment(batches: list[tuple[Tensor, int]]) -> Tensor:
    """2 / (all samples) * sum of x x^T, from (tokens (N, C), samples) pairs."""
    total = sum(samples for _, samples in batches)
    return sum(2 / total * x.double().T @ x.double() for x, _ in batches)


def prune(
    W: Tensor,
    H: Tensor,
    sparsity: float = 0.0,
    n: int = 0,
    m: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
    quantize=lambda column: column,
    mask: Tensor | None = None,
) -> Published:
    """Remove one weight after another, using the inverse for the columns from it on.

    ``mask`` (True = removed) fixes the choice. No factorisation is used: with A the inverse of the
    damped H for columns j and later, the removal of w_j changes the rest by ``-w_j / A_jj * A_j``,
    and eliminating column j gives the next A.
    """
    W, H = W.double().clone(), H.double().clone()
    R, C = W.shape
    dead = H.diagonal() == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(percdamp * H.diagonal().mean())
    A = torch.linalg.inv(H)
    # U_jj^2 of the upper factor is the pivot A_jj when elimination reaches j.
    pivots, rows, rest = torch.empty(C).double(), [], A.clone()
    for j in range(C):
        pivots[j] = rest[0, 0]
        rows.append(rest[0] / rest[0, 0])
        rest = rest[1:, 1:] - torch.outer(rest[0, 1:], rest[0, 1:]) / rest[0, 0]
    gone = torch.zeros(R, C, dtype=torch.bool) if mask is None else mask.clone()
    error = 0.0
    for begin in range(0, C, blocksize):
        end = min(begin + blocksize, C)
        if not n and mask is None:
            score = W[:, begin:end] ** 2 / pivots[begin:end]
            cut = score.flatten().sort().values[int(score.numel() * sparsity)]
            gone[:, begin:end] = score <= cut
        for j in range(begin, end):
            if n and (j - begin) % m == 0:
                group = slice(j, min(j + m, end))
                order = (W[:, group] ** 2 / pivots[group]).argsort(dim=1, stable=True)
                gone[:, group] = order.argsort(dim=1) < n
            w = W[:, j].clone()
            left = quantize(torch.where(gone[:, j], 0.0, w)[:, None])[:, 0]
            W[:, j:] -= torch.outer(w - left, rows[j])
            W[:, j] = left
            error += float(((w - left) ** 2).sum() / pivots[j]) / 2
    return Published(W, gone, error)
