"""Times of layers by their sizes: a table that is measured once, and budgets by it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.network.shrinking import latency
from lobs_native.network.shrinking.latency import LatencyTable


@pytest.fixture
def counted(monkeypatch):
    """Times that are what a layer multiplies, and how many were taken."""
    taken = []

    def multiplications(run, device):
        out = run()
        small = run.__closure__[0].cell_contents
        taken.append(small)
        positions = out[0, 0].numel() if out.ndim > 2 else 1
        return float(small.weight.numel() * positions * len(out)) + 1000.0

    monkeypatch.setattr(latency, "least_seconds", multiplications)
    return taken


@pytest.mark.parametrize(
    ("layer", "shape", "weight", "expected"),
    [
        (nn.Linear(8, 16), (4, 8), (16, 8), 4 * 128),
        (nn.Linear(8, 16), (4, 8), (10, 3), 4 * 30),
        (nn.Conv2d(8, 4, 3, padding=1), (2, 8, 5, 5), (3, 7, 3, 3), 2 * 25 * 21 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5), (5, 1, 3, 3), 2 * 25 * 45),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), (2, 8, 5, 5), (6, 3, 2, 2), 2 * 100 * 18 * 4),
    ],
)
def test_times_are_of_layers_of_that_size(counted, layer, shape, weight, expected):
    table = LatencyTable()
    seconds = table.seconds(layer, shape, weight)
    assert seconds == pytest.approx(expected + 1000.0)
    before = len(counted)
    assert table.seconds(layer, shape, weight) == seconds
    assert len(counted) == before  # nothing is measured twice


def test_a_table_is_saved_and_loaded(counted, tmp_path):
    table, layer = LatencyTable(), nn.Linear(8, 16)
    seconds = table.seconds(layer, (4, 8), (10, 3))
    table.save(tmp_path / "times.json")
    loaded, before = LatencyTable.load(tmp_path / "times.json"), len(counted)
    assert loaded.times == table.times
    assert loaded.seconds(layer, (4, 8), (10, 3)) == seconds
    assert len(counted) == before
    assert loaded.seconds(layer, (5, 8), (10, 3)) != seconds  # another input: other times


@pytest.mark.parametrize("content", ["", "[]", '{"format": "x"}', '{"times": {}}'])
def test_another_file_is_refused(content, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match="is no table of times"):
        LatencyTable.load(path)
    assert path.read_text() == content


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3),
    ).eval()  # fmt: skip


def test_a_budget_of_time(counted, tmp_path):
    data, path = [torch.randn(16, 2, 8, 8) for _ in range(2)], tmp_path / "times.json"
    model, state = network(), torch.random.get_rng_state()
    report = lobs.shrink(model, data, latency=0.6, latency_table=path, multiple=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(json.loads(path.read_text())["times"]) == 2  # convolutions and linear layers
    after = [m.weight for m in model if hasattr(m, "weight")]
    before = [m.weight for m in network() if hasattr(m, "weight")]
    positions = [64, 64, 1, 1]

    def seconds(weights):
        each = (16 * w.numel() * n + 1000 for w, n in zip(weights, positions, strict=True))
        return sum(each)

    assert 0.5 * seconds(before) < seconds(after) <= 0.6 * seconds(before)
    assert report.multiplications[1] < report.multiplications[0]


class Named(nn.Module):
    """Its layers get their inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.first(input=x).relu())


def test_layers_whose_inputs_are_given_by_name_take_time_too(counted):
    model = Named().eval()
    lobs.shrink(model, [torch.randn(50, 6)], latency=0.8, multiple=2, progress=False)
    whole, left = (50 * (6 + 3) * units + 2000 for units in (32, model.second.in_features))
    assert 0.7 * whole < left <= 0.8 * whole


def test_times_are_of_calls():
    seconds = latency.least_seconds(lambda: sum(range(20_000)), torch.device("cpu"))
    assert 1e-6 < seconds < 1.0


def test_on_one_thread_waiting_does_not_count():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = latency.least_seconds(
            lambda: (sum(range(50_000)), time.sleep(0.01)), torch.device("cpu")
        )
    finally:
        torch.set_num_threads(threads)
    assert 1e-6 < seconds < 0.01
