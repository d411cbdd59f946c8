"""The paper's removal: ``static_order_prune`` against torch and the released loop."""

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
from lobs_native.ops import reference

CHECKED = 4  # rows are independent, so a few of them check the rest


def ours(
    W: Tensor, A: Tensor, ranking: baselines.Ranking, order: Tensor, start: Tensor, *, backend: str
) -> Tensor:
    """Ours."""
    ops.static_order_prune_(W, A, order, start, backend=backend)
    return W


def torch_in_blocks(
    W: Tensor, A: Tensor, ranking: baselines.Ranking, order: Tensor, start: Tensor
) -> Tensor:
    """Tuned torch."""
    return baselines.remove_in_blocks_(W, A, ranking)


def released_loop(
    W: Tensor, A: Tensor, ranking: baselines.Ranking, order: Tensor, start: Tensor
) -> Tensor:
    """The authors' loop, in the variant that masks once at the end."""
    unit = np.repeat(np.arange(len(W)), start.diff().numpy())
    positions = order.numpy().astype(np.int64) * len(W) + unit
    inputs_first = W.numpy().T.copy()  # (C, R)
    return torch.from_numpy(
        baselines.remove_one_by_one(inputs_first, A.numpy(), positions, mask_at_once=False)
    ).T


@pytest.mark.benchmark(group="static_order_prune")
@pytest.mark.parametrize(
    ("name", "share"),
    [("lenet300-100.fc1", 0.933), ("bert-base.fc1", 0.5), ("opt-1.3b.attention", 0.5)],
)
@pytest.mark.parametrize("impl", impls(ours, published=released_loop, torch=torch_in_blocks))
def test_bench_static_order_prune(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    name: str,
    share: float,
) -> None:
    """Every way gives what the sequential loop in float64 gives."""
    if impl.run is released_loop and not small and not name.startswith("lenet"):
        pytest.skip("the loop takes minutes here; paired.py extrapolates it from a sample")
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    W = shapes.weights(shape)
    A = shapes.inverse(shapes.second_moment(shape)).to(torch.float32)
    count = round(share * W.numel())
    ranking = baselines.rank_by_row(W, A.diagonal(), count)
    order, start = ranking.removals()
    there = impl.place(W, A, order, start)
    pruned = benchmark.pedantic(
        impl,
        setup=lambda: ((there[0].clone(), there[1], ranking, *there[2:]), {}),
        rounds=10,
        warmup_rounds=1,
    ).cpu()
    expected = W[:CHECKED].to(torch.float64)
    start = start[: CHECKED + 1]
    reference.static_order_prune_(expected, A, order[: start[-1]], start)
    error = float((pruned[:CHECKED] - expected).norm() / expected.norm())
    record(2.0 * count * shape.columns, "GFLOP/s", shape=(shape.rows, shape.columns), error=error)
    assert error < 1e-4
