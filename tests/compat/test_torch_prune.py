"""Adapters for torch.nn.utils.prune and torch.ao.pruning: values, masks, iterations, failures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import features
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lobs_native as lobs
from lobs_native.compat.torch_prune import (
    LOBSSparsifier,
    LOBSUnstructured,
    lobs_unstructured,
    second_moments,
)
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
    ShapeError,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(bias: bool = True) -> tuple[nn.Linear, lobs.Hessian]:
    """A layer (10, 12) and the second moment of its inputs."""
    h = lobs.Hessian(12, bias=bias).update(features(200, 12).float())
    return nn.Linear(12, 10, bias=bias), h


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def batches(count: int = 3) -> list[Tensor]:
    return [features(80, 12, seed=i).float() for i in range(count)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[k], expected[k]) for k in expected
    )


# ---- torch.nn.utils.prune ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.37, "scope": "row"},
        {"sparsity": 0.5, "method": "sweep"},
        {"sparsity": 0.5, "method": "lobs", "damping": 0.1},
        {"sparsity": 0.5, "method": "magnitude", "refine": "solve"},
        {"pattern": "2:4"},
        {"pattern": "1x4", "sparsity": 0.5},
    ],
    ids=str,
)
def test_a_linear_layer_is_pruned_as_by_prune_weight(bias: bool, how: dict[str, Any]) -> None:
    layer, h = linear(bias)
    expected = lobs.prune_weight(layer.weight, h, bias=layer.bias.detach() if bias else None, **how)
    parameter = layer.weight
    method = LOBSUnstructured.apply(layer, "weight", h, **how)
    assert isinstance(method, LOBSUnstructured)
    assert prune.is_pruned(layer)
    assert layer.weight_orig is parameter  # an optimizer may refer to it
    assert torch.equal(layer.weight_orig, expected.weight)
    assert torch.equal(layer.weight_mask, expected.mask.float())
    assert torch.equal(layer.weight, expected.weight)
    assert int((layer.weight == 0).sum()) == int((~expected.mask).sum()) > 0
    if bias:
        assert expected.bias is not None
        assert torch.equal(layer.bias, expected.bias)
    assert method.report.error == expected.error
    assert method.report.sparsity == expected.sparsity
    assert method.report.rows == 200


def test_the_functional_form_returns_the_module_and_accepts_a_matrix() -> None:
    layer, h = linear()
    twin = copy.deepcopy(layer)
    assert lobs_unstructured(layer, "weight", h, sparsity=0.5) is layer
    lobs_unstructured(twin, "weight", hessian=h.matrix(), sparsity=0.5)
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.bias, twin.bias)


def test_the_bias_is_unchanged_without_update_bias_or_a_column_of_ones() -> None:
    layer, h = linear()
    bias = layer.bias.detach().clone()
    plain = h.matrix()[:12, :12]
    expected = lobs.prune_weight(layer.weight, plain, sparsity=0.5)
    for hessian, how in ((h, {"update_bias": False}), (plain, {})):
        twin = copy.deepcopy(layer)
        lobs_unstructured(twin, "weight", hessian, sparsity=0.5, **how)
        assert torch.equal(twin.bias, bias)
        assert torch.equal(twin.weight, expected.weight)


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (9, 4, 7, 7)),
    (lambda: nn.Conv1d(4, 8, 3, stride=2), (20, 4, 15)),
    (lambda: nn.ConvTranspose2d(4, 6, 2), (9, 4, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
def test_convolutions_are_pruned_as_by_prune(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(make())
    data = [torch.randn(shape)]
    expected = copy.deepcopy(model)
    lobs.prune(expected, data, sparsity=0.5, progress=False)
    moments = second_moments(model, data)
    lobs_unstructured(model[0], "weight", moments["0"], sparsity=0.5)
    assert same(state(prune.remove(model[0], "weight")), state(expected[0]))
    zeros = int((model[0].weight == 0).sum())
    assert zeros == model[0].weight.numel() // 2
    assert torch.equal(model(data[0]), expected(data[0]))


def test_a_weight_that_is_stored_transposed_is_pruned() -> None:
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, data = nn.Sequential(kind(10, 12)), [features(200, 12).float()]
    nn.init.normal_(model[0].weight)
    expected = copy.deepcopy(model)
    lobs.prune(expected, data, sparsity=0.5, progress=False)
    lobs_unstructured(model[0], "weight", second_moments(model, data)["0"], sparsity=0.5)
    assert model[0].weight_orig.shape == (12, 10)
    assert same(state(prune.remove(model[0], "weight")), state(expected[0]))


def test_remove_leaves_only_the_repaired_weights() -> None:
    layer, h = linear()
    names = set(layer.state_dict())
    lobs_unstructured(layer, "weight", h, sparsity=0.6)
    x = features(5, 12).float()
    before, weight = layer(x), layer.weight.clone()
    prune.remove(layer, "weight")
    assert set(layer.state_dict()) == names
    assert not prune.is_pruned(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_state_dict_round_trip() -> None:
    layer, h = linear()
    lobs_unstructured(layer, "weight", h, sparsity=0.6)
    twin = prune.identity(nn.Linear(12, 10), "weight")
    twin.load_state_dict(layer.state_dict())
    x = features(5, 12).float()
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("before", ["ours", "l1"])
def test_iterated_pruning_does_not_restore_zeros(before: str) -> None:
    layer, h = linear()
    if before == "l1":
        prune.l1_unstructured(layer, "weight", amount=0.2)
    else:
        lobs_unstructured(layer, "weight", h, sparsity=0.2)
    for sparsity in (0.4, 0.7, 0.9):
        gone = layer.weight_mask == 0
        with torch.no_grad():
            layer.weight_orig.add_(0.1)  # as in training: values behind the mask change too
        value = (layer.weight_orig * layer.weight_mask).detach()
        expected = lobs.prune_weight(
            value, h, sparsity=sparsity, mask=~gone, bias=layer.bias.detach()
        )
        method = LOBSUnstructured.apply(layer, "weight", h, sparsity=sparsity)
        assert isinstance(method, prune.PruningContainer)
        assert method[-1].report.sparsity == expected.sparsity
        assert torch.equal(layer.weight, expected.weight)
        assert bool((layer.weight[gone] == 0).all())
        assert bool((layer.weight_orig[gone] == 0).all())
        assert int((layer.weight_mask == 0).sum()) == round(sparsity * 120)
    prune.l1_unstructured(layer, "weight", amount=6)  # and torch's own method continues from there
    assert int((layer.weight == 0).sum()) == 114
    assert (
        sum(isinstance(h, prune.BasePruningMethod) for h in layer._forward_pre_hooks.values()) == 1
    )


def test_without_a_target_the_kept_weights_are_repaired_for_the_existing_mask() -> None:
    layer, h = linear()
    dense, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    mask = layer.weight_mask == 1
    left = torch.where(mask, dense, 0)
    method = LOBSUnstructured.apply(layer, "weight", h)
    assert torch.equal(layer.weight_mask == 1, mask)
    # the weights were already zero: nothing is left to compensate, and nothing may get worse
    assert torch.equal(layer.weight, left)
    assert torch.equal(layer.bias, bias)
    assert method[-1].report.asked == "mask"


def test_training_continues_with_the_mask() -> None:
    layer, h = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    lobs_unstructured(layer, "weight", h, sparsity=0.5)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(features(30, 12).float()).square().sum().backward()
        optimizer.step()
    layer(features(3, 12).float())
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight == 0, before == 0)


def test_more_damping_than_requested_gives_a_warning() -> None:
    layer, _ = linear(bias=False)
    H = torch.ones(12, 12, dtype=torch.float64)
    H[0, 0] = 0.5  # not positive definite until there is enough damping
    with pytest.warns(RuntimeWarning, match="Cholesky failed with damping 0.01"):
        method = LOBSUnstructured.apply(layer, "weight", H, sparsity=0.5)
    assert method.report.status == "damping raised"
    assert method.report.damping > 0.01


def indefinite(columns: int) -> Tensor:
    """Symmetric, with an eigenvalue of -4, too low for the most damping that is tried."""
    H = torch.eye(columns)
    H[0, 1] = H[1, 0] = 5
    return H


class Halved(nn.Linear):
    """Its forward is not that of a known layer type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("error", "words", "name", "make", "how"),
    [
        (ArgumentError, "second_moments", "weight", None, {"sparsity": 0.5}),
        (ShapeError, r"\(11, 11\).*12 inputs", "weight", lambda: torch.eye(11), {"sparsity": 0.5}),
        (ShapeError, "2 for layer", "weight", lambda: [torch.eye(12)] * 2, {"sparsity": 0.5}),
        (NonFiniteError, "nan", "weight", lambda: torch.eye(12) * torch.nan, {"sparsity": 0.5}),
        (NotPositiveDefiniteError, "negative", "weight", lambda: -torch.eye(12), {"sparsity": 1}),
        (NotPositiveDefiniteError, "'Linear'", "weight", lambda: indefinite(12), {"sparsity": 0.5}),
        (LobsError, "no rows", "weight", lambda: lobs.Hessian(12, bias=True), {"sparsity": 0.5}),
        (DtypeError, "hessian", "weight", lambda: "H", {"sparsity": 0.5}),
        (ArgumentError, "not the weight", "bias", lambda: torch.eye(12), {"sparsity": 0.5}),
        (ArgumentError, "not the weight", "wait", lambda: torch.eye(12), {"sparsity": 0.5}),
        (DtypeError, "name", 3, lambda: torch.eye(12), {"sparsity": 0.5}),
        (ArgumentError, "exactly one", "weight", lambda: torch.eye(12), {}),
        (ArgumentError, "sparsity", "weight", lambda: torch.eye(12), {"sparsity": 1.5}),
        (ArgumentError, "method", "weight", lambda: torch.eye(12), {"method": "x", "sparsity": 1}),
        (PatternError, "5:8", "weight", lambda: torch.eye(12), {"pattern": "5:8"}),
        (DtypeError, "update_bias", "weight", lambda: torch.eye(12),
         {"update_bias": 1, "pattern": "2:4"}),
    ],
)  # fmt: skip
def test_failures_change_nothing(
    error: type[Exception], words: str, name: Any, make: Any, how: dict[str, Any]
) -> None:
    layer, _ = linear()
    before, hooks = state(layer), len(layer._forward_pre_hooks)
    with pytest.raises(error, match=words):
        LOBSUnstructured.apply(layer, name, make and make(), **how)
    assert same(state(layer), before)
    assert len(layer._forward_pre_hooks) == hooks
    assert not prune.is_pruned(layer)


