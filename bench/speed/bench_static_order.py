"""The paper's removal: ``static_order_prune_`` against torch and the released loop."""

from __future__ import annotations

import pytest

from speed.benched import Bench, Impl, impls
from speed.cases import static_order
from speed.cases.layers import named_layer


@pytest.mark.benchmark(group="static_order_prune")
@pytest.mark.parametrize(
    ("name", "share"),
    [("lenet300-100.fc1", 0.933), ("bert-base.fc1", 0.5), ("opt-1.3b.attention", 0.5)],
)
@pytest.mark.parametrize("impl", impls("published", "torch"))
def test_bench_static_order_prune(bench: Bench, impl: Impl, name: str, share: float) -> None:
    if impl.rival == "published" and not bench.small and not name.startswith("lenet"):
        pytest.skip("the loop takes minutes here; paired.py extrapolates it from a sample")
    layer = named_layer(name, share, small=bench.small)
    bench(static_order.removal_case(layer), impl, rounds=10)
