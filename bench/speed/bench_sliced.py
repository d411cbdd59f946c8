"""Products of few rows with a sparse weight, against torch's dense ones."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import sliced


@pytest.mark.benchmark(group="sliced_linear")
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("sparsity", [0.7, 0.9])
@pytest.mark.parametrize("impl", impls("torch", "csr"))
def test_bench_sliced_linear(bench: Bench, impl: Impl, sparsity: float, rows: int) -> None:
    shape = shapes.named("bert-base.fc1", small=bench.small)
    bench(sliced.product_case(shape, sparsity, rows), impl, rounds=20)
