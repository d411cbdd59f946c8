"""Which weights go, in what order in each row: ``rank_lowest`` and ``rank_rows`` against torch."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import shapes
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lobs_native import ops

Way = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def lobs_cpu(W: Tensor, diag: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Radix selection over the layer, radix sort in each row."""
    score = (W * W / diag).to(torch.float64)
    gone = ops.rank_lowest(score.view(1, -1), count, backend="cpu").view_as(score)
    return ops.rank_rows(score, gone, backend="cpu")


def torch_tuned(W: Tensor, diag: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """kthvalue over the layer, one stable argsort of all rows."""
    return baselines.rank_by_row(W, diag, count).removals()


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize("name", ["lenet300-100.fc1", "bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("way", [lobs_cpu, torch_tuned])
def test_bench_ranking(
    benchmark: BenchmarkFixture, small: bool, record: Callable[..., None], way: Way, name: str
) -> None:
    """Half the layer, exactly; every row in rising order."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    W = shapes.weights(shape)
    diag = torch.rand(shape.columns, generator=torch.Generator().manual_seed(4)).add_(0.5)
    count = W.numel() // 2
    order, start = benchmark.pedantic(way, args=(W, diag, count), rounds=10, warmup_rounds=1)
    row = torch.repeat_interleave(torch.arange(len(W)), start.diff())
    score = (W * W / diag)[row, order.long()]
    assert len(order) == count
    assert float(score.max()) == float((W * W / diag).flatten().kthvalue(count).values)
    assert bool(((score.diff() >= 0) | (row.diff() > 0)).all())
    record(2 * 8 * W.numel(), "GB/s", shape=tuple(W.shape), error=0.0)
