"""Small networks, pruned on corrected inputs."""

from __future__ import annotations

from typing import Any

import torch
from helpers.cases import features
from torch import Tensor, nn

import lobs_native as lobs

__all__ = ["chain", "convolutions", "pruned", "rows"]


def chain() -> nn.Sequential:
    layers = (nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 5))
    return nn.Sequential(*layers).double()


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(196, 4),
    ).double()  # fmt: skip


def rows(model: nn.Module) -> list[Tensor]:
    if isinstance(model[0], nn.Conv2d):
        return [torch.randn(9, 2, 8, 8).double() for _ in range(3)]
    return [features(40, 20, seed=i) for i in range(4)]


def pruned(model: nn.Module, data: Any, **options: Any) -> lobs.Report:
    options = {"sparsity": 0.6, "inputs": "corrected", "progress": False, **options}
    return lobs.prune(model, data, **options)
