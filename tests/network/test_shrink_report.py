"""What ``shrink`` says about the network before and after."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.network import peak
from lobs_native.network.shrinking import comparison
from lobs_native.network.shrinking.comparison import same_sizes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    return nn.Sequential(*layers).eval()


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 2, 7, 7, generator=generator) for _ in range(count)]


def relative(model: nn.Module, original: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        before, after = (torch.cat([m(x) for x in batches]).double() for m in (original, model))
    return float((after - before).norm() / before.norm())


def shrunk(model: nn.Module, **more: Any) -> lobs.ShrinkReport:
    return lobs.shrink(model, images(), keep=0.5, multiple=2, progress=False, **more)


def test_sizes_and_changes_are_those_of_the_networks_before_and_after():
    original = network()
    model = copy.deepcopy(original)
    report = shrunk(model, held_back=0.25)
    assert report.parameters == tuple(
        sum(p.numel() for p in m.parameters()) for m in (original, model)
    )
    saved = 4 * (4 * 2 * 9 + 4 * 4 + 6 * 4 * 9)  # the filters, normalisation, the filters that read
    assert report.bytes[0] - report.bytes[1] == saved
    # One of the four batches is held back; the outputs are fewer than 512 rows, so all are used.
    assert report.pruning.settings["batches held back"] == 1
    data = images()
    held_back = [data.pop(2)]
    assert report.change == pytest.approx(relative(model, original, data), rel=1e-5)
    assert report.held_back_change == pytest.approx(relative(model, original, held_back), rel=1e-5)
    assert report.change != pytest.approx(report.held_back_change, rel=1e-3)


def test_times_are_of_networks_of_both_sizes(monkeypatch):
    seen: list[tuple[int, ...]] = []
    real, call = comparison.interleaved, nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        seen.append(tuple(self.weight.shape))
        assert not torch.is_grad_enabled()
        assert not self.training
        return call(self, x)

    def watched(runs: Any, pairs: int) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(nn.Conv2d, "forward", forward)
            for run in runs:
                run()
        return real(runs, pairs)

    monkeypatch.setattr(comparison, "interleaved", watched)
    model = network().train()
    report = shrunk(model, pairs=3)
    assert seen == [(8, 2, 3, 3), (6, 8, 3, 3), (4, 2, 3, 3), (6, 4, 3, 3)]
    assert all(module.training for module in model.modules())
    times = report.times
    assert times is not None
    assert times.pairs == 3
    assert min(times.seconds) > 0
    assert times.interval[0] <= times.ratio <= times.interval[1]
    assert times.machine["threads"] == torch.get_num_threads()


def test_no_pairs_measure_no_times_and_the_json_is_plain():
    report = shrunk(network(), pairs=0)
    assert report.times is None
    assert report.held_back_change is None
    assert "times as fast" not in str(report)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["times"] is None
    assert told["change"] == report.change
    assert [len(layer["kept"]) for layer in told["layers"]] == [4]
    assert "masks" not in told["pruning"]


def test_the_report_to_read_has_all_that_was_measured():
    report = shrunk(network(), held_back=0.25)
    lines = str(report).splitlines()
    assert len(lines) == 4 + (report.memory is not None)
    (p, q), (m, n) = report.parameters, report.multiplications
    assert f"{p:,} -> {q:,} parameters" in lines[0]
    assert f"{m:,} -> {n:,}" in lines[1]
    assert "times as fast [" in lines[-2]
    assert "on batches held back" in lines[-1]


def wide(batch: int) -> lobs.ShrinkReport:
    """A network whose peak is two tensors of 2,048 features, which become 256."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 8))
    data = [torch.randn(batch, 32) for _ in range(2)]
    return lobs.shrink(model, data, keep=0.125, method="magnitude", pairs=0, progress=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says")
def test_memory_is_the_peak_of_a_forward_pass_of_both_networks():
    report = wide(2000)
    assert report.memory is not None
    for took, width in zip(report.memory, (2048, 256), strict=True):
        activations = 2 * 4 * 2000 * width  # bytes: before and after the nonlinearity
        assert activations < took + (1 << 19) < activations + (4 << 20)
    took, takes = (f"{x / 1e6:,.1f}" for x in report.memory)
    assert f"{took} -> {takes} MB at its peak" in str(report)


def test_memory_that_the_system_does_not_say_is_none(monkeypatch):
    def refused() -> None:
        raise OSError

    monkeypatch.setattr(peak, "forget_peak", refused)
    report = wide(4)
    assert report.memory is None
    assert "at its peak" not in str(report)
    assert report.to_dict()["memory"] is None


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is only one")


def test_a_model_that_cannot_be_copied_has_no_times():
    report = shrunk(Uncopied(*network()).eval())
    assert report.times is None
    assert any("it cannot be copied: there is only one" in note for note in report.notes)


def test_a_copy_of_the_same_sizes_has_the_same_tensors():
    model = network()
    other = same_sizes(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert other[0] is not model[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pairs": -1}, ArgumentError),
        ({"pairs": 1.5}, DtypeError),
        ({"held_back": 1.0}, ArgumentError),
        ({"held_back": 0.9}, ArgumentError),
    ],
)
def test_wrong_arguments_are_named(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        shrunk(network(), **arguments)
