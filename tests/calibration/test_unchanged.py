"""Models that change their inputs in place see the same data in every pass, and leave the user's
data alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Batch:
    x: Tensor
    labels: list[Tensor]


class Net(nn.Module):
    """Two layers after a step that is a function."""

    def __init__(self, step: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.a, self.b = step, nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, batch: Any) -> Tensor:
        return self.b(self.a(self.step(batch)).relu_())


def rows() -> list[Tensor]:
    return [torch.randn(40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


# A batch of rows, what is done with it, and the rows that are in it.
WAYS: dict[
    str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any], Tensor]]
] = {
    "tensor": (lambda x: x, lambda x: x.sub_(1.0).mul_(0.5), lambda x: x),
    "view": (lambda x: x, lambda x: x.view(-1).mul_(0.5).view_as(x), lambda x: x),
    "popped": (
        lambda x: {"x": x, "y": x[:1]},
        lambda d: d.pop("x") * d.pop("y").mean(),
        lambda d: d["x"],
    ),
    "replaced": (lambda x: [x], lambda d: d.append(0.5 * d.pop()) or d[0], lambda d: d[0]),
    "attribute": (lambda x: Batch(x, [x[:1]]), lambda d: d.x.sub_(1.0), lambda d: d.x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", ["dense", "pruned", "corrected"])
def test_every_pass_sees_the_same_batches(way, inputs):
    wrap, step, rows_in = WAYS[way]
    data, net = [wrap(x) for x in rows()], Net(step)
    old = copy.deepcopy(net)
    settings = {"sparsity": 0.5, "progress": False, "inputs": inputs}
    report = lobs.prune(net, data, **settings, forward=lambda m, d: m(d))
    for batch, x in zip(data, rows(), strict=True):
        assert torch.equal(rows_in(batch), x)
    seen = torch.cat([step(batch) for batch in data])
    change = (net.a(seen) - old.a(seen)).detach()
    assert report.layers[0].error == pytest.approx(float(change.square().sum(1).mean()), rel=1e-4)


def test_a_batch_that_is_changed_later_than_the_first_is_refused():
    net = Net(lambda x: x if len(x) == 40 else x.mul_(0.5))
    weights = [p.clone() for p in net.parameters()]
    with pytest.raises(ArgumentError, match="calibration: the model changes a batch in place"):
        lobs.prune(net, [*rows(), torch.randn(30, 16)], sparsity=0.5, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_layers_on_a_way_that_is_drawn_are_seen_where_they_are_called():
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if torch.rand(()) < 0.5 else self.b(x)

    report = lobs.prune(Drawn(), rows() * 3, sparsity=0.5, progress=False, inputs="dense")
    assert [layer.name for layer in report.layers] == ["a", "b"]
    assert sum(layer.rows for layer in report.layers) == 9 * 40
