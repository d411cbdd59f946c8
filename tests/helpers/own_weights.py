"""Networks whose forward is a function, data for them, and pruning that checks what must always
hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.layers import stored_weights


class Net(nn.Module):
    """A network whose forward is a function, before a last linear layer of 8 inputs."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            own = nn.Parameter(part) if isinstance(part, Tensor) else part
            setattr(self, name, copy.deepcopy(own))
        self.last = nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, x))


def rows(n: int = 2) -> list[Tensor]:
    return [torch.randn(40, 16).double() for _ in range(n)]


def sequences(n: int = 2) -> list[Tensor]:
    return [torch.randn(4, 10, 16).double() for _ in range(n)]


def images(n: int = 2) -> list[Tensor]:
    return [torch.randn(3, 4, 9, 9).double() for _ in range(n)]


def prune(net: nn.Module, data: list[Tensor], **options: Any) -> lobs.Report:
    """The report, without warnings; all that is always true of it has been checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lobs_native")
        report = lobs.prune(net, data, **{"sparsity": 0.5, "progress": False, **options})
    coverage = report.coverage
    assert coverage is not None
    assert coverage.total == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert coverage.pruned == report.weights
    assert coverage.removed == report.removed
    weights = stored_weights(net)
    for name, mask in report.masks.items():
        assert torch.equal(weights[name] != 0, mask), name
    return report


def moment(*inputs: Tensor) -> Tensor:
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    return X.T @ X / len(X)
