"""Second moments: one product, the running mean of SparseGPT and GPTQ, a blocked triangle."""

from __future__ import annotations

from torch import Tensor


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
