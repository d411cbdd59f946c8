"""SparseGPT's sweep: ``sweep_block_`` in a loop over blocks, against torch and as published."""

from __future__ import annotations

import pytest

from speed.benched import Bench, Impl, impls
from speed.cases import sweep
from speed.cases.layers import named_layer


@pytest.mark.benchmark(group="sweep")
@pytest.mark.parametrize("pattern", [None, "2:4"], ids=["50%", "2:4"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_sweep(bench: Bench, impl: Impl, pattern: str | None) -> None:
    layer = named_layer("opt-1.3b.attention", 0.5, small=bench.small)
    bench(sweep.sweep_case(layer, pattern), impl, rounds=5)
