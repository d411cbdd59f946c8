"""The order of layers, and what they share, where batches take different ways through a model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.flow import Flow, flow_of
from lobs_native.calibration.session import Session
from lobs_native.layers import layers_of


class Ways(nn.Module):
    """Calls the layers that a batch names; those in a tuple read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})

    def forward(self, x: Tensor, way: list[str | tuple[str, ...]]) -> Tensor:
        for step in way:
            x = sum(self.layers[name](x) for name in step)
        return x


def flow(*ways: list[Any]) -> Flow:
    model = Ways()
    session = Session(model, [(torch.randn(3, 4), way) for way in ways], None, None, 0, False)
    with session.evaluating():
        found = flow_of(layers_of(model), session)
    short = {f"layers.{name}": name for name in "abcd"}
    return Flow(
        [short[name] for name in found.order],
        [[short[name] for name in group] for group in found.groups],
        {short[name] for name in found.once},
        {short[name]: rows for name, rows in found.rows.items()},
    )


@pytest.mark.parametrize(
    ("ways", "order"),
    [
        ((["a", "b", "c", "d"],), "abcd"),
        ((["a", "c"], ["b", "c"]), "abc"),
        ((["c"], ["a"], ["b"], ["a", "b", "c"]), "abc"),
        ((["b", "d"], ["a", "c"], ["c", "b"]), "acbd"),
        ((["a", "b"], ["b", "a"], ["b", "c"]), "abc"),  # a contradiction: as first called
        ((["d", "a"], ["a", "d"], ["d", "a"]), "da"),
        ((["b", "c", "b"], ["c", "a"]), "bca"),
    ],
)
def test_layers_come_after_those_that_are_called_before_them_in_any_batch(ways, order):
    assert "".join(flow(*ways).order) == order


def test_all_ways_through_a_model_are_the_same_order_of_batches():
    ways = (["a", "b"], ["b", "d"], ["c", "d"], ["a", "d"])
    for some in itertools.permutations(ways):
        order = flow(*some).order
        assert order.index("a") < order.index("b") < order.index("d")
        assert order.index("c") < order.index("d")


def test_one_batch_that_calls_all_layers_is_enough():
    found = flow(["d", "c", "b", "a"], ["a", "d"])
    assert found.order == list("dcba")
    assert found.once == set("abcd")
    assert found.rows == dict.fromkeys("abcd", 3)


def test_layers_share_a_tensor_only_if_they_do_in_every_batch():
    assert flow([("a", "b", "c")]).groups == [["a", "b", "c"]]
    assert flow([("a", "b", "c")], [("a", "b"), "c"]).groups == [["a", "b"], ["c"]]
    assert flow([("a", "b", "c")], ["a"]).groups == [["a"], ["b", "c"]]
    assert flow([("a", "b")], ["c"], [("a", "b")]).groups == [["a", "b"], ["c"]]
    assert flow([("a", "b", "a")]).groups == [["a"], ["b"]]


def test_a_layer_that_any_batch_calls_twice_is_not_called_once():
    found = flow(["a", "b"], ["b", "a", "b"], ["c"])
    assert found.once == {"a", "c"}
    assert found.rows == {"a": 3, "b": 3}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, first: bool, times: int = 1) -> Tensor:
        x = self.a(x) if first else self.b(x)
        for _ in range(times - 1):
            self.c(2 * x)
        return self.c(x)


@pytest.mark.parametrize("inputs", ["corrected", "pruned"])
@pytest.mark.parametrize("order", [(True, False, False), (False, False, True)])
def test_the_reported_error_is_that_on_the_finished_network(inputs, order):
    """Also of a layer which reads another that only a later batch reaches."""
    dense = Branches().double()
    data = [(torch.randn(20, 6).double(), first) for first in order]
    net = copy.deepcopy(dense)
    report = lobs.prune(net, data, sparsity=0.6, inputs=inputs, progress=False)
    assert [layer.name for layer in report.layers][2] == "c"
    with torch.no_grad():
        rows, old = (
            torch.cat([(m.a if first else m.b)(x) for x, first in data]) for m in (net, dense)
        )
        wanted = dense.c(old if inputs == "corrected" else rows)
        error = float((net.c(rows) - wanted).square().sum() / len(rows))
    assert report.layers[2].error == pytest.approx(error)


def test_every_call_counts_although_the_first_batch_has_only_one():
    data = [(torch.randn(20, 6), True), (torch.randn(20, 6), False, 3)]
    report = lobs.prune(Branches(), data, sparsity=0.5, progress=False)
    assert {layer.name: layer.rows for layer in report.layers} == {"a": 20, "b": 20, "c": 80}
