"""Costs of removals add up to the error: the predicted error, its curve, and the condition of the
second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import conditioned, features, layer
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers.costs import POINTS, along
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
WAYS: dict[str, dict[str, Any]] = {
    "layer": {"sparsity": 0.6},
    "nearly all": {"sparsity": 0.95},
    "all": {"sparsity": 1.0},
    "row": {"sparsity": 0.6, "scope": "row"},
    "2:4": {"pattern": "2:4"},
    "blocks": {"sparsity": 0.5, "pattern": "1x3"},
    "blocks of rows": {"sparsity": 0.5, "pattern": "1x3", "scope": "row"},
    "wide": {"sparsity": 0.5, "columns": 300},
    "an error": {"max_error": 1.0},
    "an error, row": {"max_error": 1.0, "scope": "row"},
}


def damped_error(out: lobs.PrunedWeight, dW: Tensor, H: Tensor) -> float:
    """The incurred error plus the share of damping."""
    return out.error + out.damping * float(H.diagonal().mean() * dW.square().sum())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("method", ["exact", "sweep"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_costs_add_up_to_the_damped_error(way, method, bias):
    options = dict(way)
    W, H = layer(70, columns := options.pop("columns", 24))
    dW_bias = torch.zeros(70, dtype=F64)
    if bias:
        x = torch.cat([features(400, columns), torch.ones(400, 1, dtype=F64)], 1)
        H, options["bias"] = x.T @ x / 400, W[:, 0].clone()
    out = lobs.prune_weight(W, H, method=method, **options)
    if bias:
        dW_bias = out.bias - options["bias"]
    dW = torch.cat([out.weight - W, dW_bias[:, None]], 1)
    assert out.predicted == pytest.approx(damped_error(out, dW, H), rel=1e-9)
    assert out.predicted > out.error


@pytest.mark.parametrize("method", ["lobs", "magnitude", "wanda"])
def test_rankings_predict_nothing(method):
    W, H = layer(10, 12)
    out = lobs.prune_weight(W, H, sparsity=0.5, method=method)
    assert out.predicted is out.curve_sparsity is out.curve_error is None
    assert out.energy == pytest.approx(float((W @ H * W).sum()))


def test_a_mask_alone_is_not_traced():
    W, H = layer(10, 12)
    assert lobs.prune_weight(W, H, mask=W > 0).predicted is None


def test_nothing_removed_costs_nothing():
    W, H = layer(10, 12)
    for method in ("exact", "sweep"):
        assert lobs.prune_weight(W, H, sparsity=0.0, method=method).predicted in (0.0, None)
    assert lobs.prune_weight(W, H, sparsity=0.0).predicted == 0.0


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("pattern", ["unstructured", "1x3"])
def test_the_curve_is_the_trace_s_and_has_the_chosen_point(scope, share, pattern):
    W, H = layer(150, 30)
    out = lobs.prune_weight(W, H, sparsity=share, scope=scope, pattern=pattern)
    across, down = lobs.trace_weight(W, H, pattern=pattern).curve(scope, 10**6)
    true = dict(zip(across.tolist(), down.tolist(), strict=True))
    least = 15 if scope == "layer" else 4  # of a row's few steps each is a point
    assert least <= len(out.curve_sparsity) == len(out.curve_error) <= POINTS + 1
    for sparsity, error in zip(out.curve_sparsity, out.curve_error, strict=True):
        assert error == pytest.approx(true[sparsity], rel=1e-9, abs=1e-12)
    assert sorted(set(out.curve_sparsity)) == list(out.curve_sparsity)
    assert (out.sparsity, out.predicted) in zip(out.curve_sparsity, out.curve_error, strict=True)
    assert out.curve_sparsity[0] == 0.0


def test_a_trace_predicts_the_same_at_every_sparsity():
    W, H = layer(40, 24)
    trace = lobs.trace_weight(W, H)
    for share in (0.25, 0.5, 0.95):
        alone = lobs.prune_weight(W, H, sparsity=share)
        assert trace.at(share).predicted == pytest.approx(alone.predicted, rel=1e-9)


def test_importance_guides_the_choice_and_is_not_counted():
    W, H = layer(60, 20)
    importance = torch.logspace(-2, 2, 60, dtype=F64)[None]
    out = prune_groups(W[None], [H], LayerSettings(sparsity=0.6), importance=importance)
    assert out.predicted == pytest.approx(damped_error(out, out.weight[0] - W, H), rel=1e-9)
    assert out.curve_error[-1] >= out.predicted


@pytest.mark.parametrize("method", ["exact", "sweep"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_groups_and_a_drift_add_up_too(method, scope):
    """Two groups of a layer that also compensates for the layers before it."""
    W, moments, pull, inherited = [], [], [], 0.0
    for g in range(2):
        x = features(200, 18, seed=g) * (1 + 9 * g)
        w = layer(30, 18, seed=g)[0]
        y = x @ w.T + 0.3 * features(200, 30, seed=7 + g)
        left = y - x @ w.T
        W.append(w)
        moments.append(x.T @ x / 200)
        pull.append(x.T @ left / 200)
        inherited += float(left.square().sum()) / 200
    before = torch.stack(W)
    out = prune_groups(
        before, moments, LayerSettings(sparsity=0.5, method=method, scope=scope),
        drift=Drift(pull, inherited, 1.0),
    )  # fmt: skip
    added = sum(
        out.damping * float(H.diagonal().mean() * dW.square().sum())
        for H, dW in zip(moments, out.weight - before, strict=True)
    )
    assert out.predicted == pytest.approx(out.error + added, rel=1e-9)
    if method == "exact":
        assert out.curve_error[0] < inherited  # the layers before it are compensated for already


@pytest.mark.parametrize("condition", [3.0, 1e3, 1e6])
@pytest.mark.parametrize("columns", [5, 60])
@pytest.mark.parametrize("method", ["exact", "sweep"])
def test_the_condition_is_estimated_from_below_within_a_factor_of_two(condition, columns, method):
    H = conditioned(columns, condition) * 1e-5
    W = layer(9, columns)[0]
    out = lobs.prune_weight(W, H, sparsity=0.5, method=method, damping=1e-8)
    damped = H + 1e-8 * H.diagonal().mean() * torch.eye(columns, dtype=F64)
    true = float(torch.linalg.cond(damped))
    assert true / 2 < out.condition <= true * (1 + 1e-9)


@pytest.mark.parametrize("method", ["sweep", "exact"])
def test_many_small_groups_have_the_condition_of_the_worst(method):
    moments = [conditioned(9, 10.0**g) for g in range(4)]
    unit = torch.eye(9, dtype=F64)
    damped = [H + 0.01 * H.diagonal().mean() * unit for H in moments]
    settings = LayerSettings(sparsity=0.5, method=method, damping=0.01)
    dead = torch.zeros(9, 9, dtype=F64)
    out = prune_groups(torch.randn(5, 2, 9, dtype=F64), [*moments, dead], settings)
    worst = max(float(torch.linalg.cond(H)) for H in damped)
    assert out.condition == pytest.approx(worst, rel=1e-9)


def test_a_moment_that_is_not_inverted_has_no_condition_and_zero_has_the_best():
    W, H = layer(4, 6)
    assert lobs.prune_weight(W, H, sparsity=0.5, method="wanda").condition is None
    assert lobs.prune_weight(W, 0 * H, sparsity=0.5).condition == pytest.approx(1.0)


@pytest.mark.parametrize("length", [1, 2, 3, 40, 10**5])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.97, 1.0])
def test_places_along_a_list_start_at_zero_and_rise_to_its_end(length, share):
    place = along(length, share).tolist()
    assert place[0] == 0
    assert place[-1] == length - 1
    assert place == sorted(set(place))
    assert len(place) <= POINTS
