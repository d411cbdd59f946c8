"""SparseGPT's sweep over a whole layer: ``sweep_block_`` in a loop over blocks, and the published
loop."""

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

CHECKED = 4  # rows are independent once the mask is chosen, so a few of them check the rest
WIDTH = 128  # columns of a block, as published


def ours(W: Tensor, U: Tensor, share: float, group: int, per_group: int, *, backend: str) -> Tensor:
    """Ours: one native call per block; what is right of it is left to torch's matrix product."""
    R, C = W.shape
    for begin in range(0, C, WIDTH):
        block = slice(begin, min(begin + WIDTH, C))
        part, u = W[:, block], U[block, block]
        E = torch.empty_like(part, memory_format=torch.contiguous_format)
        if group:
            gone = torch.zeros(part.shape, dtype=torch.uint8)
        else:
            score = (part / u.diagonal()).to(torch.float64).square_()
            lowest = ops.rank_lowest(
                score.view(1, -1), round(share * score.numel()), backend=backend
            )
            gone = lowest.view(R, -1).view(torch.uint8)
        ops.sweep_block_(part, u, gone, E, group=group, per_group=per_group, backend=backend)
        W[:, block.stop :].addmm_(E, U[block, block.stop :], alpha=-1)
    return W


def published_loop(W: Tensor, U: Tensor, share: float, group: int, per_group: int) -> Tensor:
    """SparseGPT's loop."""
    return baselines.sparsegpt_(W, U, share, group, per_group, WIDTH)


def torch_transposed(W: Tensor, U: Tensor, share: float, group: int, per_group: int) -> Tensor:
    """Tuned torch."""
    return baselines.sweep_transposed_(W, U, share, group, per_group, WIDTH)


@pytest.mark.benchmark(group="sweep")
@pytest.mark.parametrize(("group", "per_group"), [(0, 0), (4, 2)], ids=["50%", "2:4"])
@pytest.mark.parametrize("impl", impls(ours, published=published_loop, torch=torch_transposed))
def test_bench_sweep(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    group: int,
    per_group: int,
) -> None:
    """Every way leaves what the sequential loop in float64 leaves for the mask that it chose."""
    shape = shapes.LAYERS["opt-1.3b.attention"]
    if small:
        shape = shape.small()
    W = shapes.weights(shape)
    A = shapes.inverse(shapes.second_moment(shape))
    U = torch.linalg.cholesky(A, upper=True).to(torch.float32)
    there = impl.place(W, U)
    pruned = benchmark.pedantic(
        impl,
        setup=lambda: ((there[0].clone(), there[1], 0.5, group, per_group), {}),
        rounds=5,
        warmup_rounds=1,
    ).cpu()
    gone = pruned == 0
    if group:
        assert (gone.view(-1, group).sum(dim=1) == per_group).all()
    else:
        assert abs(float(gone.double().mean()) - 0.5) < 1e-3
    expected = W[:CHECKED].to(torch.float64)
    reference.sweep_block_(
        expected, U, gone[:CHECKED].to(torch.uint8), torch.empty_like(expected), 0, 0
    )
    error = float((pruned[:CHECKED] - expected).norm() / expected.norm())
    record(shape.rows * shape.columns**2, "GFLOP/s", shape=(shape.rows, shape.columns), error=error)
    assert error < 1e-4
