"""Block inverse of WoodFisher and oBERT: ``inverse_update_`` against torch."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import inverse

GRADIENTS = 16


@pytest.mark.benchmark(group="inverse_update")
@pytest.mark.parametrize("B", shapes.FISHER_BLOCKS)
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_inverse_update(bench: Bench, impl: Impl, B: int) -> None:
    weights = shapes.FISHER_WEIGHTS // (64 if bench.small else 1)
    bench(inverse.update_case(weights, B, GRADIENTS), impl, rounds=10)
