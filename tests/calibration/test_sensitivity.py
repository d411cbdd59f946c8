"""The sensitivity of the output to each row of a layer, and its effect on which weights go."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.cases import features
from helpers.experts import Experts, routed
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.sensitivity import sensitivities
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers import layers_of

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(model: nn.Module, batches: list[Any], **options: Any) -> dict[str, Tensor]:
    session = Session(model, batches, options.get("forward"), None, 0, False, True)
    with session.evaluating():
        return sensitivities(session, layers_of(model))


def linear_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)).double()


def test_in_a_linear_chain_it_is_the_later_layers_effect_on_a_unit():
    model = linear_chain()
    found = measured(model, [torch.randn(4000, 6).double() for _ in range(5)])
    later = torch.eye(4).double()
    for name in ("2", "1", "0"):
        expected = later.square().sum(0)
        assert found[name].shape == (1, len(expected))
        assert torch.allclose(found[name][0], expected, rtol=0.1), name
        later = later @ model[int(name)].weight.detach()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_s_channels_are_averaged_over_positions(transposed):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, 3, groups=2).double()
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).double()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * scale[:, None, None]

    found = measured(Scaled(), [torch.randn(50, 4, 9, 9).double() for _ in range(2)])
    assert found["layer"].shape == (2, 3)
    assert torch.allclose(found["layer"].reshape(-1), scale.square(), rtol=0.1)


def test_padding_counts_for_nothing():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(x) * (1 + 9 * (1 - attention_mask[:, :, None]))  # amplifies padding

    mask = torch.ones(500, 4)
    mask[:, 2:] = 0
    found = measured(Padded(), [{"x": torch.randn(500, 4, 3), "attention_mask": mask}])
    assert torch.allclose(found["a"], torch.ones(1, 5).double(), rtol=0.2)


def test_the_model_is_unchanged():
    model = linear_chain()
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    measured(model, [torch.randn(10, 6).double()])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class Half(nn.Module):
    """Half of the first layer's outputs are not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(20, 12), nn.Linear(12, 5)
        with torch.no_grad():
            self.b.weight[:, 6:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def batches() -> list[Tensor]:
    return [features(60, 20, seed=i).float() for i in range(4)]


def test_rows_that_the_output_does_not_depend_on_go_first():
    reports = {}
    for sensitivity in (None, "output"):
        model = Half()
        report = lobs.prune(
            model, batches(), sparsity=0.5, sensitivity=sensitivity, include="a", progress=False
        )
        assert int((model.a.weight == 0).sum()) == 120
        reports[sensitivity] = report
    zeros = (model.a.weight == 0).sum(1)
    assert bool((zeros[6:] == 20).all())
    assert reports["output"].error_bound.measured == pytest.approx(0, abs=1e-5)
    assert reports[None].error_bound.measured > 0.01


def test_a_shared_budget_compares_layers_by_sensitivity():
    """The removals of all layers are merged by cost times sensitivity."""
    model = linear_chain()
    data = [torch.randn(80, 6).double() for _ in range(3)]
    importance = measured(copy.deepcopy(model), data)
    original = copy.deepcopy(model)
    report = lobs.prune(
        model, data, sparsity=0.5, scope="model", spread=1.0, inputs="dense", progress=False
    )
    x, costs = torch.cat(data), []
    for i, layer in enumerate(original):
        h = lobs.Hessian(layer.in_features, bias=True).update(x)
        trace = lobs.trace_weight(layer.weight, h, bias=layer.bias)
        weighed = trace.loss.double() * importance[str(i)][0][:, None]
        costs.append(weighed.cummax(1).values.reshape(-1))
        x = layer(x).detach()
    total = sum(c.numel() for c in costs)
    first = torch.cat(costs).argsort(stable=True)[: total // 2]
    whose = torch.cat([torch.full((c.numel(),), i) for i, c in enumerate(costs)])
    expected = whose[first].bincount(minlength=3).tolist()
    assert [int((layer.weight == 0).sum()) for layer in model] == expected
    assert report.removed == total // 2


def test_a_layer_without_a_sensitivity_keeps_the_sparsity_asked_for():
    x, chosen = routed([30, 20, 20, 25])
    model = nn.ModuleDict({"experts": Experts(transposed=False), "last": nn.Linear(6, 6).double()})
    report = lobs.prune(
        model,
        [(x, chosen)],
        forward=lambda m, batch: m["last"](m["experts"](*batch)),
        sparsity=0.5,
        scope="model",
        progress=False,
    )
    assert [layer.sparsity for layer in report.layers] == [0.5] * 3
    noted = [
        any("it kept the requested sparsity" in n for n in layer.notes) for layer in report.layers
    ]
    assert noted == [True, True, False]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m(x).detach(), "returns no tensor that can be differentiated"),
        (lambda m, x: m(x).argmax(1), "returns no tensor that can be differentiated"),
        (lambda m, x: torch.no_grad()(m)(x), "returns no tensor that can be differentiated"),
        (lambda m, x: torch.inference_mode()(m)(x), "returns no tensor|cannot be differentiated"),
    ],
)
def test_an_output_that_cannot_be_differentiated_is_refused_with_a_way_out(forward, message):
    model = linear_chain()
    before = copy.deepcopy(model.state_dict())
    options = {"sparsity": 0.5, "scope": "model", "progress": False, "forward": forward}
    data = [torch.randn(30, 6).double()]
    with pytest.raises(
        ArgumentError, match=rf"sensitivity: .*({message}).*; pass sensitivity=None"
    ):
        lobs.prune(model, data, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    lobs.prune(model, data, sensitivity=None, **options)


def test_it_is_refused_if_it_would_have_no_effect():
    for options in ({"method": "sweep"}, {"scope": "row"}, {"pattern": "2:4", "sparsity": None}):
        with pytest.raises(ArgumentError, match="sensitivity: 'output' weighs rows"):
            lobs.prune(Half(), batches(), **{"sparsity": 0.5, "sensitivity": "output", **options})
    with pytest.raises(ArgumentError, match="sensitivity: 'fisher'; expected one of auto"):
        lobs.prune(Half(), batches(), sparsity=0.5, sensitivity="fisher")
    with pytest.raises(DtypeError, match="sensitivity"):
        lobs.prune(Half(), batches(), sparsity=0.5, sensitivity=True)


@pytest.mark.parametrize("inputs", ["pruned", "corrected"])
def test_the_same_seed_gives_the_same_network(inputs):
    def once() -> dict[str, Tensor]:
        model = Half()
        lobs.prune(
            model, batches(), sparsity=0.6, scope="model", inputs=inputs, seed=3, progress=False
        )
        return model.state_dict()

    first, second = once(), once()
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_a_budget_of_flops_counts_a_convolution_s_weights_at_every_position():
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 10),
        )  # fmt: skip

    data = [torch.randn(40, 2, 8, 8)]
    options = {"scope": "model", "spread": 1.0, "progress": False}
    positions = torch.tensor([64, 9, 1])
    sizes = torch.tensor([108, 324, 540])
    for sparsity in (0.3, 0.6):
        model, plain = network(), network()
        report = lobs.prune(model, data, sparsity=sparsity, budget="flops", **options)
        shares = torch.tensor([x.sparsity for x in report.layers], dtype=torch.float64)
        removed = (shares * sizes).round()
        share = float((removed * positions).sum() / (sizes * positions).sum())
        assert share == pytest.approx(sparsity, abs=64 / float((sizes * positions).sum()))
        other = lobs.prune(plain, data, sparsity=sparsity, **options)
        assert report.layers[0].sparsity > other.layers[0].sparsity


