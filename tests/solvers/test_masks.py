"""Masks and existing zeros: they are removed first, and count."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import correlated, features, layer
from helpers.plain import damped, least_squares
from helpers.tolerances import distance

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.solvers.settings import METHODS, SCOPES

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
INVERTING = ("exact", "admm", "sweep", "lobs")


@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_without_a_target_is_removed_and_nothing_else(method, scope, share):
    W, H = correlated(7, 40, 2)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(7, 40, generator=generator) > share
    mask[0] = True
    mask[1] = False
    out = lobs.prune_weight(W, H, mask=mask, method=method, scope=scope)
    assert torch.equal(out.mask, mask)
    assert out.sparsity == int((~mask).sum()) / mask.numel()
    assert torch.equal(out.weight != 0, mask)
    if method not in INVERTING:
        assert torch.equal(out.weight[mask], W[mask])
    if method == "exact":
        for r in range(7):
            best = least_squares(W[r], damped(H, 0.01), ~mask[r])
            assert distance(out.weight[r], best) < 1e-10
    assert torch.equal(out.weight[0], W[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_blocks_without_a_target(method):
    W, H = correlated(7, 40, 2)
    mask = (torch.rand(7, 10, generator=torch.Generator().manual_seed(6)) > 0.5).repeat_interleave(
        4, 1
    )
    out = lobs.prune_weight(W, H, mask=mask, method=method, pattern="1x4")
    assert torch.equal(out.mask, mask)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_with_a_bias_and_no_target(method):
    W = layer(6, 15)[0]
    h = lobs.Hessian(15, bias=True).update(features(80, 15))
    mask = torch.rand(6, 15, generator=torch.Generator().manual_seed(6)) > 0.5
    b = torch.ones(6, dtype=F64)
    for prune_bias in (False, True):
        out = lobs.prune_weight(W, h, mask=mask, method=method, bias=b, prune_bias=prune_bias)
        assert torch.equal(out.mask, mask)
        assert bool((out.bias != 0).all())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_layer_can_be_pruned_further(method, scope):
    """Removed weights stay removed and count, by their zeros or by a mask."""
    W, H = correlated(12, 40, 4)
    once = lobs.prune_weight(W, H, sparsity=0.3, method=method, scope=scope)
    for mask in (None, once.mask):
        more = lobs.prune_weight(
            once.weight, H, sparsity=0.6, method=method, scope=scope, mask=mask
        )
        assert not bool((more.mask & ~once.mask).any())
        assert more.sparsity == 0.6
        assert int((more.weight == 0).sum()) == 288


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_existing_zeros_count_in_rows_longer_than_a_block_of_the_sweep(method, scope):
    W, H = correlated(4, 300, 5)
    W[:, 200:] = 0.0  # all in the last block of columns
    out = lobs.prune_weight(W, H, sparsity=0.4, method=method, scope=scope)
    assert int((~out.mask).sum()) == 480
    assert int((out.weight == 0).sum()) == 480


@pytest.mark.parametrize("method", ["exact", "lobs", "magnitude", "wanda"])
def test_existing_zeros_are_removed_first_wherever_they_are(method):
    W, H = correlated(4, 300, 5)
    W[:, 200:] = 0.0
    out = lobs.prune_weight(W, H, sparsity=0.5, method=method)
    assert not bool(out.mask[:, 200:].any())
    assert int((~out.mask).sum()) == 600


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_a_pattern_cannot_hold_is_refused(method):
    W, H = correlated(3, 12, 0)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 4:7] = False
    with pytest.raises(ArgumentError, match=r"mask: it removes 3 of 4 .*'2:4'"):
        lobs.prune_weight(W, H, pattern="2:4", mask=mask, method=method)
    with pytest.raises(ArgumentError, match="mask: it does not consist of whole 1x4 blocks"):
        lobs.prune_weight(W, H, pattern="1x4", sparsity=0.5, mask=mask, method=method)
