"""Refinement of the kept weights: what exchanges gain, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import correlated, features, layer
from helpers.plain import damped_error, per_row
from helpers.tolerances import RELATIVE

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.solvers.settings import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(
    "target",
    [{"sparsity": 0.5}, {"sparsity": 0.8, "scope": "row"}, {"pattern": "2:4"}, {"pattern": "1:4"}],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_swapping_never_loses_more_and_keeps_the_counts(method, target, dtype):
    W, H = correlated(10, 32, 3)
    W = W.to(dtype)
    plain = lobs.prune_weight(W, H, method=method, **target)
    solved = lobs.prune_weight(W, H, method=method, refine="solve", **target)
    out = lobs.prune_weight(W, H, method=method, refine="exchange", **target)
    slack = 1 + 10 * RELATIVE[dtype]
    assert damped_error(W, out, H) <= damped_error(W, solved, H) * slack
    assert damped_error(W, out, H) <= damped_error(W, plain, H) * slack
    assert per_row(out) == per_row(plain)
    assert out.sparsity == plain.sparsity
    if "pattern" in target:
        keep, size = map(int, target["pattern"].split(":"))
        assert bool((out.mask.reshape(-1, size).sum(1) == keep).all())
    assert bool((out.weight[~out.mask] == 0).all())
    assert out.swaps >= int((out.mask & ~plain.mask).sum())
    assert (out.swaps == 0) == torch.equal(out.mask, plain.mask)
    if method == "magnitude":
        assert out.swaps > 0
        assert damped_error(W, out, H) < 0.95 * damped_error(W, solved, H)
    assert out.optimality < 30


def test_without_swapping_nothing_is_counted_as_a_swap():
    W, H = correlated(4, 16, 0)
    for refine in (None, "solve"):
        assert lobs.prune_weight(W, H, sparsity=0.5, refine=refine).swaps == 0


def test_weights_that_a_mask_removes_are_not_swapped_back():
    W, H = correlated(8, 16, 1)
    W[:, 3] = 20.0  # dear, so that a swap would pay
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 3] = False
    for target in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        out = lobs.prune_weight(W, H, mask=mask, refine="exchange", **target)
        assert not bool(out.mask[:, 3].any())
    free = lobs.prune_weight(W, H, sparsity=0.5, refine="exchange")
    assert bool(free.mask[:, 3].all())


def test_a_bias_is_swapped_only_where_it_may_be_pruned():
    W = layer(10, 15)[0]
    h = lobs.Hessian(15, bias=True).update(features(80, 15))
    b = torch.full((10,), 1e-3, dtype=F64)
    out = lobs.prune_weight(
        W, h, sparsity=0.5, bias=b, method="magnitude", refine="exchange", scope="row"
    )
    assert bool((out.bias != 0).all())
    assert per_row(out) == [7] * 10
    out = lobs.prune_weight(
        W,
        h,
        sparsity=0.5,
        bias=b,
        prune_bias=True,
        method="magnitude",
        refine="exchange",
        scope="row",
    )
    assert ((~out.mask).sum(1) + ~out.bias_mask).tolist() == [8] * 10
    assert torch.equal(out.bias == 0, ~out.bias_mask)


def test_refining_what_cannot_be_refined_is_refused():
    W, H = correlated(3, 12, 0)
    with pytest.raises(PatternError, match=r"refine: 'exchange' .*'1x4'"):
        lobs.prune_weight(W, H, sparsity=0.5, pattern="1x4", refine="exchange")
    with pytest.raises(ArgumentError, match="refine: 'best'; expected one of solve, exchange"):
        lobs.prune_weight(W, H, sparsity=0.5, refine="best")
    with pytest.raises(DtypeError, match="refine"):
        lobs.prune_weight(W, H, sparsity=0.5, refine=True)
