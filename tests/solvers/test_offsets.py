"""Second moments, and what corrected layers make up for, of inputs far from zero or of extreme
size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs


def rows(mean: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(600, 6, generator=generator, dtype=torch.float64) + mean).to(dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("mean", "dtype"),
    [(1e2, torch.float32), (1e4, torch.float32), (1e6, torch.float32), (1e2, torch.float16)],
)
def test_the_covariance_survives_a_mean_far_from_zero(mean, dtype, weighted):
    x = rows(mean, dtype)
    weights = (torch.arange(600) % 3 > 0).double() if weighted else torch.ones(600).double()
    H = lobs.Hessian(6, bias=True).update(x[:100], weights[:100]).update(x[100:], weights[100:])
    M = H.matrix()
    covariance = M[:6, :6] - M[:6, 6:] @ M[6:, :6]
    expected = torch.cov(x.double()[weights > 0].T, correction=0)
    # What is left is the rounding of float64 at the squares of the means.
    assert float((covariance - expected).abs().max()) < 1e-14 * mean**2


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_the_range_of_float32_count(scale):
    x = rows(0.0) * scale
    expected = x.double().T @ x.double() / 600
    found = lobs.Hessian(6).update(x).matrix()
    assert float((found - expected).norm()) < 1e-12 * float(expected.norm())


def test_padding_far_from_zero_does_not_count():
    x, weights = rows(0.0), torch.ones(600)
    weights[::2] = 0
    there = lobs.Hessian(6).update(x, weights).matrix()
    x[::2] = 1e30
    assert torch.equal(lobs.Hessian(6).update(x, weights).matrix(), there)


@pytest.mark.parametrize("inputs", ["dense", "corrected"])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_reported_errors_are_right_far_from_zero(mean, inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    dense, x = copy.deepcopy(model).double(), rows(mean)
    report = lobs.prune(model, [x], sparsity=0.5, inputs=inputs, progress=False)
    pruned = copy.deepcopy(model).double()
    with torch.no_grad():
        hidden = x.double()
        change = pruned[0](hidden) - dense[0](hidden)
    assert report.layers[0].error == pytest.approx(float(change.square().sum()) / 600, rel=1e-5)
