"""The settings of a layer and of a network: one list of options for all their users."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.cli.arguments import add_prune, settings_of
from lobs_native.compat.torch_prune import LOBSSparsifier, LOBSUnstructured
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.network.settings import NetworkSettings
from lobs_native.solvers.patterns import GroupsOf
from lobs_native.solvers.settings import LAYER_OPTIONS, LayerOptions, LayerSettings, Target, merged

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def batches() -> list[torch.Tensor]:
    return [torch.randn(30, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def options(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


# ---- one list of options -------------------------------------------------------------------------


def test_the_keywords_of_prune_are_the_network_settings():
    others = {"settings": None, "group": None, "original": None}
    assert keywords(lobs.prune) == {**options(lobs.NetworkSettings), **others}


@pytest.mark.parametrize(
    ("function", "missing", "other"),
    [
        (lobs.prune_weight, [], {"bias", "mask", "memory", "backend"}),
        (LOBSUnstructured.apply, ["prune_bias"], {"update_bias", "backend"}),
        (
            LOBSSparsifier.__init__,
            ["prune_bias"],
            {"update_bias", "backend", "calibration", "forward"},
        ),
    ],
)
def test_the_keywords_for_one_layer_are_the_layer_options(function, missing, other):
    expected = {k: v for k, v in options(LayerOptions).items() if k not in missing}
    there = keywords(function)
    assert {k: v for k, v in there.items() if k in expected} == expected
    assert set(there) - set(expected) == other


def test_a_network_has_the_options_of_its_layers_with_the_same_defaults():
    network_options = options(lobs.NetworkSettings)
    assert {name: network_options[name] for name in LAYER_OPTIONS} == options(LayerOptions)


def test_the_command_line_offers_every_setting_that_text_can_express():
    parser = argparse.ArgumentParser()
    command = add_prune(parser.add_subparsers())
    flags = {flag for action in command._actions for flag in action.option_strings}
    known = {f"--{name.replace('_', '-')}" for name in options(lobs.NetworkSettings)}
    assert known - flags == {"--overrides", "--forward", "--progress"}
    parsed = parser.parse_args(["prune", "model"])
    assert settings_of(parsed) == lobs.NetworkSettings()


# ---- settings instead of keywords ----------------------------------------------------------------


def test_settings_do_what_the_same_keywords_do():
    chosen = {"sparsity": 0.5, "method": "sweep", "overrides": {"2": {"sparsity": 0.25}}}
    settings = lobs.NetworkSettings(**chosen, progress=False)
    first, second = network(), network()
    report = lobs.prune(first, batches(), settings=settings)
    expected = lobs.prune(second, batches(), **chosen, progress=False)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    for key in options(lobs.NetworkSettings):
        assert report.settings.get(key) == expected.settings.get(key)
    plan = lobs.plan_prune(network(), batches(), settings=settings)
    assert plan.memory == lobs.plan_prune(network(), batches(), **chosen).memory


def test_settings_and_keywords_exclude_each_other():
    settings = lobs.NetworkSettings(sparsity=0.5, progress=False)
    for call in (lobs.prune, lobs.plan_prune):
        with pytest.raises(ArgumentError, match="settings: method, seed given as well"):
            call(network(), batches(), settings=settings, seed=3, method="sweep")
        with pytest.raises(DtypeError, match="settings: expected NetworkSettings, got dict"):
            call(network(), batches(), settings={"sparsity": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"ratio: prune has no such argument; it has .*spread"):
        lobs.plan_prune(network(), batches(), ratio=0.5)


def test_settings_cannot_be_changed_afterwards():
    settings = lobs.NetworkSettings(sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.sparsity = 0.6  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.for_layer("0")[0].method = "lobs"  # type: ignore[misc]


# ---- single values -------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "sparsity": (-0.1, ArgumentError),
    "threshold": ("much", DtypeError),
    "max_error": (-1.0, ArgumentError),
    "method": ("best", ArgumentError),
    "pattern": ("2-4", PatternError),
    "scope": ("column", ArgumentError),
    "damping": (float("inf"), ArgumentError),
    "prune_bias": (1, DtypeError),
    "refine": ("again", ArgumentError),
    "include": (3, DtypeError),
    "exclude": ([3], DtypeError),
    "overrides": (["0"], DtypeError),
    "spread": (1.5, ArgumentError),
    "sensitivity": ("fisher", ArgumentError),
    "token_weights": ("loss", ArgumentError),
    "tune": ("layers", ArgumentError),
    "tune_passes": (0, ArgumentError),
    "tune_rate": (1.0, ArgumentError),
    "classes": (1, ArgumentError),
    "budget": (None, DtypeError),
    "inputs": ("sparse", ArgumentError),
    "blocks": (True, DtypeError),
    "memory": (0, ArgumentError),
    "seed": (0.5, DtypeError),
    "token_mask": ("no", ArgumentError),
    "measure": ("none", ArgumentError),
    "held_back": (1.0, ArgumentError),
    "search": (-1, ArgumentError),
    "search_seconds": (-1.0, ArgumentError),
    "forward": ("model", DtypeError),
    "resume": ("yes", ArgumentError),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_by_name_when_settings_are_made(name):
    value, error = WRONG[name]
    with pytest.raises(error, match=name) as caught:
        lobs.NetworkSettings(**{name: value})
    assert type(caught.value) is error
    if name in LAYER_OPTIONS:
        with pytest.raises(error, match=name):
            LayerSettings(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"run_dir": ""}, ArgumentError, "run_dir: '' is not the path of a folder"),
        ({"run_dir": "a\0b"}, ArgumentError, "run_dir: .* is not the path of a folder"),
        ({"run_dir": 3}, DtypeError, "run_dir: expected a path, got int"),
        ({"seed": 2**64}, ArgumentError, "seed: .* torch takes 64 bits"),
        ({"sensitivity": "none"}, ArgumentError, "auto, output, bound or None"),
        ({"sparsity": 1.5}, ArgumentError, r"sparsity: 1.5; it is a fraction from 0 \(remove"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(wrong, error, message):
    with pytest.raises(error, match=message):
        NetworkSettings(**{"sparsity": 0.5, **wrong})


def test_every_seed_that_torch_takes_is_accepted():
    for seed in (-(2**63), -1, 2**64 - 1):
        torch.manual_seed(NetworkSettings(sparsity=0.5, seed=seed).seed)


def test_numbers_are_repeated_unchanged_and_are_floats_for_a_layer():
    settings = lobs.NetworkSettings(sparsity=1, damping=np.float32(0.5), spread=torch.tensor(0.25))
    kept = (settings.sparsity, settings.damping, settings.spread)
    assert [type(x) for x in kept] == [int, float, float]
    layer, _ = settings.for_layer("0")
    assert [type(x) for x in (layer.sparsity, layer.damping)] == [float, float]
    assert (layer.sparsity, layer.damping) == kept[:2]


# ---- combinations --------------------------------------------------------------------------------


def test_a_target_is_resolved():
    assert LayerSettings(sparsity=0.25).target == Target(sparsity=0.25)
    assert LayerSettings(max_error=2).target.label == "max_error 2"
    assert LayerSettings(pattern="2:4").target == Target(sparsity=0.5)
    assert LayerSettings(pattern="2:4").resolved_pattern == GroupsOf(2, 4)
    masked = LayerSettings()
    assert masked.target.label == "mask"
    masked.check_target(masked=True)
    with pytest.raises(ArgumentError, match="exactly one of them, not none"):
        masked.check_target()


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"sparsity": 0.5, "max_error": 1}, ArgumentError, "exactly one of them, not sparsity=0.5"),
        ({"sparsity": 0.7, "pattern": "2:4"}, ArgumentError, "'2:4' removes 0.5"),
        ({"max_error": 1, "pattern": "2:4"}, ArgumentError, "max_error=1: pattern '2:4'"),
        ({"threshold": 0.1}, ArgumentError, "threshold: .*method 'auto'"),
        ({"threshold": 0.1, "method": "lobs", "pattern": "1x2"}, ArgumentError, "single weights"),
        ({"refine": "exchange", "pattern": "1x2", "sparsity": 0.5}, PatternError, "refine"),
    ],
)
def test_contradictions_are_refused_unless_overrides_resolve_them(chosen, error, message):
    for cls in (LayerSettings, lobs.NetworkSettings):
        with pytest.raises(error, match=message):
            cls(**chosen)
    resolving = {"*": {"sparsity": 0.5, "method": "exact", "pattern": "unstructured"}}
    settings = lobs.NetworkSettings(**chosen, overrides=resolving)
    assert settings.for_layer("0")[0].target == Target(sparsity=0.5)


def test_later_overrides_win_and_a_target_replaces_all_targets():
    overrides = {
        "*": {"damping": 0.1, "max_error": 2.0},
        "2": {"pattern": "2:4", "damping": 0.2},
        "4": {"scope": "row"},
    }
    settings = lobs.NetworkSettings(sparsity=0.5, overrides=overrides)
    first, second, third = (settings.for_layer(name)[0] for name in ("0", "2", "4"))
    assert (first.target, first.damping) == (Target(max_error=2.0), 0.1)
    assert (second.target, second.damping) == (Target(sparsity=0.5), 0.2)
    assert (third.target, third.scope, first.scope) == (first.target, "row", "layer")
    with pytest.raises(ArgumentError, match=r"overrides\['2'\]: \['seed'\] unknown; known: spars"):
        merged({"2": {"seed": 1}})


def test_a_single_layer_has_no_shared_budget():
    settings = lobs.NetworkSettings(
        sparsity=0.5, scope="model", overrides={"2": {"scope": "layer"}}
    )
    layer, shared = settings.for_layer("0")
    assert (layer.scope, shared) == ("layer", True)
    assert settings.for_layer("2") == (layer, False)
    with pytest.raises(ArgumentError, match="scope: 'model'; expected one of row, layer"):
        LayerSettings(sparsity=0.5, scope="model")
    with pytest.raises(ArgumentError, match="scope: 'model' needs method 'auto', 'exact' or"):
        lobs.NetworkSettings(sparsity=0.5, scope="model", method="sweep")


# ---- what is repeated and compared ---------------------------------------------------------------


def test_reports_repeat_and_resumed_runs_compare_all_that_changes_the_result():
    settings = lobs.NetworkSettings(pattern=GroupsOf(2, 4), device=torch.device("cpu"))
    arguments = settings.arguments()
    assert set(options(lobs.NetworkSettings)) - set(arguments) == {
        "forward", "run_dir", "resume", "progress", "offload",
    }  # fmt: skip
    compared = settings.arguments(compared=True)
    assert set(arguments) - set(compared) == {"memory", "strict", "measure"}
    assert arguments["pattern"] == compared["pattern"] == "GroupsOf(keep=2, size=4)"
    assert arguments["device"] == "cpu"


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"sparsity": 2}, ArgumentError, "sparsity: 2"),
        ({"sparsity": "x"}, DtypeError, "sparsity: expected a number"),
        ({"method": "bad"}, ArgumentError, "method: 'bad'"),
        ({"pattern": "3:2"}, PatternError, "pattern: '3:2'"),
        ({"threshold": 0.1}, ArgumentError, "threshold: "),
        ({"refine": "exchange", "pattern": "1x2"}, PatternError, "refine: "),
    ],
)
def test_a_wrong_value_in_overrides_names_the_entry(entry, error, message):
    settings = NetworkSettings(sparsity=0.5, overrides={"head*": entry})
    assert settings.for_layer("body")[0].sparsity == 0.5
    with pytest.raises(error) as raised:
        settings.for_layer("head.1")
    assert str(raised.value).startswith(f"overrides['head*']: {message}")


def test_all_entries_that_apply_to_a_layer_are_named():
    settings = NetworkSettings(overrides={"a*": {"sparsity": 0.5}, "*b": {"damping": -1}})
    with pytest.raises(ArgumentError, match=r"overrides\['a\*'\], overrides\['\*b'\]: damping"):
        settings.for_layer("ab")
