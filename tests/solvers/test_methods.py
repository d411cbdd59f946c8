"""What every method promises of its result: optimal for its mask, which method loses least, what
must not matter, and what is noted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.cases import conditioned, correlated, features, layer
from helpers.plain import (
    damped,
    damped_error,
    error_of,
    least_squares,
    mask_of,
    merged,
    per_row,
    traced,
)
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import (
    ArgumentError,
    NotPositiveDefiniteError,
    PatternError,
)
from lobs_native.solvers import result
from lobs_native.solvers.settings import METHODS, REFINES, SCOPES

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
INVERTING = ("exact", "admm", "sweep", "lobs")
# How far to go, in every way that fits all methods.
TARGETS: list[dict[str, Any]] = [
    *({"sparsity": s, "scope": scope} for s in (0, 0.1, 0.5, 0.9, 0.99, 1) for scope in SCOPES),
    *({"pattern": p} for p in ("1:2", "2:4", "4:8", "1:4")),
    {"pattern": "1x4", "sparsity": 0.5},
]


# ---- optimal for their mask ----------------------------------------------------------------------


def optimality(W: Tensor, out: lobs.PrunedWeight, H: Tensor) -> tuple[float, float]:
    """Worst row's ||(dW H) on kept|| / (C eps ||dW|| ||H||), with the damped H.

    And the same if the rounding of the kept weights to their type, which is all that is left of a
    row that hardly changes, is taken off.
    """
    change = out.weight.double() - W.double()
    H = damped(H, out.damping)
    gradient = (change @ H).masked_fill(~out.mask, 0.0).norm(dim=1)
    unit = float(torch.linalg.matrix_norm(H, 2)) * torch.finfo(W.dtype).eps
    size = change.norm(dim=1) * H.shape[0] * unit
    stored = out.weight.double().norm(dim=1) * unit / 2
    ratios = torch.where(size > 0, gradient / size, 0.0)
    solved = torch.where(size > 0, (gradient - stored) / size, 0.0)
    return float(ratios.max()), float(solved.max())


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
def test_exact_leaves_the_best_weights_for_its_mask(condition, damping, dtype):
    """A ratio below 30, LAPACK's threshold, without refining; below 1 with it."""
    worst = {None: 0.0, "solve": 0.0}
    for C, seed in ((64, 0), (32, 4), (32, 5)):
        H = conditioned(C, condition, seed)
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(8, C, generator=generator, dtype=F64).to(dtype)
        for target in TARGETS:
            for refine in worst:
                out = lobs.prune_weight(W, H, damping=damping, refine=refine, **target)
                ratio, solved = optimality(W, out, H)
                # The norm in it is an estimate from below, and the gradient here is rounded itself.
                assert 0.9 * ratio - 0.02 < out.optimality < 1.25 * ratio + 0.02
                assert out.damping == damping
                worst[refine] = max(worst[refine], ratio if refine is None else solved)
    print(f"worst ratio {worst[None]:.3g}, refined {worst['solve']:.3g}")
    assert worst[None] < 30
    assert worst["solve"] < 1


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_solving_gives_any_method_the_best_weights_for_its_mask(method, target):
    W, H = correlated(6, 32, 0)
    plain = lobs.prune_weight(W, H, method=method, **target)
    out = lobs.prune_weight(W, H, method=method, refine="solve", **target)
    assert torch.equal(out.mask, plain.mask)
    best = torch.stack(
        [least_squares(w, damped(H, 0.01), ~kept) for w, kept in zip(W, out.mask, strict=True)]
    )
    assert distance(out.weight, best) < 1e-10
    assert damped_error(W, out, H) <= damped_error(W, plain, H) * (1 + 1e-10)
    assert out.optimality < 1
    assert (out.damping, out.swaps) == (0.01, 0)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_optimality_ratio_shows_missing_repair(method):
    W, H = correlated(6, 32, 0)
    assert lobs.prune_weight(W, H, sparsity=0.5, method=method).optimality > 1e6
    assert lobs.prune_weight(W, H, sparsity=0.0, method=method).optimality == 0


