"""Exact greedy removal: ``exact_trace`` against torch and the published loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lobs_native import ops
from speed import shapes
from speed.baselines import exact as baselines
from speed.benched import Bench, Impl, impls
from speed.cases import exact

ROWS = 32  # what the published loop takes at a time


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
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_exact_trace(
    bench: Bench, impl: Impl, name: str, share: float, keep: int, size: int
) -> None:
    if impl.rival == "published" and not bench.small:
        pytest.skip("the loop takes most of a minute; paired.py extrapolates it from a sample")
    shape = shapes.named(name, small=bench.small)
    shape = replace(shape, rows=min(shape.rows, ROWS))
    bench(exact.weights_case(shape, share, keep=keep, size=size), impl, rounds=5)


@pytest.mark.parametrize(("share", "keep", "size"), [(0.5, 0, 0), (1.0, 0, 0), (0.5, 2, 4)])
@pytest.mark.parametrize("rival", ["torch", "published"])
def test_rivals_are_right(rival: str, share: float, keep: int, size: int) -> None:
    """In float64 they remove the same weights in the same order as the reference."""
    shape = replace(shapes.LAYERS["bert-base.fc1"].small(), rows=4)
    case = exact.weights_case(shape, share, keep=keep, size=size)
    W = shapes.weights(shape).to(torch.float64)
    A = shapes.inverse(shapes.second_moment(shape))
    run = case.rivals[rival].run
    assert run is not None
    answer: baselines.Exact = run(W, A)
    k = round(share * shape.columns)
    repaired = W.clone()
    trace = ops.exact_trace(
        repaired, A, limit=k, group=size, per_group=size - keep, update=True, backend="reference"
    )
    assert torch.equal(answer.order, trace.order.long())
    torch.testing.assert_close(answer.loss, trace.loss)
    torch.testing.assert_close(answer.weights, repaired)