def test_weights_are_restored_if_torch_refuses_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, h = linear()
    before = state(layer)

    def refuse(*args: Any, **kwargs: Any) -> None:
        assert not torch.equal(layer.weight, before["weight"])  # it has already been written
        raise KeyboardInterrupt

    monkeypatch.setattr(prune.BasePruningMethod, "apply", refuse)
    with pytest.raises(KeyboardInterrupt):
        lobs_unstructured(layer, "weight", h, sparsity=0.5)
    assert same(state(layer), before)


def test_a_mask_that_removes_more_than_the_target_is_refused() -> None:
    layer, h = linear()
    lobs_unstructured(layer, "weight", h, sparsity=0.7)
    before = state(layer)
    with pytest.raises(ArgumentError, match="already removes 84 of 120"):
        lobs_unstructured(layer, "weight", h, sparsity=0.5)
    assert same(state(layer), before)
    assert len(layer._forward_pre_hooks) == 1


def test_other_parametrizations_are_refused() -> None:
    layer, h = linear()
    parametrizations.weight_norm(layer)
    before = state(layer)
    with pytest.raises(ArgumentError, match="LOBSSparsifier"):
        lobs_unstructured(layer, "weight", h, sparsity=0.5)
    assert same(state(layer), before)


# ---- second moments ------------------------------------------------------------------------------


