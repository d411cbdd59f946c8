"""Block inverse of WoodFisher and oBERT: ``inverse_update`` against torch."""

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
from lobs_native.ops import reference

CHECKED = 8  # blocks are independent, so a few of them check the rest


def ours(F: Tensor, G: Tensor, m: float, *, backend: str) -> Tensor:
    """Ours."""
    ops.inverse_update_(F, G, m, backend=backend)
    return F


@pytest.mark.benchmark(group="inverse_update")
@pytest.mark.parametrize("B", shapes.FISHER_BLOCKS)
@pytest.mark.parametrize(
    "impl",
    impls(
        ours,
        published=baselines.inverse_update_one_by_one_,
        torch=baselines.inverse_update_together_,
    ),
)
def test_bench_inverse_update(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    B: int,
) -> None:
    """Sixteen gradients give what sixteen rank-1 updates in float64 give."""
    r = 16
    blocks = -(-shapes.FISHER_WEIGHTS // B) // (64 if small else 1)
    G = shapes.gradients(r, blocks * B)
    F, there = impl.place(torch.empty(blocks, B, B), G)

    def start() -> tuple[tuple[Tensor, Tensor, float], dict[str, object]]:
        F.zero_().diagonal(dim1=1, dim2=2).fill_(shapes.FISHER_ALPHA)
        return (F, there, float(r)), {}

    after = benchmark.pedantic(impl, setup=start, rounds=10, warmup_rounds=1)[:CHECKED].cpu()
    after = after.clone()  # F itself starts again
    start()
    expected = F[:CHECKED].cpu().to(torch.float64)
    reference.inverse_update_(expected, G[:, : CHECKED * B], float(r))
    error = float((after - expected).norm() / expected.norm())
    record(
        blocks * (r / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        "GFLOP/s",
        shape=(blocks, B, B),
        error=error,
    )
    assert error < 1e-3
