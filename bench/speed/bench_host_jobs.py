"""Whole jobs of other programs, from inputs to pruned weights."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import host_jobs


@pytest.mark.benchmark(group="host: SparseGPT layer")
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-125m.fc2"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_sparsegpt_layer(bench: Bench, impl: Impl, name: str) -> None:
    shape = shapes.named(name, small=bench.small)
    bench(host_jobs.sparsegpt_case(shape, small=bench.small), impl, rounds=5)


@pytest.mark.benchmark(group="host: OBC layer")
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_obc_layer(bench: Bench, impl: Impl) -> None:
    if impl.rival == "published" and not bench.small:
        pytest.skip("the loop takes most of a minute; paired.py extrapolates it from a sample")
    bench(
        host_jobs.obc_case(shapes.named("resnet50.layer1.conv2", small=bench.small)), impl, rounds=3
    )


@pytest.mark.benchmark(group="host: block Fisher step")
@pytest.mark.parametrize("B", shapes.FISHER_BLOCKS)
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_fisher_step(bench: Bench, impl: Impl, B: int) -> None:
    shape = shapes.named("bert-base.attention", small=bench.small)
    bench(host_jobs.fisher_case(shape, B), impl, rounds=3)
