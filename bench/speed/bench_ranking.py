"""Which weights go, in what order in each row: ``rank_lowest`` and ``rank_rows`` against torch."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import ranking


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize("name", ["lenet300-100.fc1", "bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_ranking(bench: Bench, impl: Impl, name: str) -> None:
    bench(ranking.rank_case(shapes.named(name, small=bench.small)), impl, rounds=10)
