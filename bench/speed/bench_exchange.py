"""Swapping kept against removed weights: ``exchange`` against torch."""

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

SHARE = 0.5
WITHOUT_END = 1_000_000


def ours(W: Tensor, A: Tensor, kept: Tensor, *, backend: str) -> Tensor:
    """Ours, which also checks its inputs."""
    return ops.exchange_(W, A, kept, backend=backend)[0]


def torch_tableau(W: Tensor, A: Tensor, kept: Tensor) -> Tensor:
    """The same algorithm in torch, row by row."""
    return baselines.exchange_(W, A, kept, WITHOUT_END)


def error_left(W: Tensor, dense: Tensor, H: Tensor) -> Tensor:
    """dw H dw^T of each row."""
    return ((W - dense) @ H * (W - dense)).sum(dim=1)


@pytest.mark.benchmark(group="exchange")
@pytest.mark.parametrize(
    "shape",
    [
        replace(shapes.LAYERS["lenet300-100.fc2"], rows=64),
        shapes.LayerShape("384 columns", 4, 384),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", impls(ours, devices=["cpu"], torch=torch_tableau))
def test_bench_exchange(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    shape: shapes.LayerShape,
) -> None:
    """Every way ends with the same sets: those of our reference."""
    if small:
        shape = shape.small()
    dense = shapes.weights(shape).to(torch.float64)
    H = shapes.second_moment(shape)
    A = shapes.inverse(H)
    H.diagonal().add_(shapes.DAMPING * H.diagonal().mean())
    R, C = dense.shape
    k = round(SHARE * C)
    cheapest = (dense**2 / A.diagonal()).argsort(dim=1)[:, :k]
    kept = torch.ones(R, C, dtype=torch.bool).scatter_(1, cheapest, False)
    last: list[tuple[Tensor, Tensor]] = []

    def fresh() -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        last[:] = [(dense.clone(), kept.clone())]
        return (last[0][0], A, last[0][1]), {}

    swaps = benchmark.pedantic(impl, setup=fresh, rounds=10, warmup_rounds=1)
    W, found = last[0]
    checked = min(R, 4)  # rows are independent, so a few of them check the rest
    expected, sets = dense[:checked].clone(), kept[:checked].clone()
    ops.exchange_(expected, A, sets, backend="reference")
    assert torch.equal(found[:checked], sets)
    best = error_left(expected, dense[:checked], H)
    error = float((error_left(W[:checked], dense[:checked], H) / best - 1).abs().max())
    # As in csrc/exchange.h: the tableau, then 3 C^2 per swap.
    record((R * k + 3.0 * int(swaps.sum())) * C**2, "GFLOP/s", shape=(R, C), error=error)
    assert error < 1e-9