def test_exact_is_solved_again_where_float32_was_not_enough(monkeypatch):
    """With a threshold that anything exceeds."""
    W, H = correlated(6, 32, 0)
    W = W.float()
    plain = lobs.prune_weight(W, H, sparsity=0.5)
    assert plain.notes == ()
    monkeypatch.setattr(result, "OPTIMAL", 0.0)
    again = lobs.prune_weight(W, H, sparsity=0.5)
    assert torch.equal(again.mask, plain.mask)
    assert any("solved for again in float64" in note for note in again.notes)
    solved = lobs.prune_weight(W, H, sparsity=0.5, method="exact", refine="solve")
    assert torch.equal(again.weight, solved.weight)


# ---- which loses least ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.7},
        {"sparsity": 0.5, "scope": "row"},
        {"pattern": "2:4"},
        {"pattern": "1x4", "sparsity": 0.5},
    ],
    ids=str,
)
def test_exact_loses_less_than_a_sweep_and_a_sweep_less_than_ranking_once(target):
    """Geometric means over correlated layers; exact never loses to magnitude or Wanda."""
    mean = dict.fromkeys(METHODS, 0.0)
    for seed in range(6):
        W, H = correlated(24, 64, seed)
        error = {m: lobs.prune_weight(W, H, method=m, **target).error for m in METHODS}
        assert error["exact"] < min(error["wanda"], error["magnitude"])
        for method in METHODS:
            mean[method] += math.log(error[method]) / 6
    print({m: f"{math.exp(mean[m] - mean['exact']):.2f}" for m in METHODS})
    assert mean["exact"] < mean["sweep"] < mean["lobs"]
    assert mean["lobs"] < mean["wanda"] < mean["magnitude"]


# ---- a whole layer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> tuple[Tensor, Tensor, list[Any]]:
    """768 rows whose scales differ by a factor of a million, and each of them traced."""
    W, H = correlated(768, 48, 7)
    W *= 10 ** (6 * torch.rand(768, 1, generator=torch.Generator().manual_seed(8), dtype=F64) - 3)
    return W, H, traced(W, damped(H, 0.01))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.7, 0.85, 0.99])
def test_sampling_rows_to_plan_the_trace_does_not_change_the_choice(large, share):
    W, H, rows = large
    out = lobs.prune_weight(W, H, sparsity=share)
    count = math.ceil(share * W.numel() - 0.5)
    assert torch.equal(out.mask, mask_of(rows, merged(rows, count), 48))


def test_no_row_is_traced_much_further_than_it_loses(large, monkeypatch):
    """Half of the removals of an even layer: about half of all are traced, and a sample again."""
    W, H, _ = large
    W = W / W.norm(dim=1, keepdim=True)
    traced_to = 0

    def counted(*arguments: Any, **options: Any) -> ops.Trace:
        nonlocal traced_to
        found = whole(*arguments, **options)
        traced_to += int(found.count.sum())
        return found

    whole = ops.exact_trace
    monkeypatch.setattr(ops, "exact_trace", counted)
    lobs.prune_weight(W, H, sparsity=0.5)
    assert 0.5 * W.numel() < traced_to < 0.62 * W.numel()


def test_masked_rows_do_not_mislead_the_sample():
    """Many rows lose more to the mask than the average row loses in all."""
    W, H = correlated(200, 32, 0)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(200, 32, dtype=torch.bool)
        mask[torch.randperm(200, generator=generator)[:120], :14] = False
        out = lobs.prune_weight(W, H, sparsity=0.27, mask=mask)
        assert not bool(out.mask[~mask].any())
        assert int((~out.mask).sum()) == 1728


def test_float32_goes_as_far_as_float64_over_a_whole_layer(large):
    W, H, _ = large
    for share in (0.3, 0.7):
        narrow = lobs.prune_weight(W.float(), H, sparsity=share)
        wide = lobs.prune_weight(W.float().double(), H, sparsity=share)
        assert int((narrow.mask != wide.mask).sum()) <= 4  # near ties
        assert narrow.error == pytest.approx(wide.error, rel=1e-4)
        assert narrow.sparsity == wide.sparsity


