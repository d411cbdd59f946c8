"""Exact counts: as many weights are removed as documented, whatever the weights are."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from helpers.cases import features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.solvers.settings import METHODS, SCOPES

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REPAIRING = ("exact", "admm", "sweep", "lobs")  # methods that change what they keep
SHARES = [0.0, 1e-9, 0.1, 0.29, 0.5, 0.9, 1 - 1e-9, 1.0]
R, C = 6, 9


def documented(share: float, of: int) -> int:
    """The nearest whole number; a half is rounded down."""
    return math.ceil(share * of - 0.5)


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def moment(columns: int, seed: int = 0) -> Tensor:
    x = features(3 * columns, columns, seed)
    return x.T @ x / len(x)


@cache
def moment_with_ones() -> lobs.Hessian:
    return lobs.Hessian(C, bias=True).update(features(40, C))


@cache
def weights(dtype: torch.dtype, columns: int = C) -> dict[str, Tensor]:
    """Weights as they occur in practice, and weights that are hard to count."""
    generator = torch.Generator().manual_seed(7)
    random = torch.randn(R, columns, generator=generator, dtype=torch.float64)
    sparse = random.clone()
    sparse[torch.rand(R, columns, generator=generator) < 0.4] = 0
    negative_zero = random.clone()
    negative_zero[:, ::2] = -0.0
    mostly = torch.zeros(R, columns, dtype=torch.float64)
    mostly[2, 5] = mostly[4, 0] = 1.5
    equal = torch.full((R, columns), 0.75, dtype=dtype)
    return {
        "random": random.to(dtype),
        "equal": -equal,
        "equal but for the sign": equal * random.sign().to(dtype),
        "zero": torch.zeros(R, columns, dtype=dtype),
        "negative zero": negative_zero.to(dtype),
        "all negative zero": torch.full((R, columns), -0.0, dtype=dtype),
        "sparse": sparse.to(dtype),
        "two": mostly.to(dtype),
    }


def removed_together(out: lobs.PrunedWeight) -> Tensor:
    """The removed weights, (R, C), or (R, C + 1) where biases count as weights."""
    if out.bias_mask is None:
        return ~out.mask
    return torch.cat([~out.mask, ~out.bias_mask[:, None]], 1)


def check_count(out: lobs.PrunedWeight, share: float, scope: str) -> None:
    """The whole layer, or each row, has lost the documented number, and so the result reports."""
    removed = removed_together(out)
    candidates = removed.shape[1]
    if scope == "row":
        assert removed.sum(1).tolist() == [documented(share, candidates)] * len(removed)
    else:
        assert int(removed.sum()) == documented(share, removed.numel())
    assert out.sparsity == int(removed.sum()) / removed.numel()


def check_agreement(before: Tensor, after: Tensor, mask: Tensor) -> None:
    """Removed weights are exactly +0, and kept zeros were zero before."""
    assert bits(after[~mask]) == bytes(after[~mask].numel() * after.element_size())
    assert bool((before[(after == 0) & mask] == 0).all())
    assert after.dtype == before.dtype
    assert after.shape == before.shape == mask.shape


def check(
    W: Tensor, bias: Tensor | None, out: lobs.PrunedWeight, share: float, scope: str, method: str
) -> None:
    check_count(out, share, scope)
    check_agreement(W, out.weight, out.mask)
    assert (out.bias is None) == (bias is None)
    if bias is not None:
        kept = torch.ones_like(out.mask[:, 0]) if out.bias_mask is None else out.bias_mask
        check_agreement(bias, out.bias, kept)
    if method not in REPAIRING:
        assert bits(out.weight[out.mask]) == bits(W[out.mask])  # kept weights are not touched
    if share == 0:
        assert bits(out.weight) == bits(W)
        assert bias is None or bits(out.bias) == bits(bias)
        assert out.error == 0
    if share == 1:
        assert bits(out.weight) == bytes(W.numel() * W.element_size())


def check_zeros_go_first(before: Tensor, removed: Tensor, scope: str) -> None:
    """A nonzero weight is removed only after all zeros that could be removed."""
    rows = zip(before, removed, strict=True) if scope == "row" else [(before, removed)]
    for weight, lost in rows:
        zero = weight == 0
        if bool((lost & ~zero).any()):
            assert bool(lost[zero].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", SHARES)
def test_the_documented_number_is_removed(share, method, scope, dtype):
    H = moment(C)
    for W in weights(dtype).values():
        out = lobs.prune_weight(W, H, sparsity=share, method=method, scope=scope)
        check(W, None, out, share, scope, method)
        check_zeros_go_first(W, ~out.mask, scope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prune_bias", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", SHARES)
def test_the_documented_number_is_removed_with_a_bias(share, method, scope, prune_bias, dtype):
    H = moment_with_ones()
    bias = torch.linspace(-1, 1, R).to(dtype)  # holds no zero
    for W in weights(dtype).values():
        out = lobs.prune_weight(
            W, H, sparsity=share, method=method, scope=scope, bias=bias, prune_bias=prune_bias
        )
        check(W, bias, out, share, scope, method)
        before = torch.cat([W, bias[:, None]], 1) if prune_bias else W
        check_zeros_go_first(before, removed_together(out), scope)
        if prune_bias and share == 1:
            assert bits(out.bias) == bytes(R * bias.element_size())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", SHARES)
def test_masked_weights_count_and_are_removed_before_all_others(share, method, scope, dtype):
    mask = torch.ones(R, C, dtype=torch.bool)
    mask[:, 3] = False
    mask[:, 7] = False
    room = documented(share, C) >= 2 if scope == "row" else documented(share, R * C) >= 2 * R
    for W in weights(dtype).values():
        arguments: dict[str, Any] = {"sparsity": share, "method": method, "scope": scope}
        if not room:
            with pytest.raises(ArgumentError, match="mask"):
                lobs.prune_weight(W, moment(C), mask=mask, **arguments)
            continue
        out = lobs.prune_weight(W, moment(C), mask=mask, **arguments)
        check(W, None, out, share, scope, method)
        assert not bool(out.mask[~mask].any())


WIDE = 24  # columns of the rows that are cut into groups and blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["0:2", "1:2", "2:4", "1:4", "4:8", "2:3", "8:8"])
def test_every_group_loses_the_number_of_its_pattern(pattern, method, scope, dtype):
    keep, size = map(int, pattern.split(":"))
    H = moment(WIDE)
    for W in weights(dtype, WIDE).values():
        out = lobs.prune_weight(W, H, method=method, pattern=pattern, scope=scope)
        assert bool(((~out.mask).reshape(-1, size).sum(1) == size - keep).all())
        check_agreement(W, out.weight, out.mask)
        check_zeros_go_first(W.reshape(-1, size), (~out.mask).reshape(-1, size), "row")
        assert out.sparsity == (size - keep) / size
        if method not in REPAIRING:
            assert bits(out.weight[out.mask]) == bits(W[out.mask])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 4, 24])
def test_the_documented_number_of_blocks_is_removed(size, method, scope, share):
    H = moment(WIDE)
    for W in weights(torch.float32, WIDE).values():
        out = lobs.prune_weight(
            W, H, sparsity=share, method=method, pattern=f"1x{size}", scope=scope
        )
        blocks = (~out.mask).reshape(R, -1, size)
        assert bool((blocks == blocks[:, :, :1]).all())
        removed = blocks[:, :, 0]
        if scope == "row":
            assert removed.sum(1).tolist() == [documented(share, WIDE // size)] * R
        else:
            assert int(removed.sum()) == documented(share, R * WIDE // size)
        check_agreement(W, out.weight, out.mask)
        check_zeros_go_first((W.reshape(R, -1, size) != 0).any(2).double(), removed, scope)
        assert out.sparsity == int((~out.mask).sum()) / W.numel()
        if share == 0:
            assert bits(out.weight) == bits(W)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1x2", "1x4"])
def test_masked_weights_count_within_a_pattern(pattern, method):
    mask = torch.ones(R, WIDE, dtype=torch.bool)
    mask[:, 4:6] = False  # half a group, a whole block of 2
    if pattern == "1x4":
        mask[:, 4:8] = False
    for W in weights(torch.float32, WIDE).values():
        share = None if ":" in pattern else 0.5
        out = lobs.prune_weight(
            W, moment(WIDE), sparsity=share, method=method, pattern=pattern, mask=mask
        )
        assert not bool(out.mask[~mask].any())
        assert int((~out.mask).sum()) == (3 if pattern == "1:4" else 2) * R * WIDE // 4
        check_agreement(W, out.weight, out.mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0])
@pytest.mark.parametrize("share", SHARES)
def test_ties_go_to_the_lowest_row_then_column(share, value, method):
    if method == "admm" and value != 0:
        pytest.skip("equal weights do not stay equal: what was removed last time counts")
    W = torch.full((R, C), value)
    H = torch.eye(C, dtype=torch.float64)
    out = lobs.prune_weight(W, H, sparsity=share, method=method, scope="layer")
    count = documented(share, R * C)
    assert out.mask.reshape(-1).tolist() == [False] * count + [True] * (R * C - count)
    out = lobs.prune_weight(W, H, sparsity=share, method=method, scope="row")
    count = documented(share, C)
    assert out.mask.tolist() == [[False] * count + [True] * (C - count)] * R


@pytest.mark.parametrize(
    ("share", "of", "count"),
    [(0.5, 1, 0), (0.5, 3, 1), (0.5, 5, 2), (0.25, 6, 1), (0.75, 6, 4), (0.125, 4, 0)],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_half_a_weight_is_not_removed(share, of, count, scope):
    W = torch.arange(1.0, of + 1)[None]
    out = lobs.prune_weight(W, torch.eye(of), sparsity=share, method="magnitude", scope=scope)
    assert int((~out.mask).sum()) == count


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_0_leaves_a_bias_of_a_wider_dtype_unchanged(method, scope):
    """Half-precision weights often come with biases in full precision."""
    H = moment_with_ones()
    bias = torch.linspace(-1, 1, R, dtype=torch.float64).exp()
    for narrow in (torch.float16, torch.bfloat16, torch.float32):
        W = weights(narrow)["random"]
        for wide in (torch.float32, torch.float64):
            b = bias.to(wide)
            out = lobs.prune_weight(W, H, sparsity=0.0, method=method, scope=scope, bias=b)
            assert bits(out.bias) == bits(b)
            assert bits(out.weight) == bits(W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_second_pass_at_the_same_sparsity_removes_nothing_more(method, dtype):
    W = weights(dtype)["random"]
    once = lobs.prune_weight(W, moment(C), sparsity=0.5, method=method)
    twice = lobs.prune_weight(once.weight, moment(C), sparsity=0.5, method=method)
    assert torch.equal(once.mask, twice.mask)
    assert bits(once.weight) == bits(twice.weight)
    assert twice.error == 0


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A small layer and how to prune it, with zeros and ties, with and without bias and mask."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(DTYPES))
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -2.5, 0.0078125])
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    with_bias = draw(st.booleans())
    size = draw(st.sampled_from([b for b in range(1, columns + 1) if columns % b == 0]))
    drawn = {
        "weight": torch.tensor(flat, dtype=dtype).reshape(rows, columns),
        "hessian": moment(columns + with_bias, draw(st.integers(0, 3))),
        "sparsity": draw(st.floats(0, 1) | st.sampled_from(SHARES)),
        "method": draw(st.sampled_from(METHODS)),
        "scope": draw(st.sampled_from(SCOPES)),
        "damping": draw(st.sampled_from([1e-6, 0.01, 1.0])),
        "refine": draw(st.sampled_from([None, None, "solve", "exchange"])),
    }
    blocks = draw(st.booleans())
    if blocks:
        drawn["pattern"] = f"1x{size}"
        drawn["refine"] = None if drawn["refine"] == "exchange" else drawn["refine"]
    if with_bias:
        drawn["bias"] = torch.linspace(1, 2, rows).to(dtype)
        drawn["prune_bias"] = draw(st.booleans()) and not blocks
    if draw(st.booleans()):
        units = rows * columns // size if blocks else rows * columns
        kept = torch.tensor(draw(st.lists(st.booleans(), min_size=units, max_size=units)))
        if blocks:
            kept = kept.repeat_interleave(size)
        drawn["mask"] = kept.reshape(rows, columns)
    return drawn


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(layers())
def test_any_layer_loses_the_documented_number(layer):
    W, bias, mask = layer["weight"], layer.get("bias"), layer.get("mask")
    share, scope = layer["sparsity"], layer["scope"]
    unit = int(layer.get("pattern", "1x1").removeprefix("1x"))
    before = bits(W)
    candidates = (W.shape[1] + bool(layer.get("prune_bias"))) // unit
    row_count, layer_count = documented(share, candidates), documented(share, len(W) * candidates)
    if mask is not None:
        masked = ~mask[:, ::unit]
        if scope == "row":
            room = int(masked.sum(1).max()) <= row_count
        else:
            room = int(masked.sum()) <= layer_count
        if not room:
            with pytest.raises(ArgumentError, match="mask"):
                lobs.prune_weight(**layer)
            return
    out = lobs.prune_weight(**layer)
    assert bits(W) == before
    removed = removed_together(out)
    if scope == "row":
        # Swaps are within a row, so they keep this too.
        assert removed.sum(1).tolist() == [row_count * unit] * len(W)
    else:
        assert int(removed.sum()) == layer_count * unit
    assert out.sparsity == int(removed.sum()) / removed.numel()
    if not any("became zero when they were rounded" in note for note in out.notes):
        check_agreement(W, out.weight, out.mask)
    if share == 0:
        assert bits(out.weight) == bits(W)
    if mask is not None:
        assert not bool(out.mask[~mask].any())
    elif unit == 1 and layer["refine"] != "exchange":  # a swap may bring a zero back to life
        combined = torch.cat([W, bias[:, None]], 1) if layer.get("prune_bias") else W
        check_zeros_go_first(combined, removed, scope)
    assert bool(torch.isfinite(out.weight).all())
    assert math.isfinite(out.error)
    assert out.error >= 0
