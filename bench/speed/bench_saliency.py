"""The cheapest weight of each row: ``saliency_argmin`` against torch."""

from __future__ import annotations

import pytest

from speed import shapes
from speed.benched import Bench, Impl, impls
from speed.cases import saliency


@pytest.mark.benchmark(group="saliency_argmin")
@pytest.mark.parametrize("name", ["bert-base.fc1", "opt-1.3b.attention", "resnet50.layer4.conv2"])
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_saliency_argmin(bench: Bench, impl: Impl, name: str) -> None:
    bench(saliency.argmin_case(shapes.named(name, small=bench.small)), impl, rounds=30)
