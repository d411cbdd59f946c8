"""What of a network is pruned: what cannot be is left out and named, and nothing goes
uncounted."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from helpers.own_weights import Net, prune, rows, sequences
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.errors import ArgumentError, PatternError
from lobs_native.report.html import report_page

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- routers and adapters ------------------------------------------------------------------------


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.experts, self.gate = experts, gate

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x)
        chosen = chosen[0] if isinstance(chosen, tuple) else chosen
        out = torch.stack([expert(x) for expert in self.experts], -1)
        return (out * torch.softmax(chosen, -1)[..., None, :]).sum(-1)


class LinearRouter(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return torch.sigmoid(scores), scores


class OwnRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


@pytest.mark.parametrize("gate", [nn.Linear(16, 3), LinearRouter(16, 3), OwnRouter()])
def test_routers_are_left_alone_unless_include_names_them(gate):
    experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))
    net = Net(lambda m, x: m.moe(x), moe=Mixture(experts, gate))
    report = prune(net, rows())
    assert [(x.name, x.on_purpose) for x in report.skipped] == [("moe.gate", True)]
    assert "router" in report.skipped[0].reason
    assert {x.name for x in prune(net, rows(), include="moe*").skipped} == {"moe.gate", "last"}
    assert [x.name for x in prune(net, rows(), include="*.gate").layers] == ["moe.gate"]


def test_a_gate_that_chooses_no_experts_is_pruned():
    net = Net(lambda m, x: m.gate(x) * x[..., :8], gate=nn.Linear(16, 8))
    assert len(prune(net, rows()).layers) == 2


class Adapted(nn.Module):
    """As peft wraps a layer."""

    adapter_layer_names = ("lora_A", "lora_B", "own_part")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.own_part = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        change = self.lora_B["default"](self.lora_A["default"](x)) + self.own_part(x)
        return self.base_layer(x) + change


def test_adapters_are_never_pruned_and_the_weight_under_them_is():
    net = Net(lambda m, x: m.q(x), q=Adapted())
    report = prune(net, rows())
    assert [x.name for x in report.layers] == ["q.base_layer", "last"]
    names = {"q.lora_A.default", "q.lora_B.default", "q.own_part"}
    assert {x.name for x in report.skipped} == names
    assert all("merge it first" in x.reason and x.on_purpose for x in report.skipped)
    assert any("merging that would fill the zeros" in note for note in report.layers[0].notes)
    assert not any("merging" in note for note in report.layers[1].notes)


# ---- one layer never refuses a network -----------------------------------------------------------


def odd() -> nn.Sequential:
    """A network with a layer of 30 inputs, which no 2:4 pattern fits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 8), nn.Linear(8, 4)).double()


def test_a_layer_that_the_pattern_does_not_fit_is_left_out_with_one_warning():
    with pytest.warns(UserWarning, match="lobs_native") as caught:
        report = lobs.prune(odd(), rows(), pattern="2:4", progress=False)
    assert [x.name for x in report.layers] == ["0", "3"]
    (warning,) = [w for w in caught if "lobs_native" in str(w.message)]
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("lobs_native.prune: 240 of 752 weights (32 %) that were to be pruned")
    assert "240 in 2: pattern: '2:4' does not divide rows of 30" in text
    with pytest.warns(UserWarning, match="lobs_native.plan_prune: 240 of 752 weights") as caught:
        lobs.plan_prune(odd(), rows(), pattern="2:4")
    assert caught[0].filename == __file__
    for options in ({"strict": True}, {"include": ["0", "2"]}):
        with pytest.raises(PatternError, match="layer '2': pattern: '2:4'"):
            lobs.prune(odd(), rows(), pattern="2:4", progress=False, **options)
    report = prune(odd(), rows(), pattern="2:4", sparsity=None, include=["0", "?*"])
    assert [x.name for x in report.layers] == ["0", "3"]


def test_few_weights_that_are_left_out_come_without_a_warning():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8).double(), nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lobs.prune(Unused(), rows(), sparsity=0.5, progress=False)
    assert [(x.name, x.on_purpose) for x in report.skipped] == [("b", False)]
    assert report.coverage.missed == 2 / 130


