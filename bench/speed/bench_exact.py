"""Exact greedy removal: ``exact_trace`` against torch and the published loop."""

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

ROWS = 32  # what the published loop takes at a time
CHECKED = 2  # rows are independent, so a few of them check the rest

Way = Callable[[Tensor, Tensor, int, int, int], baselines.Exact]


def ours(
    W: Tensor, A: Tensor, until: int, keep: int, size: int, *, backend: str
) -> baselines.Exact:
    """Ours."""
    W = W.clone()
    trace = ops.exact_trace(
        W, A, limit=until, group=size, per_group=size - keep, update=True, backend=backend
    )
    return baselines.Exact(trace.order, trace.loss, W)


def torch_in_panels(W: Tensor, A: Tensor, until: int, keep: int, size: int) -> baselines.Exact:
    """Tuned torch."""
    return baselines.exact_torch(W, A, until, keep, size)


def published_loop(W: Tensor, A: Tensor, until: int, keep: int, size: int) -> baselines.Exact:
    """OBC's loop, with one private inverse per row."""
    if size:
        return baselines.obc_groups(W, A, keep, size)
    return baselines.obc_unstructured(W, A, until)


@pytest.mark.benchmark(group="exact_trace")
@pytest.mark.parametrize(
    ("name", "share", "keep", "size"),
    [
        ("bert-base.fc1", 0.5, 0, 0),
        ("bert-base.fc1", 1.0, 0, 0),
        ("bert-base.fc1", 0.5, 2, 4),
        ("opt-1.3b.attention", 0.5, 0, 0),
    ],
)
@pytest.mark.parametrize("impl", impls(ours, published=published_loop, torch=torch_in_panels))
def test_bench_exact_trace(
    benchmark: BenchmarkFixture,
    small: bool,
    record: Callable[..., None],
    impl: Impl,
    name: str,
    share: float,
    keep: int,
    size: int,
) -> None:
    """Every way loses what float64 loses, step for step, and its weights lose that as well."""
    if impl.run is published_loop and not small:
        pytest.skip("the loop takes most of a minute; paired.py extrapolates it from a sample")
    shape = shapes.LAYERS[name].small() if small else shapes.LAYERS[name]
    shape = replace(shape, rows=min(shape.rows, ROWS))
    C, k = shape.columns, round(share * shape.columns)
    W = shapes.weights(shape)
    H = shapes.second_moment(shape)
    A = shapes.inverse(H).to(torch.float32)
    there = (*impl.place(W, A), k, keep, size)
    found = benchmark.pedantic(impl, args=there, rounds=5, warmup_rounds=1)
    found = baselines.Exact(*(x.cpu() for x in found))
    expected = baselines.exact_torch(
        W[:CHECKED].to(torch.float64), A.to(torch.float64), k, keep, size
    )
    curve = found.loss[:CHECKED].to(torch.float64).cumsum(dim=1)
    right = expected.loss.cumsum(dim=1)
    error = float((curve - right).norm() / right.norm())
    record(
        2 * shape.rows * (C * k**2 / 2 - k**3 / 3), "GFLOP/s", shape=(shape.rows, C), error=error
    )
    assert error < 1e-3
    assert bool(((found.weights == 0).sum(dim=1) == k).all())
    lost = shapes.cost(W, found.weights, shapes.damped(H))
    assert lost == pytest.approx(float(found.loss.to(torch.float64).sum()), rel=1e-3)


@pytest.mark.parametrize(("share", "keep", "size"), [(0.5, 0, 0), (1.0, 0, 0), (0.5, 2, 4)])
@pytest.mark.parametrize("way", [torch_in_panels, published_loop])
def test_rivals_are_right(way: Way, share: float, keep: int, size: int) -> None:
    """In float64 they remove the same weights in the same order as the reference."""
    shape = replace(shapes.LAYERS["bert-base.fc1"].small(), rows=4)
    W = shapes.weights(shape).to(torch.float64)
    A = shapes.inverse(shapes.second_moment(shape))
    k = round(share * shape.columns)
    found = way(W, A, k, keep, size)
    repaired = W.clone()
    trace = ops.exact_trace(
        repaired,
        A,
        limit=k,
        group=size,
        per_group=size - keep,
        update=True,
        backend="reference",
    )
    assert torch.equal(found.order, trace.order.long())
    torch.testing.assert_close(found.loss, trace.loss)
    torch.testing.assert_close(found.weights, repaired)
