"""Factors of inverse second moments in float32: where they are used, and what they lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import conditioned, features
from helpers.plain import damped
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers.inversion import Inverse, invert
from lobs_native.solvers.problem import Drift, Problem
from lobs_native.solvers.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
C = 520


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def identity_of(inverse: Inverse, H: Tensor) -> Tensor:
    """U (H / scale + shift) U^T in float64."""
    U = inverse.U.double()
    identity: Tensor = U @ (damped(H, inverse.damping) / inverse.scale) @ U.T
    return identity


@pytest.mark.parametrize(
    "H",
    [
        moment(features(700, C)),
        moment(features(60, C)),
        moment(features(700, C) + 3),
        conditioned(C, 1e5),
    ],
    ids=["features", "few samples", "means", "1e5"],
)
def test_a_factor_in_float32_has_three_digits(H):
    inverse = invert(H, 0.01, "H", dtype=F32)
    assert inverse.U.dtype == F32
    assert torch.equal(inverse.U, inverse.U.triu())
    identity = torch.eye(C, dtype=F64)
    assert float((identity_of(inverse, H) - identity).norm()) / C**0.5 < 1e-3
    wide = invert(H, 0.01, "H")
    assert inverse.norm() == pytest.approx(wide.norm(), rel=1e-2)
    pull = torch.randn(C, 3, dtype=F64)
    for narrow in (inverse, invert(H, 0.01, "H", dtype=F32)):  # what is asked for first
        assert distance(narrow.times(pull), wide.times(pull)) < 1e-12
        assert distance(narrow.diagonal(), wide.diagonal()) < 1e-12
    assert distance(invert(H, 0.01, "H", dtype=F32).A, wide.A) < 1e-12


def test_where_cholesky_fails_in_float32_the_same_damping_is_tried_in_float64():
    H = conditioned(64, 1e12)
    inverse = invert(H, 0.0, "H", dtype=F32)
    assert inverse.U.dtype == F64
    assert not inverse.raised


def test_a_float32_factor_that_was_released_is_computed_again():
    inverse = invert(moment(features(700, C)), 0.01, "H", dtype=F32)
    norm = inverse.norm()
    kept = inverse.U.clone()
    inverse.release()
    assert inverse.norm() == norm
    assert distance(inverse.U, kept) < 1e-3


def problem(W: Tensor, H: Tensor, **changes: Any) -> Problem:
    options = {
        "damping": 0.01,
        "inverted": True,
        "factor_alone": True,
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
        return problem(*arguments, **changes).inverses[0].U.dtype

    assert kind(W, H) == F32
    assert kind(W.double(), H) == F64
    assert kind(W, H, factor_alone=False) == F64
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
