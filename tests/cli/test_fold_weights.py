"""``lobs-native prune --fold-weights``: layers that compute their weight in each call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.cli import commands as cli

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch
from cli.test_fold_weights import Scaled

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Scaled(6, 9), torch.nn.Linear(9, 4))
    return model, [torch.randn(30, 6) for _ in range(2)]
"""


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight / self.weight.norm(), self.bias)


def test_layers_are_folded_before_they_are_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scaled_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = "prune scaled_here:make --sparsity 0.5 --method sweep --fold-weights --out"
    assert cli.main([*line.split(), str(tmp_path / "out")]) == cli.OK
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["folded weights"] == ["0"]
    assert [layer["name"] for layer in report["layers"]] == ["0", "1"]
    model, batches = sys.modules.pop("scaled_here").make()
    assert lobs.fold_weights(model) == ["0"]
    lobs.prune(model, batches, sparsity=0.5, method="sweep", progress=False)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_folder_cannot_be_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    line = ["prune", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--sparsity", "0.5"]
    assert cli.main([*line, "--fold-weights"]) == cli.USAGE
    assert "--fold-weights: " in capsys.readouterr().err
