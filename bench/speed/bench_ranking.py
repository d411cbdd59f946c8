"""Which weights go, in what order in each row: ``rank_lowest`` and ``rank_rows`` against torch."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import numpy as np
import pytest
import shapes
import torch
from impls import Impl, impls
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lobs_native import ops


def ours(W: Tensor, diag: Tensor, count: int, *, backend: str) -> tuple[Tensor, Tensor]:
    """Radix selection over the layer, radix sort in each row."""
    score = (W * W / diag).to(torch.float64)
    gone = ops.rank_lowest(score.view(1, -1), count, backend=backend).view_as(score)
    return ops.rank_rows(score, gone, backend=backend)


def numpy_sort(W: Tensor, diag: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One sort of the layer as released, and what belongs to a row put together."""
    ranked = baselines.rank_globally(W.numpy().T.copy(), diag.numpy())[:count]
    column, row = np.divmod(ranked, len(W))
    by_row = np.argsort(row, kind="stable")
    start = torch.zeros(len(W) + 1, dtype=torch.int64)
    start[1:] = torch.from_numpy(np.bincount(row, minlength=len(W)).cumsum())
    return torch.from_numpy(column[by_row].astype(np.int32)), start


def torch_tuned(W: Tensor, diag: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """kthvalue over the layer, one stable argsort of all rows."""
    return baselines.rank_by_row(W, diag, count).removals()


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize("name", ["lenet300-100.fc1", "bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls(ours, published=numpy_sort, torch=torch_tuned))
def test_bench_ranking(
    benchmark: BenchmarkFixture, small: bool, record: Callable[..., None], impl: Impl, name: str
) -> None:
    """Half the layer, exactly; every row in rising order."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    W = shapes.weights(shape)
    diag = torch.rand(shape.columns, generator=torch.Generator().manual_seed(4)).add_(0.5)
    count = W.numel() // 2
    there = (*impl.place(W, diag), count)
    found = benchmark.pedantic(impl, args=there, rounds=10, warmup_rounds=1)
    order, start = (x.cpu() for x in found)
    row = torch.repeat_interleave(torch.arange(len(W)), start.diff())
    score = (W * W / diag)[row, order.long()]
    assert len(order) == count
    assert float(score.max()) == float((W * W / diag).flatten().kthvalue(count).values)
    assert bool(((score.diff() >= 0) | (row.diff() > 0)).all())
    record(2 * 8 * W.numel(), "GB/s", shape=tuple(W.shape), error=0.0)
