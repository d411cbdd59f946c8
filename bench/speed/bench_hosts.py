"""Whole jobs of other programs, from inputs to pruned weights: see hosts.py."""

from __future__ import annotations

from collections.abc import Callable

import hosts
import pytest
import shapes
import torch
from impls import Impl, impls
from pytest_benchmark.fixture import BenchmarkFixture

Record = Callable[..., None]


@pytest.mark.benchmark(group="host: SparseGPT layer")
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-125m.fc2"])
@pytest.mark.parametrize(
    "impl",
    impls(hosts.sparsegpt_ours, published=hosts.sparsegpt_published, torch=hosts.sparsegpt_torch),
)
def test_bench_sparsegpt_layer(
    benchmark: BenchmarkFixture, small: bool, record: Record, impl: Impl, name: str
) -> None:
    """Every way removes half and loses what the published one loses, within 1 %."""
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    X, W, share = hosts.sparsegpt_inputs(shape, small=small)
    there = (*impl.place(X, W), share)
    pruned = benchmark.pedantic(impl, args=there, rounds=5, warmup_rounds=1).cpu()
    H = hosts.mean_moment(X)
    error = shapes.cost(W, pruned, H) / shapes.cost(W, torch.zeros_like(W), H)
    known = hosts.sparsegpt_published(X, W, share)
    expected = shapes.cost(W, known, H) / shapes.cost(W, torch.zeros_like(W), H)
    record(
        float(X.numel() + W.numel()) * shape.columns, "GFLOP/s", shape=tuple(W.shape), error=error
    )
    assert error <= 1.01 * expected
    assert 0 <= int((pruned == 0).sum()) - share * W.numel() <= 4 * -(-shape.columns // 128)


@pytest.mark.benchmark(group="host: OBC layer")
@pytest.mark.parametrize(
    "impl", impls(hosts.obc_ours, published=hosts.obc_published, torch=hosts.obc_torch)
)
def test_bench_obc_layer(
    benchmark: BenchmarkFixture, small: bool, record: Record, impl: Impl
) -> None:
    """Every way gives five sparsities, exactly, and loses no more than the published choice."""
    if impl.run is hosts.obc_published and not small:
        pytest.skip("the loop takes most of a minute; paired.py extrapolates it from a sample")
    shape = shapes.LAYERS["resnet50.layer1.conv2"]
    shape = shape.small() if small else shape
    X, W, levels = hosts.obc_inputs(shape)
    there = (*impl.place(X, W), levels)
    pruned = benchmark.pedantic(impl, args=there, rounds=3, warmup_rounds=1).cpu()
    lost = hosts.lost_shares(W, hosts.mean_moment(X), levels)
    error = lost(pruned)
    record(shape.rows * shape.columns**3 / 3, "GFLOP/s", shape=tuple(W.shape), error=error)
    assert error <= 1.01 * lost(hosts.obc_torch(X, W, levels))  # chosen as published


@pytest.mark.benchmark(group="host: block Fisher step")
@pytest.mark.parametrize("B", shapes.FISHER_BLOCKS)
@pytest.mark.parametrize(
    "impl", impls(hosts.fisher_ours, published=hosts.fisher_published, torch=hosts.fisher_torch)
)
def test_bench_fisher_step(
    benchmark: BenchmarkFixture, small: bool, record: Record, impl: Impl, B: int
) -> None:
    """Every way leaves the weights that float64 leaves."""
    shape = shapes.LAYERS["bert-base.attention"]
    G, w, _ = hosts.fisher_inputs(shape.small() if small else shape, B)
    there = (*impl.place(G, w), B)
    pruned = benchmark.pedantic(impl, args=there, rounds=3, warmup_rounds=1).cpu()
    expected = hosts.fisher_torch(G.double(), w.double(), B)
    error = float((pruned - expected).norm() / expected.norm())
    record(
        len(w) / B * (len(G) / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        "GFLOP/s",
        shape=(len(w) // B, B, B),
        error=error,
    )
    assert error < 1e-2
