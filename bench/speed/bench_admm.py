"""Between two matrix products of ADMM: ``admm_step_`` against torch."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import admm


@pytest.mark.benchmark(group="admm_step")
@pytest.mark.parametrize("selection", admm.SELECTIONS)
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_admm_step(bench: Bench, impl: Impl, name: str, selection: str) -> None:
    case = admm.step_case(shapes.named(name, small=bench.small), selection)
    bench(case, impl, rounds=10)
