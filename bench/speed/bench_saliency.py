"""The cheapest weight of each row: ``saliency_argmin`` against torch."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import shapes
import torch
from impls import Impl, impls
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lobs_native import ops


def ours(
    W: Tensor, diag: Tensor, live: Tensor, dead: Tensor, cost: Tensor, *, backend: str
) -> Tensor:
    """Ours, which also checks its inputs."""
    return ops.saliency_argmin(W, diag, live, backend=backend)[0]


def torch_where(W: Tensor, diag: Tensor, live: Tensor, dead: Tensor, cost: Tensor) -> Tensor:
    """A new tensor at every step."""
    return baselines.saliency_argmin(W, diag, live)


def torch_in_place(W: Tensor, diag: Tensor, live: Tensor, dead: Tensor, cost: Tensor) -> Tensor:
    """Everything that can be kept between calls is kept."""
    return baselines.saliency_argmin_in_place(W, diag, dead, cost)


@pytest.mark.benchmark(group="saliency_argmin")
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention", "resnet50.layer4.conv2"])
@pytest.mark.parametrize("impl", impls(ours, published=torch_where, torch=torch_in_place))
def test_bench_saliency_argmin(
    benchmark: BenchmarkFixture, small: bool, record: Callable[..., None], impl: Impl, name: str
) -> None:
    """The chosen weight costs no more than any other live one."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    R, C = shape.rows, shape.columns
    generator = torch.Generator().manual_seed(3)
    W = shapes.weights(shape)
    diag = torch.rand(R, C, generator=generator).add_(0.5)
    live = torch.rand(R, C, generator=generator) >= 0.3
    there = impl.place(W, diag, live, ~live, torch.empty_like(W))
    column = benchmark.pedantic(impl, args=there, rounds=30, warmup_rounds=1).cpu()
    cost = torch.where(live, W.to(torch.float64) ** 2 / diag, torch.inf)
    chosen = cost.gather(1, column[:, None])[:, 0]
    lowest = cost.amin(dim=1)  # may be zero
    error = float((chosen - lowest).max() / lowest.mean())
    record(9 * R * C, "GB/s", shape=(R, C), error=error)
    assert error < 1e-6
