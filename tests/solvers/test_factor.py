"""Factors of second moments, which serve sweeps: where float32 is used, and what it loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import conditioned, features
from helpers.plain import damped
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.factor import Factored, factor
from lobs_native.solvers.inversion import invert
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
C = 520


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def identity_of(inverse: Factored, H: Tensor) -> Tensor:
    """G^-1 (H / scale + shift) G^-T in float64."""
    U = torch.linalg.inv(inverse.G.double())
    identity: Tensor = U @ (damped(H, inverse.damping) / inverse.scale) @ U.T
    return identity


MOMENTS = {
    "features": moment(features(700, C)),
    "few samples": moment(features(60, C)),
    "means": moment(features(700, C) + 3),
    "1e5": conditioned(C, 1e5),
}


@pytest.mark.parametrize("H", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-9), (F32, 1e-3)], ids=str)
def test_a_factor_belongs_to_the_damped_moment(H, dtype, bound):
    """In float32 it has three digits; whatever else is asked for is computed in float64."""
    inverse, wide = factor(H, 0.01, "H", dtype=dtype), invert(H, 0.01, "H")
    assert inverse.G.dtype == dtype
    assert torch.equal(inverse.G, inverse.G.triu())
    assert (inverse.scale, inverse.damping, inverse.raised) == (wide.scale, 0.01, False)
    identity = torch.eye(C, dtype=F64)
    assert float((identity_of(inverse, H) - identity).norm()) / C**0.5 < bound
    assert inverse.norm() == pytest.approx(wide.norm(), rel=1e-2)
    b = torch.randn(C, 3, dtype=F64)
    given = b.clone()
    assert distance(inverse.times(b), wide.times(b)) < 1e-10
    assert torch.equal(b, given)
    assert distance(inverse.U, wide.U) < 1e-12
    assert distance(inverse.diagonal(), wide.diagonal()) < 1e-12
    assert distance(inverse.A, wide.A) < 1e-12
    assert distance(wide.factor(), factor(H, 0.01, "H").G) == 0
    assert distance(inverse.factor(), inverse.G) == 0


@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 511, 600])
def test_factors_of_any_order_solve_what_torch_solves(columns):
    x = features(columns + 50, columns)
    H = moment(x)
    found = factor(H, 0.01, "H")
    A = torch.linalg.inv(damped(H, 0.01) / found.scale)
    b = torch.randn(columns, 3, dtype=F64)
    assert distance(found.times(b), A @ b) < 1e-10
    assert distance(found.G @ found.G.T, damped(H, 0.01) / found.scale) < 1e-12


def test_where_cholesky_fails_in_float32_the_same_damping_is_tried_in_float64():
    H = conditioned(64, 1e12)
    inverse = factor(H, 0.0, "H", dtype=F32)
    assert inverse.G.dtype == F64
    assert not inverse.raised


def test_factors_climb_the_ladder_as_inverses_do():
    H = torch.eye(300, dtype=F64)
    H[270, 270] = -0.05
    found = factor(H, 0.01, "H")
    assert (found.damping, found.raised) == (0.1, True)
    with pytest.raises(lobs.NotPositiveDefiniteError, match="damping 0;"):
        factor(H, 0.0, "H")
    nothing = factor(0 * H, 0.01, "H")
    assert torch.equal(nothing.G, torch.eye(300, dtype=F64))
    assert nothing.norm() == pytest.approx(1.0)


def problem(W: Tensor, H: Tensor, **changes: Any) -> Problem:
    options = {
        "damping": 0.01,
        "inverted": True,
        "factor_alone": True,
        "narrow": True,
        "prune_bias": False,
        "mask": None,
        "workspace": Workspace("cpu"),
        **changes,
    }
    return Problem.of(W[None], None, [H], **options)


def test_float32_is_taken_only_where_it_suffices():
    H, W = moment(features(700, C)), torch.randn(8, C)
    drift = Drift([torch.zeros(C, 8, dtype=F64)], 0.0, 1.0)
    far = moment(features(700, C) + 100)

    def kind(*arguments: Tensor, **changes: Any) -> torch.dtype:
        return problem(*arguments, **changes).inverses[0].factor().dtype

    assert kind(W, H) == F32
    assert kind(W.double(), H) == F64
    assert kind(W, H, factor_alone=False) == F64
    assert kind(W, H, narrow=False) == F64
    assert kind(W, H, damping=1e-5) == F64
    assert kind(W, H, drift=drift) == F64
    assert kind(W, far, damping=1e-3) == F64  # the condition
    assert kind(W[:, :500], H[:500, :500]) == F64  # it would save nothing


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_sweep_by_a_float32_factor_loses_what_one_by_float64_loses(target, monkeypatch):
    H, W = moment(features(700, C) + 1), torch.randn(140, C)
    found = lobs.prune_weight(W, H, method="sweep", **target)
    monkeypatch.setattr("lobs_native.solvers.problem._WIDE", C + 1)
    wide = lobs.prune_weight(W, H, method="sweep", **target)
    assert found.error == pytest.approx(wide.error, rel=1e-3)
    assert int((found.mask != wide.mask).sum()) <= 1e-3 * W.numel()
    assert found.predicted == pytest.approx(wide.predicted, rel=1e-3)
    assert found.predicted * (1 + 1e-4) >= found.error
    assert found.condition == pytest.approx(wide.condition, rel=1e-2)


def test_a_sweep_has_the_same_bits_for_any_number_of_threads():
    H, W = moment(features(700, C)), torch.randn(40, C)
    before, seen = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
        seen.add((out.weight.numpy().tobytes(), out.predicted, out.condition))
    torch.set_num_threads(before)
    assert len(seen) == 1