def test_exclude_takes_names_of_whatever_is_left_out_and_silences_the_warning():
    net = Net(lambda m, x: m.w(x, x), w=nn.Bilinear(16, 16, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lobs.prune(net, rows(), sparsity=0.5, exclude="w", strict=True, progress=False)
    assert [(x.name, x.reason, x.on_purpose) for x in report.skipped] == [("w", "excluded", True)]
    with pytest.raises(ArgumentError, match=r"layer 'w': it is used by aten::_trilinear"):
        lobs.prune(net, rows(), sparsity=0.5, include="w", progress=False)
    net = Net(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(16, 8, batch_first=True))
    report = prune(net, sequences(), exclude="rnn")
    assert [x.name for x in report.layers] == ["last"]


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
def test_a_layer_that_is_called_without_rows_is_left_out_and_named(inputs):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        some = m.sometimes(x[x[:, 0] > 3])
        return m.always(x) + m.never(x[:0]).sum() + some.sum(0)

    layers = {name: nn.Linear(16, 8) for name in ("always", "sometimes", "never")}
    data = [rows(1)[0].clamp(-2, 2) for _ in range(3)]
    data[2][:5, 0] = 4.0  # only this batch reaches one of them
    report = prune(Net(forward, **layers), data, inputs=inputs)
    assert {x.name for x in report.layers} == {"always", "sometimes", "last"}
    (skipped,) = report.skipped
    assert (skipped.name, skipped.on_purpose) == ("never", False)
    assert "never called on the calibration data" in skipped.reason


@pytest.mark.parametrize("options", [{}, {"run_dir": "run"}, {"exclude": "later"}])
def test_a_layer_without_values_is_left_out_and_named(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = Net(lambda m, x: m.a(x), a=nn.Linear(16, 8))
    net.later = nn.Linear(16, 8, device="meta")
    report = prune(net, rows(), **options)
    assert [x.name for x in report.layers] == ["a", "last"]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.weights) == ("later", 128)
    assert skipped.on_purpose == ("exclude" in options)
    assert "meta device" in skipped.reason or "exclude" in options


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_part_is_left_out_and_named():
    net = nn.Sequential(torch.jit.script(nn.Linear(16, 8)), nn.Linear(8, 4)).double()
    report = prune(net, rows())
    assert [x.name for x in report.layers] == ["1"]
    assert "TorchScript" in report.skipped[0].reason


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_counts_all_weights_of_the_network(tmp_path):
    net = Net(lambda m, x: m.w(x, x) + m.a(x), w=nn.Bilinear(16, 16, 8), a=nn.Linear(16, 8))
    net.table = nn.Embedding(10, 8)
    report = prune(net, rows())
    coverage = report.coverage
    assert (coverage.pruned, coverage.on_purpose, coverage.not_understood) == (160, 80, 2048)
    assert coverage.sparsity == 80 / 2288
    assert report.sparsity == 0.5
    saved = json.loads(report.save(tmp_path / "report.json").read_text())
    assert saved["coverage"] == {
        "pruned": 160, "on_purpose": 80, "not_understood": 2048, "removed": 80,
        "total": 2288, "sparsity": 80 / 2288, "missed": 2048 / 2208,
    }  # fmt: skip
    assert {(x["name"], x["weights"], x["on_purpose"]) for x in saved["skipped"]} == {
        ("table", 80, True),
        ("w", 2048, False),
    }
    (check,) = [x for x in saved["checks"] if x["name"] == "Layers"]
    assert not check["good"]
    assert check["said"] == (
        "2 are pruned; 1 could not be, see below; 1 left alone on purpose, see below; 7.25 % of "
        "the weights that were to be pruned"
    )
    text = " ".join(re.sub(r"<[^>]*>", " ", report_page(report)).split())
    assert "50.00 % sparsity of the pruned layers; 3.50 % of the whole network" in text
    assert "not understood, or impossible to prune 2,048 89.51 %" in text
