"""``lobs-native export``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import signal

import pytest

from lobs_native.cli import commands as cli
from lobs_native.network.inference import export as exporting
from lobs_native.network.inference.export import Stored

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch

def pair():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[:, :3] = 0
    return model, [torch.ones(2, 6)]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A converter that writes one file, and turns weights around."""
    (tmp_path / "networks_to_export.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(exporting.NEEDS, "onnx", ())

    def written(subject, _):
        (subject.folder / "model.onnx").write_bytes(b"onnx")
        values = subject.model[0].weight.detach().numpy().T.copy()
        return subject.folder / "model.onnx", {"val_0": Stored(values)}

    monkeypatch.setitem(exporting.WRITERS, ("onnx", None), written)


def test_it_writes_a_folder_and_counts(capsys, tmp_path):
    assert cli.main(["export", "networks_to_export:pair", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "val_0 (transposed)" in out
    assert "all 12 zeros kept" in out
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"onnx"
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    again = ["export", "networks_to_export:pair", "--out", "out"]
    assert cli.main(again) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert cli.main([*again, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_the_folder_of_the_network_is_not_replaced(capsys, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "report.json").write_text("{}")  # as prune leaves it
    for out in ("model", "model/onnx"):
        assert cli.main(["export", "model", "--out", out, "--overwrite"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("lobs-native: --out: ")
        assert "must lie apart" in err
    assert [path.name for path in model.iterdir()] == ["report.json"]


def test_a_run_that_is_ended_leaves_nothing(tmp_path, monkeypatch):
    def ended(subject, _):
        (subject.folder / "model.onnx").write_bytes(b"onnx")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(exporting.WRITERS, ("onnx", None), ended)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", "networks_to_export:pair", "--out", "out"]) == cli.TERMINATED
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_nothing_is_written_where_zeros_are_lost(capsys, tmp_path, monkeypatch):
    arguments = ["export", "networks_to_export:pair", "--out", "out"]
    assert cli.main([*arguments, "--quantize", "gptq"]) == 2
    assert "--quantize: gptq is refused" in capsys.readouterr().err

    def lossy(subject, _):
        (subject.folder / "model.onnx").write_bytes(b"onnx")
        values = subject.model[0].weight.detach().numpy() + 1e-6
        return subject.folder / "model.onnx", {"w": Stored(values, 1e-5)}

    monkeypatch.setitem(exporting.WRITERS, ("onnx", None), lossy)
    assert cli.main(arguments) == 1
    assert "12 of its 12 zeros are not zero" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
