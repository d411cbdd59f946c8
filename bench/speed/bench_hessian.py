"""Second moment of a chunk of inputs: ``hessian_accumulate_`` against torch."""

from __future__ import annotations

import pytest
import torch

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import hessian

ROWS = 8192  # tokens or samples in one chunk


@pytest.mark.benchmark(group="hessian_accumulate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert-base.fc1", "bert-large.attention", "opt-1.3b.attention"])
@pytest.mark.parametrize("impl", impls("published", "torch-product", "torch"))
def test_bench_hessian_accumulate(bench: Bench, impl: Impl, name: str, dtype: torch.dtype) -> None:
    rows, C = (ROWS // 16 if bench.small else ROWS), shapes.named(name, small=bench.small).columns
    bench(hessian.accumulate_case(rows, C, dtype), impl, rounds=15)
