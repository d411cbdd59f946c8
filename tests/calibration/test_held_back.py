"""Batches that nothing is calibrated on, and what is measured on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.calibration.held_back import divided


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def network(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, width), *(Block(width) for _ in range(2)), nn.Linear(width, 3)
    )


def data(count: int, rows: int = 10, width: int = 12) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=made)
    return [torch.randn(rows, width, generator=made) @ mix for _ in range(count)]


def test_batches_are_divided_evenly():
    """A quarter of eight: the middle of each half. A tiny share is one batch."""
    used, held = divided(range(8), 0.25)
    assert (used, held) == ([0, 1, 3, 4, 5, 7], [2, 6])
    assert divided(range(5), 0.01)[1] == [2]
    everything = range(8)
    assert divided(everything, 0.0) == (everything, ())


@pytest.mark.parametrize("count", [1, 2])
def test_something_is_left_to_calibrate_on(count):
    with pytest.raises(lobs.ArgumentError, match=r"held_back: 0\.9 of"):
        divided(range(count), 0.9)


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
@pytest.mark.parametrize("blocks", ["auto", None])
def test_nothing_is_calibrated_on_them(inputs, blocks):
    """The network is the one that the other batches give by themselves, bit for bit."""
    batches = data(8)
    models = [network(), network()]
    settings = {"sparsity": 0.5, "inputs": inputs, "blocks": blocks, "progress": False}
    report = lobs.prune(models[0], batches, held_back=0.25, **settings)
    used, _ = divided(batches, 0.25)
    lobs.prune(models[1], used, **settings)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)
    assert report.settings["batches held back"] == 2


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
@torch.no_grad()
def test_errors_on_them_are_those_of_the_outputs(inputs):
    """In float64, every layer's error is the relative distance of its outputs on these batches:
    from those that it is to return, divided by their size."""
    before = network().double()
    model = network().double()
    batches = [x.double() for x in data(6)]
    settings = {"sparsity": 0.6, "inputs": inputs, "progress": False, "exclude": ["*.down"]}
    report = lobs.prune(model, batches, held_back=0.3, **settings)
    x = torch.cat(divided(batches, 0.3)[1])
    old, new = record(before, x), record(model, x)
    for layer in report.layers:
        module, original = model.get_submodule(layer.name), before.get_submodule(layer.name)
        given = {"corrected": new, "pruned": new, "dense": old}[inputs][layer.name]
        wanted = original(old[layer.name] if inputs == "corrected" else given)
        expected = (module(given) - wanted).square().sum() / wanted.square().sum()
        assert layer.held_back_error == pytest.approx(float(expected), rel=1e-6)
    moved = (model(x) - before(x)).norm() / before(x).norm()
    assert report.error_bound.held_back == pytest.approx(float(moved), rel=1e-6)


def record(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of its linear layers."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_rows_that_are_enough_come_out_of_the_two_errors():
    """Least squares on n rows of which the truth is known: the estimate from 60 rows and from 240
    is the same number, within a factor of two, and errors there are as predicted."""
    batches = data(400)
    found = []
    for count in (12, 48):
        model = network()
        report = lobs.prune(
            model, batches[: count + 200], held_back=200 / (count + 200),
            sparsity=0.5, inputs="dense", damping=1e-4, include="0", progress=False,
        )  # fmt: skip
        (layer,) = report.layers
        assert layer.rows == 10 * count
        found.append(layer.rows_enough)
    assert 0.5 < found[0] / found[1] < 2.0
    # 6 of 12 inputs are kept, and the bias: d is about 7, and 7 / 0.05 = 140.
    assert 70 < found[1] < 280


def test_a_report_says_whether_the_rows_sufficed():
    report = lobs.prune(network(), data(4, rows=8), held_back=0.25, sparsity=0.5, progress=False)
    (check,) = [x for x in report.to_dict()["checks"] if x["name"] == "Held back"]
    assert not check["good"]
    assert "rows instead of 24" in check["said"]
    layers = [dataclasses.replace(x, held_back_error=x.relative_error) for x in report.layers]
    fine = dataclasses.replace(report, layers=tuple(layers))
    (check,) = [x for x in fine.to_dict()["checks"] if x["name"] == "Held back"]
    assert check["good"]
    assert check["said"].endswith("the rows sufficed in every layer")
