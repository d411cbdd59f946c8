"""What a layer is corrected by: as much of the drift of its inputs as its rows tell."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.corrected import chain, pruned, rows
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers import drift
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def trusted(missing: Tensor, correction: Tensor, x: Tensor, A: Tensor) -> float:
    """The share of a correction (R, D) of missing (n, R) that is not noise, where three rows tell
    as much as one."""
    n = len(x)
    explained = float((correction * (missing.T @ x / n)).sum())
    part = 3.0 * float(torch.trace(x.T @ x / n @ A)) / n
    noise = (float(missing.square().sum()) / n - explained) / (1 - part)
    return max(0.0, 1 - noise * part / explained)


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs", "magnitude", "wanda"])
def test_a_layer_starts_from_weights_that_compensate_for_the_layers_before(method):
    """The second layer by hand: the ridge solution for the original outputs, then pruning."""
    model, damping = chain(), 0.02
    original = copy.deepcopy(model)
    data = rows(model)
    pruned(model, data, method=method, damping=damping)
    x, x0 = (with_ones(m[:2](torch.cat(data)).detach()) for m in (model, original))
    W = torch.cat([original[2].weight, original[2].bias[:, None]], 1).detach()
    H = x.T @ x / len(x)
    A = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    missing = (x0 - x) @ W.T
    correction = missing.T @ x / len(x) @ A
    W = W + trusted(missing, correction, x, A) * correction
    out = lobs.prune_weight(
        W[:, :-1].contiguous(), H, sparsity=0.6, method=method, bias=W[:, -1], damping=damping
    )
    assert distance(model[2].weight.detach(), out.weight) < 1e-9
    assert distance(model[2].bias.detach(), out.bias) < 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_corrections_are_made_as_far_as_they_help_on_other_rows(seed, noise):
    """On other rows, about as good as the better of the whole correction and none."""
    N, C, R, lost = 60, 40, 30, {"none": 0.0, "whole": 0.0, "shrunk": 0.0}
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    W, B = normal(R, C), 0.3 * normal(R, C)
    x, other = normal(N, C), normal(500, C)
    missing = x @ B.T + noise * normal(N, R)
    H = x.T @ x / N
    for name, count in (("none", None), ("whole", math.inf), ("shrunk", 3.0 * N)):
        aim = None
        if count is not None:
            aim = drift.Drift([x.T @ missing / N], float(missing.square().sum()) / N, 1.0, count)
        out = prune_groups(W[None], [H], LayerSettings(sparsity=0.0), drift=aim)
        lost[name] = float((other @ (out.weight[0] - W - B).T).square().mean())
        if aim is not None:
            left = x @ (out.weight[0] - W).T - missing
            assert out.error == pytest.approx(float(left.square().sum()) / N)
            assert any("of the correction was made" in note for note in out.notes) == (
                name == "shrunk" and noise == 10.0
            )
    assert lost["shrunk"] <= 1.6 * min(lost["none"], lost["whole"])