def test_with_the_theorem_s_bound_layers_are_weighted_by_the_norms_after_them():
    model = linear_chain()
    data = [torch.randn(80, 6).double() for _ in range(3)]
    options = {"sparsity": 0.5, "scope": "model", "spread": 1.0, "inputs": "dense"}
    bounds = {}
    for sensitivity in ("bound", None):
        again = copy.deepcopy(model)
        report = lobs.prune(again, data, sensitivity=sensitivity, progress=False, **options)
        bounds[sensitivity] = report.error_bound.spectral
    assert bounds["bound"] < bounds[None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": "bound"}, "sensitivity: 'bound' compares layers; use scope 'model'"),
        ({"budget": "flops"}, "budget: 'flops' is shared among layers; use scope 'model'"),
        ({"budget": "bytes"}, "budget: 'bytes'; expected one of weights, flops"),
    ],
)
def test_wrong_budgets_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        lobs.prune(Half(), batches(), sparsity=0.5, progress=False, **options)


def test_the_bound_needs_a_chain():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ArgumentError, match=r"sensitivity: 'bound' needs .* use 'output'"):
        lobs.prune(
            model, [torch.randn(9, 1, 8, 8)], sparsity=0.5, scope="model", sensitivity="bound",
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("exponent", [-20, -9, 0, 10])
def test_float16_gradients_neither_underflow_nor_overflow(exponent):
    """The last weights are multiplied by a power of two: a network without rounding would give
    the same sensitivities, times its square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(300, 6)
    expected = measured(model, [x])
    half = copy.deepcopy(model).half()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model[2](model[1](model[0](x)) * 2.0**exponent)

    found = measured(half, [x.half()], forward=forward)
    assert torch.allclose(found["0"], expected["0"] * 4.0**exponent, rtol=0.03)
    assert torch.allclose(found["2"], expected["2"], rtol=0.01)


def test_float16_gradients_that_are_all_too_small_are_not_taken_for_zero():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).half()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model[1](model[0](x) * 2.0**-12 * 2.0**-12 * 2.0**-12)

    assert list(measured(model, [torch.randn(9, 6).half()], forward=forward)) == ["1"]
