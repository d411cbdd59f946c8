"""A step of conjugate gradients on the kept columns of each row, against torch."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import conjugate


@pytest.mark.benchmark(group="conjugate_step")
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_conjugate_step(bench: Bench, impl: Impl, name: str) -> None:
    case = conjugate.step_case(shapes.named(name, small=bench.small))
    bench(case, impl, rounds=10)
