"""Settings of single layers, and warnings, of ``lobs-native prune``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lobs_native as lobs
from lobs_native.cli import commands as cli

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch
from torch import nn

batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]

def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), batches

class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.product, self.last = nn.Bilinear(6, 6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.product(x, x))

def bilinear():
    return Bilinear(), batches
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overridden_here.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("overridden_here", None)


def test_overrides_are_those_of_python(here):
    space: dict = {}
    exec(MODULE, space)
    model: nn.Module
    model, batches = space["pair"]()
    first = {"sparsity": 0.25, "method": "wanda", "prune_bias": True}
    overrides = {"2": {"refine": None}, "0": first}
    lobs.prune(model, batches, sparsity=0.5, overrides=overrides, progress=False)
    options = ["--override", "0:sparsity=0.4", "--override", "2:refine=none"]
    options += ["--override", "0:sparsity=0.25,method=wanda,prune-bias=true"]
    command = ["prune", "overridden_here:pair", "--sparsity", "0.5", "--out", "out", *options]
    assert cli.main(command) == cli.OK
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["settings"]["overrides"] == overrides
    written = load_file(here / "out" / "model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("default:lobs_native")
def test_a_plan_warns_about_what_would_be_left_out(here, capsys):
    command = ["prune", "overridden_here:bilinear", "--sparsity", "0.5", "--plan"]
    assert cli.main(command) == cli.OK
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lobs-native: warning: 180 of 200 weights (90 %) that were to be pruned")
