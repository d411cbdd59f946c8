"""A quarter of a layer's columns, or of its heads, removed from all rows, against torch."""

from __future__ import annotations

import pytest

from speed.benched import Bench, Impl, impls
from speed.cases import columns


@pytest.mark.benchmark(group="columns_trace")
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("name", ["bert-base.attention", "bert-large.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_columns_trace(bench: Bench, impl: Impl, name: str, size: int) -> None:
    case = columns.removal_case(name, 4 if bench.small and size > 1 else size, small=bench.small)
    bench(case, impl, rounds=3)
