"""One small system per row, all cut from the same matrix: ``support_solve_`` against torch."""

from __future__ import annotations

import pytest
import torch

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import solve


@pytest.mark.benchmark(group="support_solve")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_support_solve(bench: Bench, impl: Impl, name: str, dtype: torch.dtype) -> None:
    shape = shapes.named(name, small=bench.small)
    bench(solve.solve_case(shape, dtype, rows=64), impl, rounds=5)
