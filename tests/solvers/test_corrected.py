"""Inputs "corrected": layers on the pruned network's inputs are fitted to the original network's
outputs, and to its sums at residual connections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.cases import features
from helpers.corrected import chain, convolutions, pruned, rows
from helpers.experts import Experts, routed
from helpers.hf_folders import network
from helpers.stacks import Model, made
from helpers.stacks import batches as block_batches
from helpers.tolerances import distance
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.sums import Sums
from lobs_native.solvers import drift

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def whole_corrections(monkeypatch):
    """Rows tell enough, however few they are."""
    monkeypatch.setattr(drift, "_ALIKE", 0.0)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@pytest.mark.parametrize("make", [chain, convolutions])
@pytest.mark.parametrize("method", ["exact", "wanda"])
def test_errors_are_the_distance_from_the_original_network_s_outputs(make, method):
    model = make()
    original = copy.deepcopy(model)
    data = rows(model)
    report = pruned(model, data, method=method)
    x = x0 = torch.cat(data)
    for layer in report.layers:
        i = int(layer.name)
        with torch.no_grad():
            now, wanted = model[: i + 1](x), original[: i + 1](x0)
            without = original[i](model[:i](x))
        count = now.numel() / now.shape[1]
        assert layer.error == pytest.approx(float((now - wanted).square().sum()) / count, rel=1e-9)
        assert layer.inherited == pytest.approx(
            float((without - wanted).square().sum()) / count, rel=1e-9, abs=1e-18
        )
        assert layer.relative_error == pytest.approx(
            float((now - wanted).square().sum() / wanted.square().sum()), rel=1e-9
        )
        assert int((model[i].weight == 0).sum()) == round(0.6 * model[i].weight.numel())
    assert report.layers[0].inherited == 0.0


def test_the_first_layer_is_pruned_as_usual_and_the_network_is_closer_to_the_original():
    results = {}
    for inputs in ("pruned", "corrected"):
        model = chain()
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        results[inputs] = (pruned(model, rows(model), inputs=inputs), model)
    first = [model[0].weight for _, model in results.values()]
    assert torch.equal(*first)
    bound = {name: report.error_bound for name, (report, _) in results.items()}
    assert bound["corrected"].measured < 0.9 * bound["pruned"].measured


def test_the_bound_of_a_chain_is_the_measured_error_of_its_last_layer():
    model = chain()
    report = pruned(model, rows(model))
    bound = report.error_bound
    assert bound.covered
    assert bound.spectral == pytest.approx(bound.measured, rel=1e-9)
    model = chain()
    bound = pruned(model, rows(model), exclude="4").error_bound
    assert bound.measured < bound.spectral <= bound.frobenius


class Residual(nn.Module):
    """x + second(relu(first(x))), then another layer; ``how``: the way the sum is computed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.first = nn.Linear(20, 12).double(), nn.Linear(12, 30).double()
        self.second, self.after = nn.Linear(30, 12).double(), nn.Linear(12, 5).double()
        self.dropout = nn.Dropout(0.5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        y = self.dropout(self.second(torch.relu(self.first(x))))
        if self.how == "plus":
            z = x + y
        elif self.how == "in place":
            z = x
            z += y
        elif self.how == "other side":
            z = torch.add(y, x)
        elif self.how == "scaled":
            z = torch.add(x, y, alpha=0.5)
        elif self.how == "used twice":
            z = x + y
            z = z + 0.1 * y
        elif self.how == "broadcast":
            z = y + x[:1]
        else:
            z = y
        return self.after(z)


@pytest.mark.usefixtures("whole_corrections")
@pytest.mark.parametrize("how", ["plus", "in place", "other side"])
def test_where_an_output_is_added_to_another_the_sum_is_fitted(how):
    model = Residual(how)
    original = copy.deepcopy(model)
    data = [features(40, 20, seed=i) for i in range(4)]
    report = pruned(model, data, damping=0.02)
    x = torch.cat(data)
    with torch.no_grad():
        a, a0 = (torch.relu(m.before(x)) for m in (model, original))
        b, b0 = (torch.relu(m.first(t)) for m, t in ((model, a), (original, a0)))
        wanted = a0 + original.second(b0) - a  # the output that second should have
        W = torch.cat([original.second.weight, original.second.bias[:, None]], 1)
        X = with_ones(b)
        H = X.T @ X / len(X)
        A = torch.linalg.inv(H + 0.02 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
        W = W + (wanted - X @ W.T).T @ X / len(X) @ A
        error = (wanted - model.second(b)).square().sum() / len(X)
    out = lobs.prune_weight(W[:, :-1].contiguous(), H, sparsity=0.6, bias=W[:, -1], damping=0.02)
    assert distance(model.second.weight.detach(), out.weight) < 1e-9
    second = next(layer for layer in report.layers if layer.name == "second")
    assert "corrected together with what is added to its output" in second.notes
    assert second.error == pytest.approx(float(error), rel=1e-9)


def test_projections_that_one_parameter_holds_are_corrected_one_after_another():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.before = nn.Linear(20, 12).double()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(*[self.before(x)] * 3)[0]

        def projected(self, x: Tensor) -> Tensor:
            weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
            return nn.functional.linear(self.before(x), weight, bias).reshape(-1, 3, 12)

    model = Attending()
    original = copy.deepcopy(model)
    data = [features(40, 20, seed=i).view(8, 5, 20) for i in range(4)]
    layers = pruned(model, data).layers
    with torch.no_grad():
        now, wanted = (m.projected(torch.cat(data)) for m in (model, original))
    errors = (now - wanted).square().sum((0, 2)) / len(now)
    assert [layer.name[-6:] for layer in layers[1:4]] == ["q_proj", "k_proj", "v_proj"]
    assert [layer.error for layer in layers[1:4]] == pytest.approx(errors.tolist(), rel=1e-9)
    assert all(layer.inherited > 0 for layer in layers[1:])


@pytest.mark.usefixtures("whole_corrections")
@pytest.mark.parametrize("how", ["scaled", "used twice", "broadcast", "none"])
def test_other_uses_of_an_output_are_not_sums(how):
    model = Residual(how)
    report = pruned(model, [features(40, 20, seed=i) for i in range(4)])
    assert all(not layer.notes for layer in report.layers)


@pytest.mark.usefixtures("whole_corrections")
def test_any_of_several_layers_that_read_one_tensor_may_be_added():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(20, 12).double()
            self.a, self.b, self.c = (nn.Linear(12, 12).double() for _ in range(3))
            self.last = nn.Linear(12, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            gate, b, c = torch.sigmoid(self.a(x)), self.b(x), self.c(x)
            return self.last((x + b) * gate + (c + x) * (1 - gate))

    report = pruned(Both(), [features(40, 20, seed=i) for i in range(4)])
    notes = {x.name: x.notes for x in report.layers}
    added = ("corrected together with what is added to its output",)
    assert notes == {"first": (), "a": (), "b": added, "c": added, "last": ()}


def test_sums_are_detected_call_by_call():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    with torch.no_grad(), Sums({"a": layer}) as sums:
        for k in range(3):
            x = x + layer(x * (k + 1))
    assert sums.calls == {"a": 3}
    assert len(sums.addends["a"]) == 3
    assert sums.elsewhere == set()


@pytest.mark.usefixtures("whole_corrections")
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_block_by_block_gives_what_whole_passes_give(scope):
    whole, parts = made(), made()
    a = pruned(whole, block_batches(), blocks=None, scope=scope)
    b = pruned(parts, block_batches(), scope=scope)
    assert (a.settings["blocks"], b.settings["blocks"]) == ([], ["layers"])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert [(x.error, x.inherited) for x in a.layers] == [(x.error, x.inherited) for x in b.layers]
    summed = [x.name for x in b.layers if x.notes]
    assert summed == [f"layers.{i}.down" for i in range(3)]


class Derived(Model):
    """One argument of the blocks is computed from the hidden state before the stack, so it differs
    for the blocks of the original network."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scale = x.abs().mean()
        for layer in self.layers:
            x = layer(x, scale=scale)[0]
        return self.head(x)


def test_the_blocks_of_the_original_are_run_with_its_own_arguments():
    whole, parts = made(Derived), made(Derived)
    pruned(whole, block_batches(), blocks=None)
    report = pruned(parts, block_batches())
    assert report.settings["blocks"] == ["layers"]
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())


def test_padding_does_not_count():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    short = torch.randn(30, 3, 6)
    mask = torch.ones(30, 5)
    mask[:, 3:] = 0
    long = torch.cat([short, 1e3 * torch.randn(30, 2, 6)], 1)
    plain, padded = Padded(), Padded()
    a = pruned(plain, [{"x": short, "attention_mask": mask[:, :3]}])
    b = pruned(padded, [{"x": long, "attention_mask": mask}])
    assert distance(padded.b.weight.detach(), plain.b.weight.detach()) < 1e-5
    assert b.layers[1].error == pytest.approx(a.layers[1].error, rel=1e-4)


def test_experts_are_not_corrected_and_have_a_note():
    report = pruned(Experts(transposed=False), [routed([30, 20, 20, 25])])
    notes = [note for layer in report.layers for note in layer.notes if "not corrected" in note]
    assert len(notes) == 2
    assert all("experts are not sent the same rows" in note for note in notes)


class Counting(nn.Module):
    """Calls its second layer more often the larger the first one's result is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.size = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        size = float(x.square().sum())
        self.size = self.size or size
        for _ in range(2 if size == self.size else 3):
            x = self.b(x)
        return x


def test_networks_that_cannot_be_compared_row_by_row_are_not_corrected_and_have_a_note():
    report = pruned(Counting(), [torch.randn(40, 6)], blocks=None)
    (note,) = [n for n in report.layers[1].notes if "not corrected" in n]
    assert "called more often" in note
    assert report.layers[1].inherited is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    model = chain().to(dtype)
    report = pruned(model, [x.to(dtype) for x in rows(model)])
    assert all(p.dtype == dtype for p in model.parameters())
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


def test_limits_on_the_error_include_the_inherited_error():
    model = chain()
    report = pruned(model, rows(model), sparsity=None, max_error=0.05)
    assert all(layer.error <= 0.05 for layer in report.layers)
    assert all(layer.sparsity > 0.1 for layer in report.layers)


@pytest.mark.usefixtures("whole_corrections")
def test_where_the_inherited_error_is_above_the_limit_a_note_says_that_nothing_was_removed():
    model = chain()
    overrides = {"2": {"max_error": 1e-6}, "4": {"max_error": 1e6}}
    first, second, third = pruned(model, rows(model), overrides=overrides).layers
    assert second.sparsity == 0
    assert second.error > 1e-6
    assert f"makes an error of {second.error:.3g}, above max_error" in second.notes[0]
    assert third.sparsity == 1
    assert first.notes == third.notes == ()


def test_an_error_in_the_middle_leaves_the_model_unchanged():
    model = made()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = 0

    class StopError(RuntimeError):
        pass

    def fail(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 40:
            raise StopError

    model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(StopError):
        pruned(model, block_batches())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_network_with_a_stochastic_forward():
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    def once() -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = Noisy(*chain())
        pruned(model, [features(40, 20, seed=i) for i in range(4)])
        return model.state_dict()

    first, second = once(), once()
    assert all(torch.equal(v, second[k]) for k, v in first.items())


# ---- models of transformers ----------------------------------------------------------------------

RESIDUAL = {  # layers whose outputs are added to the residual stream
    "BertModel": {"attention.output.dense", "output.dense"},
    "LlamaForCausalLM": {"o_proj", "down_proj"},
    "GPT2LMHeadModel": {"attn.c_proj", "mlp.c_proj"},
    "MixtralForCausalLM": {"o_proj"},
}


@pytest.mark.parametrize("kind", RESIDUAL)
def test_transformers_models_are_closer_to_the_original(kind):
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(4, 60, (8, 12), generator=generator)} for _ in range(4)]

    def first(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output: Tensor = model(**batch, use_cache=False)[0]
        return output

    measured = {}
    for inputs in ("pruned", "corrected"):
        model = network(kind)
        head = "lm_head" if hasattr(model, "lm_head") else None
        options = {"exclude": head, "forward": first, "scope": "model", "spread": 0.1}
        report = pruned(model, data, inputs=inputs, **options)
        measured[inputs] = report.error_bound.measured
        assert len(report.settings["blocks"]) == 1, report.settings["no blocks"]
    summed = {x.name for x in report.layers if any("added to its output" in n for n in x.notes)}
    ends = RESIDUAL[kind]
    assert {name for name in summed if any(name.endswith(end) for end in ends)} == summed
    assert len(summed) == 2 * len(ends)
    assert measured["corrected"] < measured["pruned"]
