"""Models whose weights are held, or whose steps are run, in unusual ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobs_native as lobs

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


SCRIPTED = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, X),
    "frozen": lambda model: torch.jit.freeze(torch.jit.script(model.eval())),
}


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_a_way_out(kind):
    model = SCRIPTED[kind](chain())
    with pytest.raises(lobs.DtypeError, match=r"model: .*TorchScript.*nn.Module from which"):
        lobs.prune(model, [X], sparsity=0.5, progress=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_left_as_they_are_and_those_with_weights_are_listed():
    scripted, activation = torch.jit.script(nn.Linear(6, 6)), torch.jit.script(nn.ReLU())
    model = nn.Sequential(scripted, activation, nn.Linear(6, 3))
    before = scripted.weight.clone()
    report = lobs.prune(model, [X], sparsity=0.5, progress=False)
    assert [layer.name for layer in report.layers] == ["2"]
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("0", "TorchScript, whose steps cannot be observed")
    ]
    assert torch.equal(scripted.weight, before)
    with lobs.keep_masks(model, report.masks):
        pass
