"""Reports of pruning inside a host count all weights of the network."""

from __future__ import annotations

import torch
from helpers.reports import layer
from torch import nn

from lobs_native.compat.reporting import report_of
from lobs_native.layers import layers_of
from lobs_native.report.records import Skipped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 10)
        self.head.weight = self.table.weight
        self.own = nn.Parameter(torch.zeros(3, 5))


def test_what_the_host_does_not_choose_is_counted_and_named():
    net = Net()
    chosen = [x for x in layers_of(net) if x.name == "first"]
    report = report_of(
        [layer("first")],
        [Skipped("head", "its weight is tied to table", 80, on_purpose=True)],
        model=net, pruned=chosen, removed=32, weights=64, seconds=1.0, settings={},
        host={"host": "1"}, bound="none",
    )  # fmt: skip
    assert {(x.name, x.weights, x.on_purpose) for x in report.skipped} == {
        ("head", 80, True),
        ("second", 32, True),
        ("own", 15, True),
    }
    coverage = report.coverage
    assert (coverage.pruned, coverage.total) == (64, 64 + 80 + 32 + 15)
    assert coverage.sparsity == 32 / 191
