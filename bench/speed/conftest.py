"""Fixtures of the benchmarks: small sizes where nothing is timed, and notes beside each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import lobs_native as lobs


@pytest.fixture
def small(benchmark: BenchmarkFixture) -> bool:
    """True where benchmarks are disabled and only the answers matter."""
    return bool(benchmark.disabled)


@pytest.fixture
def record(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write who it was, its rate (``work`` over the median time) and the circumstances into
    ``extra_info``."""

    def write(work: float, unit: str, *, shape: tuple[int, ...], error: float) -> None:
        impl = request.getfixturevalue("impl")
        benchmark.extra_info.update(
            impl=impl.name,
            device=impl.device,
            shape=shape,
            threads=torch.get_num_threads(),
            backends=[detail for name, _, detail in lobs.backends() if name == impl.device],
            error=error,
        )
        if benchmark.enabled:
            benchmark.extra_info[unit] = work / benchmark.stats.stats.median / 1e9

    return write
