"""Named matrices for tests: realistic and difficult layer inputs and second moments."""

from __future__ import annotations

import torch
from torch import Tensor


def features(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated ReLU features (rows, columns) float64, like the inputs of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return (base @ mix / columns**0.5).relu()


def conditioned(columns: int, condition: float, seed: int = 0) -> Tensor:
    """Symmetric positive definite (columns, columns) float64 with the given condition number and
    norm 1."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -1, columns, base=condition, dtype=torch.float64)
    return (q * values) @ q.T


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and a second moment (columns, columns), both float64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = features(4 * columns, columns, seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def correlated(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Few directions carry most of the inputs, as in a trained network; the weights are random."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(4 * columns, columns // 4, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = (few @ mix + 0.3 * noise).relu()
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return W, x.T @ x / len(x)
