"""One small system per row, all cut from the same matrix: ``support_solve`` against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import baselines
import pytest
import shapes
import torch
from impls import Impl, impls
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference

ROWS = 64
CHECKED = 4  # rows are independent, so a few of them check the rest


def ours(X: Tensor, M: Tensor, chosen: Tensor, *, backend: str) -> Tensor:
    """Ours."""
    x = X.clone()
    ops.support_solve_(x, M, chosen, backend=backend)
    return x


@pytest.mark.benchmark(group="support_solve")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize(
    "impl",
    impls(ours, published=baselines.solve_row_by_row, torch=baselines.solve_together),
)
def test_bench_support_solve(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    name: str,
    dtype: torch.dtype,
) -> None:
    """About half of the columns of every row: every way gives the solution in float64."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    shape = replace(shape, rows=min(shape.rows, ROWS))
    M = shapes.inverse(shapes.second_moment(shape)).to(dtype)
    chosen = shapes.halves(shape)
    X = torch.where(chosen, shapes.weights(shape).to(dtype), 0)
    there = impl.place(X, M, chosen)
    found = benchmark.pedantic(impl, args=there, rounds=5, warmup_rounds=1).cpu()
    expected = X[:CHECKED].to(torch.float64)
    reference.support_solve_(expected, M, chosen[:CHECKED])
    error = float((found[:CHECKED] - expected).norm() / expected.norm())
    work = float((chosen.sum(dim=1, dtype=torch.float64) ** 3).sum() / 3)
    record(work, "GFLOP/s", shape=(shape.rows, shape.columns), error=error)
    assert error < (1e-3 if dtype == torch.float32 else 1e-10)
    assert not bool(found[~chosen].any())
