"""Networks in other formats: weights are found by value, and every zero is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.network.inference import export as exporting
from lobs_native.network.inference import formats
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
        ({"to": "gguf"}, "to: 'gguf'"),
        ({"quantize": "int3"}, "quantize: 'int3'"),
        ({"to": "openvino", "quantize": "int8"}, "is for onnx, mnn, coreml, not for 'openvino'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            export(*given, **how)
    monkeypatch.setitem(exporting.NEEDS, "onnx", ("a_module_that_is_not_there",))
    with pytest.raises(LobsError, match="pip install a_module_that_is_not_there"):
        export(*given)
    assert not list(tmp_path.iterdir())


def test_every_layer_with_zeros_gets_a_row(tmp_path, monkeypatch):
    model = Network()

    def written(subject: Any, _: Any) -> tuple[Path, dict[str, Stored]]:
        (subject.folder / "model.bin").write_bytes(b"12345")
        return subject.folder / "model.bin", {
            "a": Stored(model.first.weight.detach().numpy().T),
            "b": Stored(model.last.weight.detach().numpy()),
        }

    monkeypatch.setitem(exporting.WRITERS, ("onnx", None), written)
    monkeypatch.setitem(exporting.NEEDS, "onnx", ())
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

    monkeypatch.setitem(exporting.WRITERS, ("onnx", None), broken)
    with pytest.raises(CheckpointError, match=r"could not be converted: no rule for this node$"):
        export(model, torch.ones(1, 12), tmp_path)


@pytest.mark.parametrize(("to", "quantize"), formats.WRITERS)
def test_the_converters_keep_every_zero(tmp_path, to, quantize):
    for module in (*formats.NEEDS[to], *formats.NEEDS.get(f"{to}, {quantize}", ())):
        pytest.importorskip(module)
    report = export(Network(), torch.ones(2, 3, 12), tmp_path, to=to, quantize=quantize)
    assert [w.layer for w in report.weights] == ["first", "last"]
    assert all(w.kept == w.zeros > 50 for w in report.weights)
    assert (tmp_path / report.file).exists()
    assert report.bytes > 0


# ---- reading what converters wrote ---------------------------------------------------------------


def test_compressed_rows_are_exact_and_only_where_they_are_smaller(tmp_path):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Conv1d(20, 4, 1)).bfloat16()
    model[1].weight = nn.Parameter(model[1].weight.clone())
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(30, 40) < 0.9, 0)
        model[1].weight.masked_fill_(torch.rand(20, 30) < 0.4, 0)
        model[2].weight[0] = 0

    def never(_: Any) -> Any:
        raise AssertionError("this format needs no run of the network")

    model.register_forward_pre_hook(never)
    report = export(model, torch.ones(1, 40), tmp_path, to="torch-csr")
    assert [(w.layer, w.tensor) for w in report.weights] == [(n, f"{n}.weight") for n in "012"]
    with safe_open(tmp_path / report.file, "pt") as file:
        keys = set(file.keys())
    pieces = {f"0.weight.{piece}" for piece in ("crow", "col", "values", "size")}
    assert keys == {*pieces, "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    read = dict(formats._dense_of_csr(tmp_path / report.file))
    state = model.state_dict()
    assert set(read) == set(state)
    assert all(torch.equal(torch.from_numpy(read[n]), state[n].float()) for n in state)


def test_sparse_weights_of_an_mnn_file_are_read_from_both_their_pieces():
    wanted = weight().astype(np.float32)
    dense = np.ones((3, 4), np.float32)
    places = np.flatnonzero(wanted).astype(np.uint32)
    kept = wanted.reshape(-1)[places]
    content = b"xyz" + places.tobytes() + b"ab" + kept.tobytes() + b"c" + dense.tobytes()
    found = dict(formats._floats_of_mnn(content, {"a": wanted, "b": dense}))
    assert [each.values.tolist() for each in found.values()] == [wanted.tolist(), dense.tolist()]
    places[2] += 1  # a zero has become a number
    moved = content.replace(content[3 : 3 + places.nbytes], places.tobytes())
    assert dict(formats._floats_of_mnn(moved, {"a": wanted})) == {}


def test_bytes_of_an_mnn_file_stand_for_symmetric_steps():
    wanted = weight()
    wanted[:, 0] += 1
    steps = np.abs(wanted).max(axis=1, keepdims=True) / 127
    stored = np.rint(wanted / steps).astype(np.int8)
    levels = np.arange(-128, 128, dtype=np.int8).tobytes()
    head = b"\x02" + np.array([5, 9], np.uint16).tobytes() + b"\0" + levels

    def content(values: Any) -> bytes:
        other = head + (values[::-1].astype(np.int16) + 128).astype(np.uint8).tobytes()
        return other + head + (values.astype(np.int16) + 128).astype(np.uint8).tobytes()

    ((_, found),) = formats._bytes_of_mnn(content(stored), {"fc": wanted})
    assert np.array_equal(found.values, stored * steps)
    assert found_weight("fc", wanted, {"w": found}).kept == int((wanted == 0).sum())
    stored[tuple(np.argwhere(wanted == 0)[0])] = 1
    assert not [*formats._bytes_of_mnn(content(stored), {"fc": wanted})]


def test_numbers_that_were_rounded_to_float16_are_found():
    wanted = weight()
    assert found_weight("fc", wanted, {"w": formats._rounded(wanted.astype(np.float16))}).kept
    tiny = wanted * 1e-6
    assert found_weight("fc", tiny, {"w": formats._rounded(tiny.astype(np.float16))}).kept
    with pytest.raises(CheckpointError, match="is in no tensor"):
        found_weight("fc", wanted * 1.01, {"w": formats._rounded(wanted.astype(np.float16))})