def test_second_moments_are_those_of_the_inputs() -> None:
    model, data = network(), batches()
    before, random = state(model), torch.get_rng_state()
    model[0].train()
    found = second_moments(model, iter(data))
    with torch.no_grad():
        hidden = [model[:2](x) for x in data]
    for name, inputs in (("0", data), ("2", hidden)):
        expected = lobs.Hessian(inputs[0].shape[1], bias=True)
        for x in inputs:
            expected.update(x)
        (h,) = found[name]
        assert torch.equal(h.matrix(), expected.matrix())
        assert h.rows == 240
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].training
    assert list(second_moments(model, data, names=["2"])) == ["2"]


def test_second_moments_of_a_pruned_network_use_its_present_weights() -> None:
    model, data = network(), batches(1)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    (h,) = second_moments(model, data)["2"]
    with torch.no_grad():
        expected = lobs.Hessian(16, bias=True).update(model[:2](data[0]))
    assert torch.equal(h.matrix(), expected.matrix())


def test_second_moments_refuse_layers_that_cannot_be_observed() -> None:
    model, data = network(), batches(1)
    with pytest.raises(ArgumentError, match=r"'1' is not a layer.*'0', '2'"):
        second_moments(model, data, names=["1"])
    with pytest.raises(ArgumentError, match="not called"):
        second_moments(model, data, forward=lambda model, x: model[0](x))
    with pytest.raises(ArgumentError, match="empty"):
        second_moments(model, [])
    with pytest.raises(DtypeError, match="names"):
        second_moments(model, data, names="0")
    with pytest.raises(DtypeError, match="model"):
        second_moments(model.state_dict(), data)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="'0'"):
        second_moments(model, [data[0] * torch.nan])
    with pytest.raises(ArgumentError, match="forward of its own"):
        second_moments(nn.Sequential(Halved(12, 4)), data)
    tied = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    tied[1].weight = tied[0].weight
    with pytest.raises(ArgumentError, match="'1' and '0' share"):
        second_moments(tied, data)


