"""The cheapest weight of each row: ``saliency_argmin``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines import saliency as baselines
from speed.case import Case, Side


def cases(quick: bool) -> Iterator[Case]:
    """The middle of a removal."""
    yield argmin_case(shapes.named("opt-1.3b.attention", small=quick))


def argmin_case(shape: shapes.LayerShape) -> Case:
    """One column per row, when three weights in ten are gone.

    The error is what the chosen weights cost above the cheapest, relative to the mean of those.
    """
    R, C = shape.rows, shape.columns
    generator = torch.Generator().manual_seed(3)
    W = shapes.weights(shape)
    diag = torch.rand(R, C, generator=generator).add_(0.5)
    live = torch.rand(R, C, generator=generator) >= 0.3
    score = torch.where(live, W.to(torch.float64) ** 2 / diag, torch.inf)
    lowest = score.amin(dim=1)

    def ours(
        W: Tensor,
        diag: Tensor,
        live: Tensor,
        removed: Tensor,
        cost: Tensor,
        *,
        backend: str | None = None,
    ) -> Tensor:
        return ops.saliency_argmin(W, diag, live, backend=backend)[0]

    def excess(column: Tensor) -> float:
        chosen = score.gather(1, column[:, None])[:, 0]
        return float((chosen - lowest).max() / lowest.mean())  # a single lowest cost may be zero

    return Case(
        name=f"saliency argmin ({R}, {C})",
        inputs=(W, diag, live, ~live, torch.empty_like(W)),
        work=9 * R * C,
        unit="GB/s",
        error=excess,
        tolerance=1e-6,
        ours=Side("lobs", ours),
        rivals={
            "published": Side(
                "torch.where, argmin",
                lambda W, diag, live, removed, cost: baselines.saliency_argmin(W, diag, live),
            ),
            "torch": Side(
                "torch in place",
                lambda W, diag, live, removed, cost: baselines.saliency_argmin_in_place(
                    W, diag, removed, cost
                ),
            ),
        },
    )
