"""Our replacements for the functions of llm-compressor's SparseGPTModifier: same masks, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native import compat

pytest.importorskip("llmcompressor", reason="llmcompressor is not installed")
from llmcompressor.modifiers.pruning.sparsegpt import base, sgpt_sparsify
from transformers.pytorch_utils import Conv1D

from lobs_native.compat import llmcompressor as ours

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("one_thread"),
]


def layer_and_inputs(
    rows: int = 40, columns: int = 96, dead: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, list[torch.Tensor]]:
    layer = nn.Linear(columns, rows, dtype=dtype)
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns) / 2
    batches = [torch.randn(2, 150, columns) @ mix for _ in range(3)]
    if dead:
        for x in batches:
            x[..., ::7] = 0
    return layer, [x.to(dtype) for x in batches]


def moment(host: Any, layer: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    H, n = host.make_empty_hessian(layer), 0
    for x in batches:
        H, n = host.accumulate_hessian(x, layer, H, n)
    assert n == sum(len(x) for x in batches)
    return H


def pruned(host: Any, layer: nn.Module, H: torch.Tensor, **settings: Any) -> Any:
    settings = {
        "sparsity": 0.5,
        "prune_n": 0,
        "prune_m": 0,
        "block_size": 128,
        "dampening_frac": 0.01,
        "preserve_sparsity_mask": False,
        **settings,
    }
    held = {layer: H.clone()}
    result = host.sparsify_weight(layer, held, **settings)
    assert not held
    return result


def close(actual: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (theirs.dtype, theirs.shape)
    torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


SETTINGS = {
    "30%": {"sparsity": 0.3},
    "50%": {},
    "70%": {"sparsity": 0.7},
    "nothing": {"sparsity": 0.0},
    "2:4": {"prune_n": 2, "prune_m": 4},
    "4:8": {"prune_n": 4, "prune_m": 8},
    "1:4 are zero": {"prune_n": 1, "prune_m": 4},
    "narrow blocks": {"block_size": 32},
    "odd blocks, 2:4": {"block_size": 30, "prune_n": 2, "prune_m": 4},
    "damped": {"dampening_frac": 0.3},
}


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_masks_and_weights_are_the_host_s(settings, dead):
    layer, batches = layer_and_inputs(dead=dead)
    H = moment(sgpt_sparsify, layer, batches)
    loss, actual = pruned(ours, layer, H, **settings)
    their_loss, theirs = pruned(sgpt_sparsify, layer, H, **settings)
    assert torch.equal(actual == 0, theirs == 0)
    close(actual, theirs)
    assert loss == pytest.approx(their_loss, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 13), (7, 129), (33, 300)])
def test_odd_sizes_have_the_host_s_weights(rows, columns, settings):
    layer, batches = layer_and_inputs(rows, columns)
    H = moment(sgpt_sparsify, layer, batches)
    if settings.get("prune_n") and columns % settings["prune_m"] in range(1, settings["prune_n"]):
        with pytest.raises(RuntimeError):  # the host's
            pruned(sgpt_sparsify, layer, H, **settings)
        with pytest.raises(lobs.PatternError, match="ends in a group of"):
            pruned(ours, layer, H, **settings)
        return
    _, actual = pruned(ours, layer, H, **settings)
    _, theirs = pruned(sgpt_sparsify, layer, H, **settings)
    assert torch.equal(actual == 0, theirs == 0)
    close(actual, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_second_moment_is_the_host_s(dtype):
    layer, batches = layer_and_inputs(dtype=dtype)
    actual, theirs = (moment(host, layer, batches) for host in (ours, sgpt_sparsify))
    torch.testing.assert_close(
        actual.tril(), theirs.tril(), rtol=1e-5, atol=1e-6 * float(theirs.max())
    )
    (_, a), (_, b) = (pruned(sgpt_sparsify, layer, H) for H in (actual, theirs))
    close(a, b)  # the host reads only the lower triangle


def test_single_samples_and_samples_of_tokens_count_as_in_the_host():
    layer, _ = layer_and_inputs(5, 16)
    batches = [torch.randn(9, 16), torch.randn(2, 3, 16)]
    for host in (ours, sgpt_sparsify):
        H, n = host.make_empty_hessian(layer), 0
        for x in batches:
            H, n = host.accumulate_hessian(x, layer, H, n)
        assert n == 3
    close(*(accumulated(host, layer, batches).tril() for host in (ours, sgpt_sparsify)))


def accumulated(host: Any, layer: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    H, n = host.make_empty_hessian(layer), 0
    for x in batches:
        H, n = host.accumulate_hessian(x, layer, H, n)
    return H


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_the_host_s_up_to_rounding(dtype):
    layer, batches = layer_and_inputs(dtype=dtype)
    H = moment(sgpt_sparsify, layer, batches)
    (_, actual), (_, theirs) = (pruned(host, layer, H) for host in (ours, sgpt_sparsify))
    assert actual.dtype == dtype
    assert torch.equal(actual == 0, theirs == 0)
    torch.testing.assert_close(actual, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0.6}, {"sparsity": 0.6, "block_size": 32}, {"prune_n": 2, "prune_m": 4}],
    ids=["60%", "60%, narrow", "2:4"],
)
def test_zeros_are_preserved_as_in_the_host(settings):
    layer, batches = layer_and_inputs(24, 96)
    with torch.no_grad():
        layer.weight[torch.rand(24, 96) < 0.2] = 0
        layer.weight[:, 32:40] = 0  # a block with more than its share
    if settings.get("prune_n"):
        settings = {**settings, "sparsity": 0.9}  # the host checks it nevertheless
    H = moment(sgpt_sparsify, layer, batches)
    settings = {**settings, "preserve_sparsity_mask": True}
    (_, actual), (_, theirs) = (
        pruned(host, layer, H, **settings) for host in (ours, sgpt_sparsify)
    )
    assert bool((actual[layer.weight == 0] == 0).all())
    assert torch.equal(actual == 0, theirs == 0)
    close(actual, theirs)


def test_too_many_zeros_are_refused_as_in_the_host():
    layer, batches = layer_and_inputs(8, 16)
    with torch.no_grad():
        layer.weight[:, :12] = 0
    H = moment(ours, layer, batches := [x[..., :16] for x in batches])
    for host in (ours, sgpt_sparsify):
        with pytest.raises(ValueError, match="sparsity"):
            pruned(host, layer, H, sparsity=0.5, preserve_sparsity_mask=True)


# ---- intended differences ------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prune_n": 2, "prune_m": 4}], ids=["50%", "2:4"])
def test_convolutions_get_a_second_moment_of_the_right_size(settings):
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    images = [torch.randn(2, 4, 9, 9) for _ in range(6)]
    with pytest.raises(RuntimeError):  # the host makes it (4, 4)
        moment(sgpt_sparsify, conv, images)
    H = moment(ours, conv, images)
    patches = torch.cat([nn.functional.unfold(x, 3, padding=1, stride=2) for x in images])
    wanted = torch.einsum("bct,bdt->cd", patches, patches) * 2 / 12
    torch.testing.assert_close(H.tril(), wanted.tril(), rtol=1e-4, atol=1e-4)
    (_, actual), (_, theirs) = (pruned(host, conv, H, **settings) for host in (ours, sgpt_sparsify))
    assert torch.equal(actual == 0, theirs == 0)  # with it, the host can continue
    close(actual, theirs)


def test_conv1d_of_transformers_gets_a_second_moment_of_the_right_size():
    layer = Conv1D(5, 12)
    with torch.no_grad():
        layer.weight.normal_()
    batches = [torch.randn(2, 30, 12)]
    with pytest.raises(RuntimeError):  # the host makes it (5, 5)
        moment(sgpt_sparsify, layer, batches)
    H = moment(ours, layer, batches)
    (_, actual), (_, theirs) = (pruned(host, layer, H) for host in (ours, sgpt_sparsify))
    assert actual.is_contiguous()
    close(actual, theirs)


def test_a_singular_moment_is_an_error_where_the_host_uses_the_identity():
    layer, _ = layer_and_inputs(8, 16)
    H = torch.ones(16, 16) - 2 * torch.eye(16) * 0.9
    H.diagonal().abs_()
    before = H.clone()
    _, theirs = pruned(sgpt_sparsify, layer, H, dampening_frac=0.0)
    kept = theirs != 0
    torch.testing.assert_close(theirs[kept], layer.weight[kept])  # no repair at all
    held = {layer: H}
    with pytest.raises(lobs.NotPositiveDefiniteError, match="dampening_frac=0"):
        ours.sparsify_weight(layer, held, 0.5, 0, 0, 128, 0.0, False)
    assert torch.equal(held[layer], before)


def test_inputs_that_are_not_finite_are_refused_and_h_is_unchanged():
    layer, (x, *_) = layer_and_inputs(8, 16)
    x = x[..., :16].clone()
    H, n = ours.accumulate_hessian(x, layer, ours.make_empty_hessian(layer), 0)
    before = H.clone()
    x[1, 2, 3] = float("inf")
    with pytest.raises(lobs.NonFiniteError, match="inp"):
        ours.accumulate_hessian(x, layer, H, n)
    assert torch.equal(H, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: 1.0"),
        ({"prune_n": 5, "prune_m": 4}, "5 of every 4"),
        ({"block_size": 0}, "block_size: 0"),
        ({"dampening_frac": -0.1}, "dampening_frac: -0.1"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    layer, batches = layer_and_inputs(8, 16)
    H = moment(ours, layer, [x[..., :16] for x in batches])
    with pytest.raises(lobs.ArgumentError, match=message):
        pruned(ours, layer, H, **settings)


# ---- patched in ----------------------------------------------------------------------------------


def test_patch_installs_them_in_the_modifier_s_namespace_and_removes_them():
    names = ("make_empty_hessian", "accumulate_hessian", "sparsify_weight")
    before = [getattr(base, name) for name in names]
    layer, batches = layer_and_inputs(dead=True)
    expected = pruned(sgpt_sparsify, layer, moment(sgpt_sparsify, layer, batches))[1]
    with compat.patch("llmcompressor", verify=1) as record:
        assert [getattr(base, name) for name in names] != before
        _, weight = pruned(base, layer, moment(base, layer, batches))
    assert [getattr(base, name) for name in names] == before
    close(weight, expected)
    lines = {line.name: line for line in record.lines}
    assert lines["accumulate_hessian"].calls == lines["accumulate_hessian"].verified == 3
    assert lines["sparsify_weight"].verified == 1
    assert lines["sparsify_weight"].exceeded == 0