# ---- torch.ao.pruning ----------------------------------------------------------------------------

CONFIG = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight", "sparsity": 0.75}]


def test_the_sparsifier_prunes_as_prune_weight_does() -> None:
    model, data = network(), batches()
    dense = copy.deepcopy(model)
    hessians = second_moments(model, data)
    sparsifier = LOBSSparsifier(hessians, sparsity=0.5)
    sparsifier.prepare(model, CONFIG)
    parameters = dict(model.named_parameters())
    sparsifier.step()
    for i, sparsity in ((0, 0.5), (2, 0.75)):
        expected = lobs.prune_weight(
            dense[i].weight, hessians[str(i)][0], sparsity=sparsity, bias=dense[i].bias.detach()
        )
        chain = model[i].parametrizations.weight
        assert torch.equal(chain.original, expected.weight)
        assert chain.original is parameters[f"{i}.parametrizations.weight.original"]
        assert torch.equal(chain[0].mask, expected.mask.float())
        assert torch.equal(model[i].bias, expected.bias)
        assert torch.equal(model[i].weight, expected.weight)
        assert sparsifier.reports[f"{i}.weight"].error == expected.error
        assert sparsifier.state[f"{i}.weight"]["mask"] is chain[0].mask
    before = model(data[0])
    sparsifier.squash_mask()
    assert set(model.state_dict()) == set(dense.state_dict())
    assert torch.equal(model(data[0]), before)
    assert int((model[2].weight == 0).sum()) == 96


