"""Theorem 3.2: bounds that hold where it applies, and the reasons where it does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.network.bound import NotAChainError, chain_of, theorem_parts


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    steps: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        steps += [nn.Linear(a, b), activation()]
    return nn.Sequential(*steps[:-1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("method", ["lobs", "magnitude"])
def test_measured_is_below_spectral_is_below_frobenius(seed, inputs, method):
    torch.manual_seed(seed)
    model = mlp(12, 20, 16, 8, 5, activation=(nn.ReLU, nn.Tanh, nn.ELU)[seed % 3]).double()
    data = [torch.randn(40, 12, dtype=torch.float64) for _ in range(3)]
    report = lobs.prune(
        model, data, sparsity=0.3 + 0.1 * seed, method=method, inputs=inputs, progress=False
    )
    b = report.error_bound
    assert b.covered
    assert None not in (b.measured, b.spectral, b.frobenius)
    assert 0 < b.measured <= b.spectral <= b.frobenius


def test_the_bound_of_one_layer_is_exactly_its_error():
    model = mlp(10, 6).double()
    report = lobs.prune(model, [torch.randn(50, 10).double()], sparsity=0.5, progress=False)
    root = report.layers[0].error ** 0.5
    assert report.error_bound.measured == pytest.approx(root, rel=1e-9)
    assert report.error_bound.spectral == pytest.approx(root, rel=1e-12)
    assert report.error_bound.frobenius == pytest.approx(root, rel=1e-12)


def test_the_formula_by_hand():
    """Two pruned layers and one that was not: (||W2|| ||W3||) sqrt(E1) + ||W3|| sqrt(E2)."""
    weights = {
        "a": torch.eye(2),
        "b": torch.diag(torch.tensor([3.0, 4.0])),
        "c": torch.diag(torch.tensor([1.0, 2.0])),
    }
    parts = theorem_parts(
        ["a", "b", "c"], weights.__getitem__, {"a": (4.0, 10.0), "b": (9.0, 10.0)}, 10.0
    )
    assert parts["a"] == pytest.approx((5 * 5**0.5 * 2, 4 * 2 * 2))
    assert parts["b"] == pytest.approx((5**0.5 * 3, 2 * 3))


def test_rows_may_differ_along_the_chain():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Linear(6, 4)
            self.head = nn.Linear(20, 3)

        def forward(self, x):  # (B, 5, 6)
            return self.head(torch.relu(self.tokens(x)).reshape(x.size(0), -1))

    model = Net().double()
    report = lobs.prune(
        model, [torch.randn(30, 5, 6).double()], sparsity=0.5, inputs="dense", progress=False
    )
    assert [layer.rows for layer in report.layers] == [150, 30]
    b = report.error_bound
    assert b.covered
    assert b.measured <= b.spectral <= b.frobenius


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.a(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(x) if x.sum() > 0 else self.a(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(torch.relu(self.a(x)))


class LateDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return functional.dropout(self.a(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "Conv2d"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), "GELU"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(-3.0)), "LeakyReLU"),
        (nn.Sequential(nn.Linear(4, 4), nn.ELU(alpha=2.0)), "ELU"),
        (Residual(), "add"),
        (Branches(), "traced"),
        (Twice(), "used twice"),
        (LateDropout(), "always on"),
        (nn.Sequential(nn.ReLU()), "no linear layer"),
    ],
    ids=[
        "conv",
        "gelu",
        "batch norm",
        "steep leak",
        "steep elu",
        "residual",
        "control flow",
        "twice",
        "dropout",
        "none",
    ],
)
def test_models_outside_the_theorem_get_a_reason(model, reason):
    with pytest.raises(NotAChainError, match=reason):
        chain_of(model.eval())


def test_common_ways_of_writing_a_chain_are_recognised():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), nn.LeakyReLU(0.1), nn.Dropout(0.5))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = x.view(x.size(0), -1)
            x = torch.flatten(x, 1)
            x = functional.dropout(self.body(x), training=False)
            return self.head(functional.relu(x)).contiguous()

    assert chain_of(Net().eval()) == ["body.0", "head"]


def test_a_custom_forward_is_not_covered_but_measured():
    report = lobs.prune(
        mlp(6, 5, 4), [torch.randn(20, 6)], sparsity=0.5, forward=lambda m, x: m(x), progress=False
    )
    assert not report.error_bound.covered
    assert "forward=" in report.error_bound.reason
    assert report.error_bound.measured > 0
