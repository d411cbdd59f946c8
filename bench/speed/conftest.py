"""The fixture of the benchmarks."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from speed.benched import Bench


@pytest.fixture
def bench(benchmark: BenchmarkFixture) -> Bench:
    """Run one side of a case; small where benchmarks are disabled."""
    return Bench(benchmark)