def test_a_sparsifier_with_data_calibrates_at_every_step() -> None:
    model, data = network(), batches()
    dense = copy.deepcopy(model)
    sparsifier = LOBSSparsifier(calibration=data, sparsity=0.3)
    sparsifier.prepare(model, None)  # every nn.Linear
    sparsifier.step()
    first = {name: model[int(name)].weight.detach().clone() for name in "02"}
    for name, weight in first.items():
        layer = dense[int(name)]
        h = second_moments(dense, data)[name][0]
        expected = lobs.prune_weight(layer.weight, h, sparsity=0.3, bias=layer.bias.detach())
        assert torch.equal(weight, expected.weight)
    seen = second_moments(model, data)
    assert not torch.equal(seen["2"][0].matrix(), second_moments(dense, data)["2"][0].matrix())
    bias = model[2].bias.detach().clone()
    for group in sparsifier.groups:
        group["sparsity"] = 0.6
    sparsifier.step()
    mask = first["2"] != 0
    expected = lobs.prune_weight(first["2"], seen["2"][0], sparsity=0.6, mask=mask, bias=bias)
    assert torch.equal(model[2].weight, expected.weight)
    for name, weight in first.items():
        assert bool((model[int(name)].weight[weight == 0] == 0).all())


@pytest.mark.parametrize("how", [{"pattern": "2:4"}, {"sparsity": 0.5, "method": "sweep"}])
def test_the_sparsifier_prunes_convolutions(how: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    data = [torch.randn(6, 4, 8, 8)]
    expected = copy.deepcopy(model)
    lobs.prune(expected, data, progress=False, **how)
    sparsifier = LOBSSparsifier(calibration=data, **how)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert same(state(model), state(expected))


def test_update_mask_prunes_one_tensor() -> None:
    model, data = network(), batches(1)
    sparsifier = LOBSSparsifier(second_moments(model, data), sparsity=0.5)
    sparsifier.prepare(model, None)
    group = sparsifier.groups[0]
    sparsifier.update_mask(**group)
    module = group["module"]
    assert int((module.weight == 0).sum()) == module.weight.numel() // 2
    other = sparsifier.groups[1]["module"]
    assert int((other.weight == 0).sum()) == 0


def test_a_failure_of_the_sparsifier_changes_nothing() -> None:
    model, data = network(), batches(1)
    hessians: dict[str, Any] = dict(second_moments(model, data))
    for broken, error, words in (
        ({"0": hessians["0"]}, ArgumentError, "'2'"),
        ({**hessians, "2": torch.eye(5)}, ShapeError, "'2' has 16 inputs"),
        ({**hessians, "2": indefinite(16)}, NotPositiveDefiniteError, "'2'"),
    ):
        twin = copy.deepcopy(model)
        sparsifier = LOBSSparsifier(broken, sparsity=0.5)
        sparsifier.prepare(twin, CONFIG)
        before, masks = state(twin), [m.clone() for n, m in twin.named_buffers()]
        with pytest.raises(error, match=words):
            sparsifier.step()
        assert same(state(twin), before)
        assert all(map(torch.equal, [m for n, m in twin.named_buffers()], masks))
        assert not sparsifier.reports


def test_the_sparsifier_refuses_wrong_arguments() -> None:
    model = network()
    with pytest.raises(ArgumentError, match="exactly one"):
        LOBSSparsifier(sparsity=0.5)
    with pytest.raises(ArgumentError, match="exactly one"):
        LOBSSparsifier({}, calibration=batches(), sparsity=0.5)
    with pytest.raises(DtypeError, match="hessians"):
        LOBSSparsifier([lobs.Hessian(12)], sparsity=0.5)  # type: ignore[arg-type]
    sparsifier = LOBSSparsifier({"0": torch.eye(12)}, sparsity=0.5)
    parametrizations.weight_norm(model[0])
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    with pytest.raises(ArgumentError, match="it has _WeightNorm, FakeSparsity"):
        sparsifier.step()


def test_a_switched_off_sparsifier_does_nothing() -> None:
    model = network()
    sparsifier = LOBSSparsifier({}, sparsity=0.5)
    sparsifier.prepare(model, None)
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert not sparsifier.reports
