"""Swapping kept against removed weights: ``exchange_``."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines import exchange as baselines
from speed.case import Case, Side

SHARE = 0.5  # removed of every row
CHECKED = 4  # rows are independent, so a few of them check the rest
UNLIMITED = 1_000_000  # swaps


def exchange_case(shape: shapes.LayerShape) -> Case:
    """Swaps until none lowers the error, from the half of each row that is cheapest alone.

    All sides must end with the same sets as the reference; the error is the difference in what the
    rows then lose.
    """
    dense = shapes.weights(shape).to(torch.float64)
    H = shapes.second_moment(shape)
    A = shapes.inverse(H)
    H = shapes.damped(H)
    R, C = dense.shape
    k = round(SHARE * C)
    cheapest = (dense**2 / A.diagonal()).argsort(dim=1)[:, :k]
    kept = torch.ones(R, C, dtype=torch.bool).scatter_(1, cheapest, False)
    expected, sets = dense[:CHECKED].clone(), kept[:CHECKED].clone()
    ops.exchange_(expected, A, sets, backend="reference")

    def lost(W: Tensor) -> Tensor:
        """dw H dw^T of the first rows."""
        change = W[: len(expected)] - dense[: len(expected)]
        return (change @ H * change).sum(dim=1)

    def fresh(W: Tensor, A: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return W.clone(), A, kept.clone()

    def ours(
        W: Tensor, A: Tensor, kept: Tensor, *, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        ops.exchange_(W, A, kept, backend=backend)
        return W, kept

    def tableau(W: Tensor, A: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        baselines.exchange_(W, A, kept, UNLIMITED)
        return W, kept

    def error(exchanged: tuple[Tensor, Tensor]) -> float:
        W, kept = exchanged
        if not torch.equal(kept[: len(sets)], sets):
            return torch.inf
        return float((lost(W) / lost(expected) - 1).abs().max())

    swaps = int(ops.exchange_(dense.clone(), A, kept.clone())[0].sum())
    return Case(
        name=f"exchange, {shape} ({R}, {C})",
        inputs=(dense, A, kept),
        prepare=fresh,
        work=(R * k + 3.0 * swaps) * C**2,  # as in csrc/exchange.h: the tableau, 3 C^2 per swap
        unit="GFLOP/s",
        error=error,
        tolerance=1e-9,
        ours=Side("lobs", ours),
        rivals={"torch": Side("torch tableau, row by row", tableau)},
    )
