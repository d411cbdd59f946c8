"""Prune a small network to different sparsities, and see what it costs.

    python examples/quick_start.py

Takes a few seconds. The network is trained first, on a task that is made up here.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import lobs_native as lobs

torch.manual_seed(0)


def made_up(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 20 dimensions in five classes, by the direction that they lie in."""
    directions = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    x = torch.randn(count, 20)
    return x, (x @ directions.T).argmax(1)


def accuracy(model: nn.Module) -> float:
    x, label = made_up(5000)
    return float((model(x).argmax(1) == label).float().mean())


def trained() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(300):
        x, label = made_up(256)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    return model


model = trained()
calibration = [made_up(250)[0] for _ in range(4)]  # inputs only; labels are not needed
print(f"before pruning: accuracy {accuracy(model):.3f}\n")
print("sparsity   magnitude   default   default, one budget")
ways = ({"method": "magnitude", "inputs": "pruned"}, {}, {"scope": "model"})
for sparsity in (0.5, 0.7, 0.8, 0.9):
    found = []
    for how in ways:
        pruned = copy.deepcopy(model)  # prune works in place
        lobs.prune(pruned, calibration, sparsity=sparsity, progress=False, **how)
        found.append(accuracy(pruned))
    print("{:.0%}        {:.3f}       {:.3f}     {:.3f}".format(sparsity, *found))