# ---- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_rows_does_not_matter(method, scope):
    W, H = correlated(90, 32, 9)
    W = W.float()
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    plain = lobs.prune_weight(W, H, sparsity=0.6, method=method, scope=scope)
    other = lobs.prune_weight(W[shuffled], H, sparsity=0.6, method=method, scope=scope)
    assert torch.equal(other.mask, plain.mask[shuffled])
    assert distance(other.weight, plain.weight[shuffled]) < 1e-6  # torch's products block by rows


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["exact", "lobs", "wanda", "magnitude"])
def test_the_order_of_the_columns_does_not_matter(method, scope):
    """For all but the sweep, which goes from left to right."""
    W, H = correlated(20, 32, 9)
    p = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    plain = lobs.prune_weight(W, H, sparsity=0.6, method=method, scope=scope)
    other = lobs.prune_weight(W[:, p], H[p][:, p], sparsity=0.6, method=method, scope=scope)
    assert torch.equal(other.mask, plain.mask[:, p])
    assert distance(other.weight, plain.weight[:, p]) < 1e-10
    assert other.error == pytest.approx(plain.error, rel=1e-10)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "admm"])
def test_an_extra_column_of_zeros_changes_nothing_but_the_count(method):
    """For all but "admm", whose penalty is a mean over the columns."""
    W, H = correlated(10, 24, 9)
    wide = torch.nn.functional.pad(W, (0, 1))
    mean = float(H.diagonal().mean())
    more = torch.block_diag(H, torch.tensor([[mean]], dtype=F64))  # so that the damping stays
    plain = lobs.prune_weight(W, H, sparsity=0.5, method=method)
    other = lobs.prune_weight(wide, more, sparsity=(120 + 10) / 250, method=method)
    assert torch.equal(other.mask[:, :24], plain.mask)
    assert not bool(other.mask[:, 24].any())
    assert distance(other.weight[:, :24], plain.weight) < 1e-10


@pytest.mark.parametrize("exponent", [-900, -600, -300, 300, 600, 900])
def test_the_optimality_ratio_does_not_depend_on_the_scale(exponent):
    W, H = correlated(6, 24, 9)
    plain = lobs.prune_weight(W, H, sparsity=0.5)
    other = lobs.prune_weight(W, H * 2.0**exponent, sparsity=0.5)
    assert other.optimality == pytest.approx(plain.optimality, rel=1e-6)
    assert plain.optimality > 0
    assert other.notes == ()


# ---- notes on what is done differently -----------------------------------------------------------


def test_rows_that_fail_in_float32_are_redone_in_float64_with_a_note():
    """Two equal inputs carry the whole signal: after the first is removed, a millionth is left of
    the second pivot. In the last row they are so expensive that both stay."""
    C = 600
    x = torch.zeros(2, C, dtype=F64)
    x[:, 0] = x[:, 1] = 1.3
    H = x.T @ x / 2 + 1e-9 * torch.eye(C, dtype=F64)
    W = torch.randn(3, C, generator=torch.Generator().manual_seed(0), dtype=F64)
    W[:2, 0], W[:2, 1], W[2, :2] = 1.0, -1.0 + 1e-4, 1e3
    narrow = W.float()
    share = (C - 2) / C
    options = {"sparsity": share, "scope": "row", "damping": 1e-4, "method": "exact"}
    out = lobs.prune_weight(narrow, H, **options)
    assert any("2 rows were redone in float64" in note for note in out.notes), out.notes
    wide = lobs.prune_weight(narrow.double(), H, **options)
    assert wide.notes == ()
    assert out.error == pytest.approx(wide.error, rel=1e-4)
    assert per_row(out) == [C - 2] * 3
    assert torch.equal(out.mask, wide.mask)
    assert bool(out.mask[2, :2].all())
    assert not bool(out.mask[:2, :2].any())


