"""Second moment of a chunk of inputs: ``hessian_accumulate`` against torch."""

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

ROWS = 8192  # tokens or samples in one chunk


def ours(X: Tensor, *, backend: str) -> Tensor:
    """Ours: the lower triangle, float64."""
    H = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=backend)
    return H


def torch_running_mean(X: Tensor) -> Tensor:
    """Published; brought back from its mean of 2 x x^T by whoever compares."""
    return baselines.gram_running_mean_(torch.zeros(X.shape[1], X.shape[1]), 0, X)


def torch_block_triangle(X: Tensor) -> Tensor:
    """Tuned torch."""
    H = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    return baselines.gram_block_triangle_(H, X)


@pytest.mark.benchmark(group="hessian_accumulate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert-base.fc1", "bert-large.attention", "opt-1.3b.attention"])
@pytest.mark.parametrize(
    "impl",
    impls(
        ours,
        published=torch_running_mean,
        torch_product=baselines.gram,
        torch=torch_block_triangle,
    ),
)
def test_bench_hessian_accumulate(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    name: str,
    dtype: torch.dtype,
) -> None:
    """All ways give the lower triangle of X^T X to float32 accuracy."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    N, C = (ROWS // 16 if small else ROWS), shape.columns
    X = shapes.relu_features(N, C).to(dtype)
    H = benchmark.pedantic(impl, args=impl.place(X), rounds=15, warmup_rounds=1).cpu()
    exact = X.to(torch.float64)
    expected = (exact.T @ exact).tril()
    unit = N / 2 if impl.run is torch_running_mean else 1.0
    error = float((H.tril() * unit - expected).norm() / expected.norm())
    record(N * C * (C + 1), "GFLOP/s", shape=(N, C), error=error)
    assert error < 1e-5
