"""Sweeps by second moments of few samples: the same results from far fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import conditioned, features
from helpers.plain import damped
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers import problem, sweep
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.inversion import invert
from lobs_native.solvers.low_rank import FewSamples, few_samples
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
R, C, N = 24, 520, 40


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def inputs(seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """(N, C) with a dead column and one that is far from zero."""
    x = features(N, C, seed)
    x[:, 3] = 0
    x[:, 100] += 30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e9])
def test_the_inverse_is_that_of_a_factorisation(dtype, scale):
    H = lobs.Hessian(C).update(inputs(dtype=dtype)).matrix() * scale
    found, expected = few_samples(H, 0.01, N), invert(H, 0.01, "H")
    assert found is not None
    assert found.V.shape == (N, C)
    assert (found.scale, found.damping, found.raised) == (expected.scale, 0.01, False)
    exact = 1e-9 if dtype == F64 else 1e-3
    b = torch.randn(C, 3, dtype=F64)
    assert distance(found.times(b), expected.times(b)) < exact
    least = float(torch.linalg.eigvalsh(damped(H / found.scale, 0.01))[0])
    assert found.norm() == pytest.approx(1 / least, rel=exact)
    assert distance(found.U, expected.U) == 0  # these come from H
    assert distance(found.A, expected.A) == 0
    assert distance(found.diagonal(), expected.diagonal()) < 1e-12


@pytest.mark.parametrize("samples", [1, 2, 50, 64])
@pytest.mark.parametrize("mean", [0.0, 0.4, 2.0])
def test_the_rounding_of_a_float32_moment_does_not_hide_its_rank(samples, mean):
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 20, generator=generator) @ torch.randn(20, C, generator=generator)
    x = (x + torch.randn(samples, C, generator=generator)).relu() + mean
    h = lobs.Hessian(C).update(x)
    found, expected = few_samples(h.matrix(), 0.01, h.rows), invert(h.matrix(), 0.01, "H")
    assert found is not None
    assert len(found.V) <= samples + 2
    b = torch.randn(C, 3, dtype=F64)
    assert distance(found.times(b), expected.times(b)) < 1e-3


def test_a_moment_that_does_not_have_so_few_samples_has_no_such_inverse():
    H = moment(inputs())
    assert few_samples(H, 0.01, C / 8) is None  # enough of them
    assert few_samples(H, 0.0, N) is None
    assert few_samples(0 * H, 0.01, N) is None
    assert few_samples(moment(features(700, C)), 0.01, N) is None  # another rank
    assert few_samples(conditioned(C, 10.0), 0.01, N) is None
    negative = H.clone()
    negative[5, 6] = negative[6, 5] = float(H[5, 5] * 3)
    assert few_samples(negative, 0.01, N) is None


@pytest.fixture
def used(monkeypatch):
    """The ranks by which layers were swept."""
    ranks: list[int] = []
    made = sweep.LowRankSweep

    def observed(inverse: FewSamples, W: Tensor) -> sweep.LowRankSweep:
        ranks.append(len(inverse.V))
        return made(inverse, W)

    monkeypatch.setattr(sweep, "LowRankSweep", observed)
    return ranks


WAYS: dict[str, dict[str, Any]] = {
    "layer": {"sparsity": 0.5},
    "row": {"sparsity": 0.7, "scope": "row"},
    "2:4": {"pattern": "2:4"},
    "blocks": {"sparsity": 0.5, "pattern": "1x4"},
    "an error": {"max_error": 0.3},
    "bias": {"sparsity": 0.5, "bias": torch.ones(R)},
    "pruned bias": {"sparsity": 0.9, "bias": torch.full((R,), 0.01), "prune_bias": True},
    "mask": {"sparsity": 0.5, "mask": torch.arange(R * C).view(R, C) % 5 > 0},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_sweep_is_that_of_the_whole_factor(way, used, monkeypatch):
    h = lobs.Hessian(C, bias="bias" in way).update(inputs())
    W = torch.randn(R, C, generator=torch.Generator().manual_seed(0))
    W[:, 200:300:7] = 0
    found = lobs.prune_weight(W, h, method="sweep", **way)
    assert used
    assert set(used) <= {N, N + 1}  # with a bias, a column more
    monkeypatch.setattr(problem, "_WIDE", 2 * C)
    used.clear()
    whole = lobs.prune_weight(W, h, method="sweep", **way)
    assert used == []
    assert torch.equal(found.mask, whole.mask)
    assert distance(found.weight, whole.weight) < 1e-4
    if found.bias is not None:
        assert distance(found.bias, whole.bias) < 1e-4
    assert found.error == pytest.approx(whole.error, rel=1e-4)
    assert found.predicted == pytest.approx(whole.predicted, rel=1e-4)
    assert found.condition == pytest.approx(whole.condition, rel=0.5)
    assert found.notes == whole.notes


def test_groups_and_a_drift_are_swept_the_same_way(used, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = [inputs(seed) * (1 + 9 * seed) for seed in range(2)]
    W = torch.randn(2, R, C, generator=generator)
    left = [0.3 * features(N, R, seed=7 + g) for g in range(2)]
    pull = [a.T @ b / N for a, b in zip(x, left, strict=True)]
    drift = Drift(pull, sum(float(b.square().sum()) for b in left) / N, 1.0)
    settings = LayerSettings(sparsity=0.5, method="sweep")
    moments = [moment(a) for a in x]
    found = prune_groups(W, moments, settings, drift=drift, samples=[N, N])
    assert used == [N, N]
    whole = prune_groups(W, moments, settings, drift=drift)
    assert used == [N, N]
    assert torch.equal(found.mask, whole.mask)
    assert distance(found.weight, whole.weight) < 1e-4
    assert found.error == pytest.approx(whole.error, rel=1e-4)


def test_it_is_used_where_the_number_of_samples_is_known_and_float32_suffices(used):
    h, W = lobs.Hessian(C).update(inputs()), torch.randn(R, C)

    def ranks(W: Tensor, hessian: Any, **options: Any) -> list[int]:
        used.clear()
        lobs.prune_weight(W, hessian, method="sweep", sparsity=0.5, **options)
        return list(used)

    assert ranks(W, h) == [N]
    assert ranks(W.bfloat16(), h) == [N]
    assert ranks(W, h.matrix()) == []
    assert ranks(W.double(), h) == []
    assert ranks(W, h, damping=1e-5) == []
    assert ranks(W, h, refine="solve") == [N]


def test_it_has_the_same_bits_for_any_number_of_threads(used):
    h, W = lobs.Hessian(C).update(inputs()), torch.randn(R, C)
    before, seen = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = lobs.prune_weight(W, h, method="sweep", sparsity=0.5)
        seen.add((out.weight.numpy().tobytes(), out.predicted))
    torch.set_num_threads(before)
    assert len(seen) == 1
    assert used == [N] * 4