@pytest.mark.parametrize("method", INVERTING)
def test_a_raised_damping_is_in_the_result_of_every_method(method):
    H = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    H[0, 1] = H[1, 0] = math.sqrt(2.0) * 1.05  # slightly indefinite
    W = torch.randn(2, 3)
    for refine in (None, *REFINES):
        out = lobs.prune_weight(W, H, sparsity=0.5, method=method, refine=refine)
        assert (out.status, out.damping) == ("damping raised", 0.1)
        assert any("0.01" in note and "0.1" in note for note in out.notes)
    H[0, 1] = H[1, 0] = 30.0
    with pytest.raises(NotPositiveDefiniteError, match="hessian"):
        lobs.prune_weight(W, H, sparsity=0.5, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_inverts_nothing_has_no_damping_unless_refined(method):
    W, H = correlated(3, 16, 0)
    plain = lobs.prune_weight(W, H, sparsity=0.5, method=method, damping=0.02)
    assert plain.damping == (0.02 if method in INVERTING else 0.0)
    assert plain.method == method
    for refine in REFINES:
        out = lobs.prune_weight(W, H, sparsity=0.5, method=method, damping=0.02, refine=refine)
        assert out.damping == 0.02


def test_memory_for_one_thread_is_enough_and_less_is_an_error():
    W, H = correlated(6, 100, 0)
    needed = ops.exact_bytes(100, F64)
    plain = lobs.prune_weight(W, H, sparsity=0.5)
    tight = lobs.prune_weight(W, H, sparsity=0.5, memory=needed)
    assert torch.equal(plain.weight, tight.weight)
    with pytest.raises(MemoryError, match=r"memory: one thread needs \d+ bytes"):
        lobs.prune_weight(W, H, sparsity=0.5, memory=1000)
    for method in ("sweep", "lobs", "wanda", "magnitude"):
        lobs.prune_weight(W, H, sparsity=0.5, memory=1000, method=method)  # needs no such scratch


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:5", "4:8", "1x8", "1x64"])
def test_a_pattern_that_does_not_divide_the_rows_is_refused(pattern, method):
    W, H = correlated(3, 12, 0)
    with pytest.raises(PatternError, match=rf"pattern: '{pattern}' does not divide rows of 12"):
        lobs.prune_weight(W, H, sparsity=None if ":" in pattern else 0.5, pattern=pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bias_is_outside_of_patterns_but_is_repaired(method, pattern):
    W = layer(6, 16)[0]
    h = lobs.Hessian(16, bias=True).update(features(80, 16))
    b = torch.ones(6, dtype=F64)
    options: dict[str, Any] = {"pattern": pattern, "method": method, "bias": b}
    if pattern == "1x4":
        options["sparsity"] = 0.5
    with pytest.raises(ArgumentError, match="prune_bias"):
        lobs.prune_weight(W, h, prune_bias=True, **options)
    out = lobs.prune_weight(W, h, **options)
    assert int((~out.mask).sum()) == 48
    assert torch.equal(out.bias, b) == (method not in INVERTING)
    change = torch.cat([out.weight - W, (out.bias - b)[:, None]], 1)
    assert out.error == pytest.approx(error_of(change, h.matrix()), rel=1e-10)
    if method == "exact":
        whole = torch.cat([W, b[:, None]], 1)
        for r in range(6):
            removed = torch.cat([~out.mask[r], torch.zeros(1, dtype=torch.bool)])
            best = least_squares(whole[r], damped(h.matrix(), 0.01), removed)
            assert distance(torch.cat([out.weight[r], out.bias[r : r + 1]]), best) < 1e-10


def test_a_target_that_contradicts_a_pattern_is_refused():
    W, H = correlated(3, 12, 0)
    plain = lobs.prune_weight(W, H, pattern="1:4")
    same = lobs.prune_weight(W, H, pattern="1:4", sparsity=0.75)
    assert torch.equal(plain.weight, same.weight)
    for wrong in ({"sparsity": 0.5}, {"max_error": 1.0}, {"threshold": 1.0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            lobs.prune_weight(W, H, pattern="1:4", method="lobs", **wrong)
    with pytest.raises(ArgumentError, match="threshold"):
        lobs.prune_weight(W, H, pattern="1x4", method="lobs", threshold=1.0)
