"""Swapping kept against removed weights: ``exchange_`` against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import exchange


@pytest.mark.benchmark(group="exchange")
@pytest.mark.parametrize(
    "shape",
    [
        replace(shapes.LAYERS["lenet300-100.fc2"], rows=64),
        shapes.LayerShape("384 columns", 4, 384),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", impls("torch", devices=["cpu"]))
def test_bench_exchange(bench: Bench, impl: Impl, shape: shapes.LayerShape) -> None:
    bench(exchange.exchange_case(shape.small() if bench.small else shape), impl, rounds=10)
