"""Which weights go, and in what order in each row: ``rank_lowest`` and ``rank_rows``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines import static_order as baselines
from speed.case import Case, Side


def rank_case(shape: shapes.LayerShape) -> Case:
    """The cheaper half of a layer, and every row of it in rising order, exactly."""
    W = shapes.weights(shape)
    diag = torch.rand(shape.columns, generator=torch.Generator().manual_seed(4)).add_(0.5)
    count = W.numel() // 2
    scores = W * W / diag
    cut = float(scores.flatten().kthvalue(count).values)

    def ours(W: Tensor, diag: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """Radix selection over the layer, radix sort in each row."""
        score = (W * W / diag).to(torch.float64)
        removed = ops.rank_lowest(score.view(1, -1), count, backend=backend).view_as(score)
        return ops.rank_rows(score, removed, backend=backend)

    def one_sort(W: Tensor, diag: Tensor) -> tuple[Tensor, Tensor]:
        """One sort of the layer as released, then grouped by row."""
        ranked = baselines.rank_globally(W.numpy().T.copy(), diag.numpy())[:count]
        column, row = np.divmod(ranked, len(W))
        by_row = np.argsort(row, kind="stable")
        start = torch.zeros(len(W) + 1, dtype=torch.int64)
        start[1:] = torch.from_numpy(np.bincount(row, minlength=len(W)).cumsum())
        return torch.from_numpy(column[by_row].astype(np.int32)), start

    def error(ranking: tuple[Tensor, Tensor]) -> float:
        order, start = ranking
        row = torch.repeat_interleave(torch.arange(len(W)), start.diff())
        score = scores[row, order.long()]
        rising = bool(((score.diff() >= 0) | (row.diff() > 0)).all())
        return 0.0 if len(order) == count and float(score.max()) == cut and rising else torch.inf

    return Case(
        name=f"ranking {tuple(W.shape)}",
        inputs=(W, diag),
        work=2 * 8 * W.numel(),
        unit="GB/s",
        error=error,
        tolerance=0.0,
        ours=Side("lobs", ours),
        rivals={
            "published": Side("numpy, one sort", one_sort),
            "torch": Side(
                "torch kthvalue, argsort",
                lambda W, diag: baselines.rank_by_row(W, diag, count).removals(),
            ),
        },
    )
