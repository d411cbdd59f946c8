"""How much each token counts in a second moment, as the gradient of the output tells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.experts import Experts, routed
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.moments import calibrate
from lobs_native.calibration.sensitivity import sensitivities
from lobs_native.calibration.session import Session
from lobs_native.calibration.token_weights import TokenWeights
from lobs_native.errors import ArgumentError
from lobs_native.layers import layers_of
from lobs_native.solvers.drift import Drift, trusted_share

pytestmark = pytest.mark.usefixtures("one_thread")


def session_with_weights(model: nn.Module, batches: list[Any]) -> Session:
    session = Session(model, batches, None, None, 0, False, True)
    session.weights = TokenWeights()
    with session.evaluating():
        sensitivities(session, layers_of(model), None, session.weights)
    return session


class Scaled(nn.Module):
    """The output depends on each token by a factor of its own."""

    def __init__(self, layer: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x) * self.scale


def test_a_token_counts_by_the_square_of_its_effect_on_the_output():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 3.0]).double()[:, None]
    session = session_with_weights(
        Scaled(nn.Linear(2, 400).double(), scale), [torch.randn(5, 3, 2).double()]
    )
    weights = session.weights.of(["layer"], 0, 0)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    expected = scale[:, 0].square().repeat(5)
    assert torch.allclose(weights, expected / expected.mean(), rtol=0.2)
    assert session.weights.of(["layer"], 1, 0) is None
    assert session.weights.of(["other"], 0, 0) is None


def test_padding_has_no_weight_and_does_not_count_in_the_mean():
    mask = torch.ones(6, 4)
    mask[:, 2:] = 0
    model = Scaled(nn.Linear(3, 50), torch.tensor([1.0, 1.0, 9.0, 9.0])[:, None])
    session = session_with_weights(model, [{"x": torch.randn(6, 4, 3), "attention_mask": mask}])
    weights = session.weights.of(["layer"], 0, 0).reshape(6, 4)
    assert bool((weights[:, 2:] == 0).all())
    assert weights[:, :2].mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Linear(4, 5), (7, 3, 4)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 5, 6)),
    ],
    ids=["linear", "convolution", "transposed"],
)
def test_second_moments_weight_the_rows_that_the_gradients_are_of(layer, sizes, monkeypatch):
    """With a gradient at a single row, the second moment is that row's alone."""
    monkeypatch.setattr("lobs_native.layers.conv.PATCH_BYTES", 2000)  # patches come in pieces
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(sizes).double()
    own = layers_of(layer)[0]
    units = own.units(layer(x))
    for at in (0, len(units) // 2, len(units) - 1):
        chosen = torch.zeros_like(units)
        chosen[at] = 1
        scale = torch.autograd.functional.vjp(own.units, layer(x).detach(), chosen)[1]
        model = Scaled(copy.deepcopy(layer), scale)
        session = session_with_weights(model, [x])
        with session.evaluating():
            (moments,) = calibrate(layers_of(model), session, "test").values()
        for g in range(moments.layer.groups):
            rows = [r for k, r in moments.layer.columns(x) if k == g]
            row = torch.cat([torch.cat(rows)[at], torch.ones(1).double()])
            assert torch.allclose(moments[g].matrix(), torch.outer(row, row), atol=1e-6)
        assert moments.effective_rows == pytest.approx(1)


class Pooled(nn.Module):
    """The mean over tokens of two layers, in which the later tokens count little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.tensor([1.0, 1.0, 0.01, 0.01])[:, None]
        return (self.last(torch.relu(self.a(x)) + torch.tanh(self.b(x))) * share).sum(1)


def batches(count: int = 3) -> list[Tensor]:
    """The later tokens lie in other directions."""
    torch.manual_seed(1)
    data = []
    for _ in range(count):
        x = torch.randn(40, 4, 8) @ torch.diag(torch.linspace(2, 0.2, 8))
        x[:, 2:] = 4 * x[:, 2:].flip(2)
        data.append(x)
    return data


@pytest.mark.parametrize("inputs", ["dense", "pruned", "corrected"])
def test_the_output_of_the_network_changes_less(inputs):
    change = {}
    for weights in (None, "output"):
        model = Pooled()
        report = lobs.prune(
            model, batches(), sparsity=0.6, inputs=inputs, token_weights=weights, progress=False,
            measure="all",
        )  # fmt: skip
        change[weights] = report.error_bound.measured
        known = [x.effective_rows for x in report.layers]
        assert (known == [None] * 3) if weights is None else all(20 < x < 400 for x in known)
    assert change["output"] < 0.8 * change[None]


def test_corrections_trust_all_rows_whatever_they_weigh(monkeypatch):
    seen = []

    def share(drift: Drift, *others: Any) -> float:
        seen.append(drift.rows)
        return trusted_share(drift, *others)

    monkeypatch.setattr("lobs_native.solvers.problem.trusted_share", share)
    options = {"sparsity": 0.6, "token_weights": "output", "inputs": "corrected"}
    lobs.prune(Pooled(), batches(), progress=False, **options)
    assert seen
    assert all(n == pytest.approx(3 * 40 * 4) for n in seen)


def test_rows_are_weighted_as_well_unless_that_is_turned_off():
    networks = {}
    for sensitivity in ("auto", "output", None):
        networks[sensitivity] = Pooled()
        lobs.prune(
            networks[sensitivity], batches(), sparsity=0.6, sensitivity=sensitivity,
            token_weights="output", progress=False,
        )  # fmt: skip
    weights = {k: model.a.weight for k, model in networks.items()}
    assert torch.equal(weights["auto"], weights["output"])
    assert not torch.equal(weights["auto"], weights[None])
    lobs.prune(Pooled(), batches(), sparsity=0.6, method="sweep", token_weights="output")


def test_layers_that_read_one_tensor_share_the_mean_of_their_weights():
    session = session_with_weights(Pooled(), batches(1))
    a, b = (session.weights.of([name], 0, 0) for name in "ab")
    assert not torch.allclose(a, b)
    assert torch.allclose(session.weights.of(["a", "b"], 0, 0), (a + b) / 2)


def test_a_run_that_was_killed_takes_the_weights_from_its_folder(tmp_path, monkeypatch):
    options = {"sparsity": 0.5, "token_weights": "output", "sensitivity": "output"}
    whole, resumed = Pooled(), Pooled()
    lobs.prune(whole, batches(), progress=False, **options)
    options |= {"run_dir": tmp_path / "run", "progress": False}
    from lobs_native.network import layerwise

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "prune_groups", fail)
        with pytest.raises(KeyboardInterrupt):
            lobs.prune(resumed, batches(), **options)
    monkeypatch.setattr("lobs_native.network.pruning.sensitivities", fail)
    lobs.prune(resumed, batches(), **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_layers_whose_outputs_are_no_module_s_count_all_rows_the_same():
    x, chosen = routed([60, 50, 40, 30])
    model = nn.ModuleDict({"experts": Experts(transposed=False), "last": nn.Linear(6, 6).double()})
    options = {"sparsity": 0.5, "token_weights": "output", "progress": False}

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model["last"](model["experts"](*batch))

    report = lobs.prune(model, [(x, chosen)], forward=forward, **options)
    noted = [any("its rows counted the same" in n for n in x.notes) for x in report.layers]
    assert noted == [True, True, False]
    with pytest.raises(ArgumentError, match="token_weights: 'output' needs the gradient at"):
        lobs.prune(model, [(x, chosen)], forward=forward, include="experts", **options)


def test_rows_count_the_same_where_the_pruned_network_sends_others():
    class Chooses(nn.Module):
        """Sends on the tokens that the first layer likes."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y[y[:, 0] > 0])

    report = lobs.prune(
        Chooses(), [torch.randn(60, 6)], sparsity=0.6, token_weights="output", inputs="pruned",
        progress=False,
    )  # fmt: skip
    noted = [any("on some batches its rows counted" in n for n in x.notes) for x in report.layers]
    assert noted == [False, True]


def test_the_theorem_does_not_cover_weighted_errors():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    options = {"sparsity": 0.5, "inputs": "dense", "progress": False}
    report = lobs.prune(model, [torch.randn(60, 6)], token_weights="output", **options)
    assert not report.error_bound.covered
    assert "weighted by token_weights" in report.error_bound.reason


def test_the_plan_counts_four_bytes_for_each_row():
    plan = lobs.plan_prune(
        Pooled(), batches(), sparsity=0.5, token_weights="output", progress=False
    )
    assert plan.token_weights == 3 * 3 * 160 * 4
    with pytest.raises(MemoryError, match="weights of tokens"):
        lobs.prune(Pooled(), batches(), sparsity=0.5, token_weights="output", memory=20_000)
