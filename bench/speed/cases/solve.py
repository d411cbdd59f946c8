"""One small linear system per row, all cut from the same matrix: ``support_solve_``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference
from speed import shapes
from speed.baselines import solve as baselines
from speed.case import Case, Side, copy_first, relative_error

CHECKED = 4  # rows are independent, so a few of them check the rest


def cases(quick: bool) -> Iterator[Case]:
    """The repair of a whole layer when about half of it is gone."""
    yield solve_case(shapes.named("bert-base.attention", small=quick), torch.float32)


def solve_case(shape: shapes.LayerShape, dtype: torch.dtype, rows: int = 768) -> Case:
    """About half of the columns of each of at most ``rows`` rows."""
    shape = replace(shape, rows=min(shape.rows, rows))
    M = shapes.inverse(shapes.second_moment(shape)).to(dtype)
    chosen = shapes.halves(shape)
    X = torch.where(chosen, shapes.weights(shape).to(dtype), 0)
    expected = X[:CHECKED].to(torch.float64, copy=True)
    reference.support_solve_(expected, M, chosen[:CHECKED])
    close = relative_error(expected)

    def ours(X: Tensor, M: Tensor, chosen: Tensor, *, backend: str | None = None) -> Tensor:
        ops.support_solve_(X, M, chosen, backend=backend)
        return X

    def error(X: Tensor) -> float:
        return torch.inf if bool(X[~chosen].any()) else close(X)

    return Case(
        name=f"one system per row, {shape} {tuple(X.shape)}",
        inputs=(X, M, chosen),
        prepare=copy_first,
        work=float((chosen.sum(dim=1, dtype=torch.float64) ** 3).sum() / 3),
        unit="GFLOP/s",
        error=error,
        tolerance=1e-3 if dtype == torch.float32 else 1e-10,
        ours=Side("lobs", ours),
        rivals={
            "published": Side("torch row by row", baselines.solve_row_by_row),
            "torch": Side("torch, 16 rows at once", baselines.solve_together),
        },
    )
