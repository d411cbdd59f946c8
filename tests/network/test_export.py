"""Networks in other formats: weights are found by value, and every zero is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.network.inference import export as exporting
from lobs_native.network.inference.export import REFUSED, Stored, export, found_weight

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 7, bias=False)
        self.full = nn.Linear(7, 7)
        for layer in (self.first, self.last):
            with torch.no_grad():
                layer.weight.masked_fill_(torch.rand(layer.weight.shape) < 0.7, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.full(self.last(self.first(x).relu()))


def weight() -> Any:
    values = np.random.default_rng(0).normal(size=(5, 9))
    values[values < 0.3] = 0
    return values


def rounded(values: Any) -> Stored:
    scale = np.abs(values).max() / 127
    return Stored(np.round(values / scale) * scale, 0.51 * scale)


def test_a_weight_is_found_by_its_values():
    wanted = weight()
    zeros = int((wanted == 0).sum())
    other = Stored(wanted[::-1].copy())
    for stored, transposed in (
        (Stored(wanted), False),
        (Stored(wanted.T.copy()), True),
        (rounded(wanted), False),
        (rounded(wanted.T), True),
    ):
        found = found_weight("fc", wanted, {"other": other, "val_3": stored})
        assert (found.tensor, found.transposed) == ("val_3", transposed)
        assert found.zeros == found.kept == zeros
    with pytest.raises(CheckpointError, match=r"fc: its weight \(5, 9\) is in no tensor"):
        found_weight("fc", wanted, {"other": other})


def test_a_lost_zero_is_an_error():
    wanted = weight()
    lossy = rounded(wanted)
    row, column = np.argwhere(wanted == 0)[3]
    lossy.values[row, column] = lossy.within / 2
    with pytest.raises(CheckpointError, match=r"fc: 1 of its \d+ zeros are not zero in 'w'"):
        found_weight("fc", wanted, {"w": lossy})


@pytest.mark.parametrize("name", REFUSED)
def test_what_loses_zeros_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ArgumentError, match=f"quantize: {name.upper()} is refused: .*%"):
        export(Network(), torch.ones(1, 12), tmp_path, quantize=name.upper())
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    given = (Network(), torch.ones(1, 12), tmp_path)
    for how, words in (
        ({"to": "mnn"}, "to: 'mnn'"),
        ({"quantize": "int3"}, "quantize: 'int3'"),
        ({"to": "openvino", "quantize": "int8"}, "is for 'onnx'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            export(*given, **how)
    monkeypatch.setitem(exporting._NEEDS, "onnx", ("a_module_that_is_not_there",))
    with pytest.raises(LobsError, match="pip install a_module_that_is_not_there"):
        export(*given)
    assert not list(tmp_path.iterdir())


def test_every_layer_with_zeros_gets_a_row(tmp_path, monkeypatch):
    model = Network()

    def written(subject: Any) -> tuple[Path, dict[str, Stored]]:
        (subject.folder / "model.bin").write_bytes(b"12345")
        return subject.folder / "model.bin", {
            "a": Stored(model.first.weight.detach().numpy().T),
            "b": Stored(model.last.weight.detach().numpy()),
        }

    monkeypatch.setitem(exporting._WRITERS, "onnx", written)
    monkeypatch.setitem(exporting._NEEDS, "onnx", ())
    report = export(model, torch.ones(1, 12), tmp_path)
    assert [(w.layer, w.tensor, w.transposed) for w in report.weights] == [
        ("first", "a", True),
        ("last", "b", False),
    ]
    assert report.weights[0].kept == int((model.first.weight == 0).sum())
    assert (report.file, report.bytes) == ("model.bin", 5)
    assert report.to_dict()["weights"][1]["layer"] == "last"

    def broken(*_: Any) -> Any:
        raise RuntimeError("no rule for this node\nand a trace")

    monkeypatch.setitem(exporting._WRITERS, "onnx", broken)
    with pytest.raises(CheckpointError, match=r"could not be converted: no rule for this node$"):
        export(model, torch.ones(1, 12), tmp_path)


@pytest.mark.parametrize(
    ("to", "quantize", "needed"),
    [("onnx", None, []), ("onnx", "int8", ["onnxruntime"]), ("openvino", None, ["openvino"])],
)
def test_the_converters_keep_every_zero(tmp_path, to, quantize, needed):
    for module in ("onnx", "onnxscript", *needed):
        pytest.importorskip(module)
    report = export(Network(), torch.ones(2, 3, 12), tmp_path, to=to, quantize=quantize)
    assert [w.layer for w in report.weights] == ["first", "last"]
    assert all(w.kept == w.zeros > 50 for w in report.weights)
    assert (tmp_path / report.file).is_file()
