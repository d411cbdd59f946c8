"""Models whose weights are held, or whose steps are run, in unusual ways."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.errors import DtypeError

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
    with pytest.warns(UserWarning, match="36 of 54 weights .* in 0: it belongs to a TorchScript"):
        report = lobs.prune(model, [X], sparsity=0.5, progress=False)
    assert [layer.name for layer in report.layers] == ["2"]
    assert [s.name for s in report.skipped] == ["0"]
    assert torch.equal(scripted.weight, before)
    with lobs.keep_masks(model, report.masks):
        pass


# ---- how weights are held ------------------------------------------------------------------------


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.MultiheadAttention(6, 2, batch_first=True)
        self.b = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x, x, x, need_weights=False)[0])


MODES = {"made": (True, False), "pruned": (False, True), "made and pruned": (True, True)}


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("kind", [chain, Attending])
def test_inference_mode_makes_no_difference(modes, inputs, kind):
    data = [X[None], X[None] + 1]
    usual = kind()
    lobs.prune(usual, data, sparsity=0.5, inputs=inputs, progress=False)
    made, pruned = MODES[modes]
    with torch.inference_mode(made):
        model = kind()
    with torch.inference_mode(pruned):
        lobs.prune(model, data, sparsity=0.5, inputs=inputs, progress=False)
    assert same(bits(model), bits(usual))


def failing(after: int) -> Any:
    calls = 0

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise RuntimeError("no more")
        return model(x)

    return forward


def transposed(w: torch.Tensor) -> torch.Tensor:
    return w.T.contiguous().T


def stepped(w: torch.Tensor) -> torch.Tensor:
    return torch.stack([w, w], 2)[:, :, 0]


@pytest.mark.parametrize("held", [transposed, stepped, "in inference mode"])
@pytest.mark.parametrize("inputs", ["corrected", "pruned"])
def test_a_failure_is_undone_however_weights_are_held(held, inputs):
    scope = torch.inference_mode() if held == "in inference mode" else contextlib.nullcontext()
    with scope:
        model = chain()
        if callable(held):
            model[0].weight = nn.Parameter(held(model[0].weight.detach()))
    before, changed = bits(model), []

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        changed.append(not same(before, bits(model)))
        return run(model, x)

    run = failing(after=7 if inputs == "corrected" else 3)
    with pytest.raises(RuntimeError, match="no more"):
        lobs.prune(model, [X], sparsity=0.5, inputs=inputs, forward=forward, progress=False)
    assert any(changed)
    assert same(bits(model), before)


SHARED_MEMORY = {
    "expanded rows": ("weight", lambda w: w[:1].expand_as(w)),
    "expanded columns": ("weight", lambda w: w[:, :1].expand_as(w)),
    "overlapping rows": ("weight", lambda w: w.reshape(-1).as_strided((5, 6), (3, 1))),
    "expanded bias": ("bias", lambda b: b[:1].expand_as(b)),
}


@pytest.mark.parametrize("kind", SHARED_MEMORY)
def test_weights_whose_elements_share_memory_are_refused_with_a_way_out_that_works(kind):
    part, held = SHARED_MEMORY[kind]
    model = chain()
    setattr(model[0], part, nn.Parameter(held(getattr(model[0], part).detach())))
    before = bits(model)
    with pytest.raises(lobs.ShapeError, match=rf"0.{part}: several of its elements.*contiguous"):
        lobs.prune(model, [X], sparsity=0.5, strict=True, progress=False)
    assert same(bits(model), before)
    own = nn.Parameter(getattr(model[0], part).detach().contiguous())
    setattr(model[0], part, own)
    lobs.prune(model, [X], sparsity=0.5, progress=False)


@pytest.mark.parametrize("where", ["made", "statistics"])
def test_sensitivities_of_a_model_made_in_inference_mode_are_refused(where):
    with torch.inference_mode(where == "made"):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    if where == "statistics":
        with torch.inference_mode():
            model[1].running_var = torch.ones(5)
    before = bits(model)
    with pytest.raises(lobs.ArgumentError, match=r"inference_mode.*pass sensitivity=None"):
        lobs.prune(model, [X], sparsity=0.5, scope="model", progress=False)
    assert same(bits(model), before)
    lobs.prune(model, [X], sparsity=0.5, scope="model", sensitivity=None, progress=False)


def test_a_network_that_needs_values_on_the_meta_device_is_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, device="meta"))
    before = model[0].weight.detach().clone()
    with pytest.raises(DtypeError, match=r"model: 1\.weight, 1\.bias on the meta device.*load or"):
        lobs.prune(model, [torch.randn(40, 16)], sparsity=0.5, progress=False)
    assert torch.equal(model[0].weight, before)
