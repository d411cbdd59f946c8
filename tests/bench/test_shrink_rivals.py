"""The rivals that are written in bench/: they do what they say."""

from __future__ import annotations

import sys

import torch
from torch import nn

from quality.shrink_convnets import by_norms, multiplications
from quality.shrink_llm import DAMPING, GROUPS, Rival, like_flap, like_slimgpt


def rival(columns: int = 40) -> tuple[Rival, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(300, columns) @ torch.randn(columns, columns) + 1.0
    made = Rival(nn.Linear(columns, 6, bias=False))
    for part in x.split(100):
        made.add_batch(part[None], part)
    return made, x


@torch.no_grad()
def test_like_flap_keeps_the_columns_that_fluctuate_most_and_adds_a_bias():
    made, x = rival()
    before = made.layer.weight.clone()
    like_flap(made, 25)
    gone = (made.layer.weight == 0).all(0)
    assert int(gone.sum()) == 15
    score = x.var(0) * before.square().sum(0)
    assert float(score[gone].max()) < float(score[~gone].min())
    torch.testing.assert_close(made.layer.weight[:, ~gone], before[:, ~gone])
    lost = before[:, gone] @ x[:, gone].mean(0)
    torch.testing.assert_close(made.layer.bias, lost, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_like_slimgpt_leaves_the_best_weights_for_what_stays(monkeypatch):
    monkeypatch.setitem(vars(sys.modules[like_slimgpt.__module__]), "GROUPS", (16, 3))
    assert GROUPS == (1024, 8)
    made, _ = rival()
    before = made.layer.weight.double()
    H = made.H / made.rows
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    like_slimgpt(made, 25)
    kept = (made.layer.weight != 0).any(0)
    assert int(kept.sum()) == 25
    best = torch.linalg.solve(H[kept][:, kept], H[kept] @ before.T).T
    torch.testing.assert_close(made.layer.weight[:, kept].double(), best, rtol=1e-4, atol=1e-4)


def test_l1_norms_keep_the_largest_filters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip
    filters = model[0].weight.detach().clone()
    images = torch.randn(2, 1, 8, 8)
    assert multiplications(model, images[0]) == 8 * 9 * 36 + 4 * 72 * 16 + 12
    by_norms(model, 0.5, images)
    largest = filters.abs().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values
    assert torch.equal(model[0].weight, filters[largest])
    assert model[2].weight.shape == (4, 4, 3, 3)
