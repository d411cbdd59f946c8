"""Experts that see few rows are not sacrificed to the others."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.experts import Experts
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.solvers.problem import nearest_count

PARTS = ("gate_up_proj", "down_proj")


def inputs(counts: list[int]) -> tuple[Tensor, Tensor]:
    """Correlated rows (N, 6), and the expert of each."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(6, 6, generator=generator) @ torch.diag(torch.logspace(0, -1.5, 6))
    chosen = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None]
    return (torch.randn(len(chosen), 6, generator=generator) @ mix.T).double(), chosen


def zeros(model: Experts, part: str) -> list[int]:
    return [int((w == 0).sum()) for w in getattr(model, part)]


@pytest.mark.parametrize("few", [0, 1, 3, 20])
@pytest.mark.parametrize("method", ["exact", "admm", "lobs", "wanda", "sweep"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_a_rare_expert_loses_its_share_and_no_more_than_by_magnitude(scope, few, method):
    dense, (x, chosen) = Experts(False), inputs([few, 90, 90, 90])
    model = copy.deepcopy(dense)
    report = lobs.prune(
        model, [(x, chosen)], sparsity=0.5, method=method, scope=scope, progress=False
    )
    by_size = copy.deepcopy(dense)
    for part in PARTS:
        assert zeros(model, part)[0] == getattr(model, part)[0].numel() // 2
        with torch.no_grad():
            w = getattr(by_size, part)[0]
            of_rows = w if scope == "row" else w.view(1, -1)
            smallest = of_rows.abs().argsort(1)[:, : of_rows.shape[1] // 2]
            of_rows.scatter_(1, smallest, 0)
    test = inputs([800, 0, 0, 0])[0][400:]  # after the rows pruned on
    first = dense.gate_up_proj[0]
    errors = [
        float((test @ (m.gate_up_proj[0] - first).T).detach().square().sum())
        for m in (model, by_size)
    ]
    assert errors[0] <= errors[1] * 1.0001
    assert any("fewer than 48 rows (8 for each input)" in n for n in report.layers[0].notes)


@pytest.mark.parametrize("method", ["exact", "admm", "sweep"])
def test_a_rare_expert_with_uncorrelated_inputs_loses_what_magnitude_loses(method):
    dense, generator = Experts(False), torch.Generator().manual_seed(2)
    x = torch.randn(220, 6, generator=generator).double()
    chosen = torch.repeat_interleave(torch.arange(4), torch.tensor([40, 60, 60, 60]))[:, None]
    model = copy.deepcopy(dense)
    lobs.prune(model, [(x, chosen)], sparsity=0.5, method=method, progress=False)
    before, now = dense.gate_up_proj[0].detach(), model.gate_up_proj[0].detach()
    smallest = before.abs().flatten().sort().values[: before.numel() // 2]
    assert float((now - before).square().sum()) <= 1.02 * float(smallest.square().sum())


def test_the_report_has_rows_zeros_and_error_of_every_expert():
    model, (x, chosen) = Experts(True), inputs([5, 0, 90, 70])
    before = copy.deepcopy(model)
    report = lobs.prune(model, [(x, chosen)], sparsity=0.4, inputs="dense", progress=False)
    for layer, part in zip(report.layers, PARTS, strict=True):
        assert layer.expert_rows == (5, 0, 90, 70)
        each = getattr(model, part)[0].numel()
        assert [round(s * each) for s in layer.expert_sparsity] == zeros(model, part)
        assert zeros(model, part)[:2] == [nearest_count(0.4, each)] * 2
        assert sum(zeros(model, part)) == nearest_count(0.4, 4 * each)
        assert sum(layer.expert_error) == pytest.approx(layer.error)
    rows = x[chosen[:, 0] == 2]
    change = before.product(rows, PARTS[0], torch.tensor(2))
    change = change - model.product(rows, PARTS[0], torch.tensor(2))
    error = float(change.detach().square().sum()) / 90
    assert report.layers[0].expert_error[2] == pytest.approx(error)


def test_with_enough_rows_experts_are_compared_by_their_own_second_moments():
    model, (x, chosen) = Experts(False), inputs([48, 48, 200, 60])
    x[chosen[:, 0] == 1] *= 4  # an expert whose weights matter more
    report = lobs.prune(model, [(x, chosen)], sparsity=0.5, progress=False)
    assert zeros(model, PARTS[0])[1] < zeros(model, PARTS[0])[0]
    assert not any("mixed with the identity" in n for n in report.layers[0].notes)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "scope": "row"},
        {"pattern": "2:4"},
        {"pattern": "1x2", "sparsity": 0.5},
        {"threshold": 0.1, "method": "lobs"},
        {"max_error": 1.0},
        {"sparsity": 0.5, "scope": "model", "sensitivity": None},
    ],
)
def test_rare_experts_are_pruned_to_every_target(options):
    model, (x, chosen) = Experts(False), inputs([3, 60, 0, 60])
    if options.get("pattern") == "2:4":
        options = {**options, "include": "down_proj"}  # six inputs are not groups of four
    report = lobs.prune(model, [(x, chosen)], progress=False, **options)
    for layer in report.layers:
        removed = int((~report.masks[layer.name]).sum())
        assert removed == sum(zeros(model, layer.name))
        assert layer.sparsity == removed / report.masks[layer.name].numel()
        if "max_error" in options:
            assert layer.error <= 1.0


def spelled(form: str, x: Tensor, w: Tensor, b: Tensor, e: int) -> Tensor:
    if form == "linear":
        return functional.linear(x, w[e], b[e])
    if form == "addmm":
        return torch.addmm(b[e], x, w[e].T)
    if form == "shared by all":
        return functional.linear(x, w[e], b[0])
    return torch.baddbmm(b[:, None], x.expand(len(w), -1, -1), w.mT)[e]


@pytest.mark.parametrize("form", ["linear", "addmm", "baddbmm", "shared by all"])
def test_biases_of_experts_belong_to_their_weights_where_each_has_its_own(form):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.w = nn.Parameter(torch.randn(3, 5, 6, generator=generator).double())
            self.shift = nn.Parameter(torch.randn(3, 5, generator=generator).double())

        def forward(self, x: Tensor) -> Tensor:
            parts = x.split(len(x) // 3)
            outs = [spelled(form, part, self.w, self.shift, e) for e, part in enumerate(parts)]
            return torch.cat(outs)

    model = Own()
    before, x = copy.deepcopy(model), inputs([50, 50, 50, 0])[0] + 1
    report = lobs.prune(model, [x], sparsity=0.5, scope="row", progress=False)
    assert [layer.name for layer in report.layers] == ["w"]
    if form == "shared by all":
        assert torch.equal(model.shift, before.shift)
        assert [(s.name, s.on_purpose) for s in report.skipped] == [("shift", True)]
        assert "a bias" in report.skipped[0].reason
        return
    assert report.skipped == ()
    assert report.coverage.total == model.w.numel()
    for e, part in enumerate(x.split(50)):
        seen = x if form == "baddbmm" else part  # which multiplies all rows by all experts
        H = lobs.Hessian(6, bias=True).update(seen)
        out = lobs.prune_weight(
            before.w[e].detach(), H, sparsity=0.5, scope="row", bias=before.shift[e].detach()
        )
        assert torch.allclose(model.w[e], out.weight, atol=1e-9)
        assert torch.allclose(model.shift[e], out.bias, atol=1e-9)
