"""The repair of rows that all lose the same inputs, from few samples and from many."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import features
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers.kept_columns import regressed

C, R, GONE = 48, 20, 16
DAMPING = 0.01


def texts(rows: int, seed: int) -> Tensor:
    """(rows, C) float64: a few directions, noise of each input's own, and a mean."""
    mix = torch.randn(6, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    own = torch.randn(rows, C, generator=generator, dtype=torch.float64)
    return few @ mix / 6**0.5 + own + 0.2


def weights() -> Tensor:
    return torch.randn(R, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def lost_elsewhere(change: Tensor, x: Tensor, bias: Tensor | float = 0.0) -> float:
    return float((x @ change.T + bias).square().sum(1).mean())


@pytest.mark.parametrize("rows", [40, 100, 300, 1000])
def test_the_first_minimum_of_the_cross_validation_is_taken(rows):
    """By the definition: residuals of the rows themselves, freedom by eigenvalues."""
    x, lost = features(rows, C), weights()[:, :GONE]
    removed = torch.arange(C) < GONE
    gone, kept = x[:, removed], x[:, ~removed]
    y, values = gone @ lost.T, torch.linalg.eigvalsh(kept.T @ kept / rows)
    H = x.T @ x / rows
    shift = DAMPING * float(H.diagonal().mean())
    least, best = math.inf, (0, torch.empty(0))
    for step in range(9):
        s = shift * 10 ** (step / 2)
        ridge = kept.T @ kept / rows + s * torch.eye(C - GONE, dtype=x.dtype)
        change = torch.linalg.solve(ridge, kept.T @ y / rows).T
        part = 2 * float((values / (values + s)).sum()) / rows
        error = float((y - kept @ change.T).square().sum()) / rows
        score = math.inf if part >= 1 else error / (1 - part) ** 2
        if score >= least and least < math.inf:
            break
        least, best = score, (step, change)
    found = regressed(H, lost, removed, shift, rows)
    assert found is not None
    assert found.factor == pytest.approx(10 ** (best[0] / 2))
    assert torch.allclose(found.change, best[1], atol=1e-9)


@pytest.mark.parametrize(("kept", "shift"), [(1, 0.5), (8, 0.0)], ids=["one column", "no damping"])
def test_the_damping_asked_for_is_kept_where_more_means_nothing(kept, shift):
    x, removed = features(12, 9), torch.arange(9) >= kept
    H, lost = x.T @ x / 12, weights()[:, : 9 - kept]
    before = H.clone()
    found = regressed(H, lost, removed, shift, 12)
    assert found is not None
    assert found.factor == 1
    ridge = H[:kept, :kept] + shift * torch.eye(kept, dtype=H.dtype)
    expected = torch.linalg.solve(ridge, (lost @ H[kept:, :kept]).T).T
    assert torch.allclose(found.change, expected, atol=1e-9)
    assert torch.equal(H, before)


@pytest.mark.parametrize("rows", [24, 60, 100])
def test_from_few_samples_it_is_no_worse_on_others_than_a_bias_alone(rows):
    x, other, W = texts(rows, 3), texts(2000, 4), weights()
    hessian = lobs.Hessian(C).update(x)
    out = lobs.prune_weight(W, hessian, sparsity=GONE / C, pattern="columns", damping=DAMPING)
    gone = ~out.mask[0]
    repaired = lost_elsewhere(out.weight - W, other)
    bias_alone = lost_elsewhere(-W * gone, other, W[:, gone] @ x[:, gone].mean(0))
    H = hessian.matrix()
    plain = lobs.prune_weight(W, H, pattern="columns", mask=out.mask, damping=DAMPING)
    assert repaired <= bias_alone
    assert repaired < lost_elsewhere(plain.weight - W, other)
    assert out.damping > DAMPING
    assert any("damping" in note and "few rows" in note for note in out.notes)
    assert out.predicted is None  # the removals reckon with less damping
    assert out.optimality < 30


def test_from_many_samples_nothing_is_changed():
    W, x = weights(), texts(100 * C, 5)
    hessian = lobs.Hessian(C).update(x)
    H = hessian.matrix()
    out = lobs.prune_weight(W, hessian, sparsity=GONE / C, pattern="columns", damping=DAMPING)
    plain = lobs.prune_weight(W, H, sparsity=GONE / C, pattern="columns", damping=DAMPING)
    assert torch.equal(out.weight, plain.weight)
    assert out.damping == DAMPING
    assert out.notes == ()
    assert out.predicted == plain.predicted


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_other_choices_are_repaired_alike(method):
    W, hessian = weights(), lobs.Hessian(C).update(texts(60, 3))
    settings = {"sparsity": GONE / C, "pattern": "columns", "damping": DAMPING}
    chosen = lobs.prune_weight(W, hessian, method=method, refine="solve", **settings)
    masked = lobs.prune_weight(W, hessian, pattern="columns", mask=chosen.mask, damping=DAMPING)
    assert torch.allclose(chosen.weight, masked.weight, atol=1e-9)
    assert chosen.damping == masked.damping > DAMPING


def test_inputs_that_others_make_up_for_entirely_are_not_damped_more():
    x = features(60, C // 2)
    x = torch.cat([x, x @ features(C // 2, C // 2, 1)], 1)
    hessian = lobs.Hessian(C).update(x)
    out = lobs.prune_weight(weights(), hessian, sparsity=0.5, pattern="columns", damping=1e-9)
    assert out.relative_error < 1e-6


def test_a_search_for_an_error_reports_the_damping_of_the_removal_it_returns_to():
    W, hessian = weights(), lobs.Hessian(C).update(texts(60, 3))
    settings = {"pattern": "columns", "damping": DAMPING}
    aim = lobs.prune_weight(W, hessian, sparsity=GONE / C, **settings)
    for limit in (1.0 + 1e-6, 1.3, 0.7):
        out = lobs.prune_weight(W, hessian, max_error=limit * aim.error, **settings)
        masked = lobs.prune_weight(W, hessian, mask=out.mask, **settings)
        assert out.damping == masked.damping > DAMPING
        assert out.notes == masked.notes
        assert out.optimality < 30
