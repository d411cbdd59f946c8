"""Named layers with their second moment, and the check of a pruned layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speed import shapes


@dataclass(frozen=True)
class Layer:
    """A layer and how many of its weights are to go."""

    shape: shapes.LayerShape
    W: Tensor  # (R, C) float32
    H: Tensor  # (C, C) float64
    A: Tensor  # (C, C) float32
    count: int  # weights to remove

    @property
    def share(self) -> float:
        """``count`` over the number of weights."""
        return self.count / self.W.numel()

    def __str__(self) -> str:
        return f"{self.shape} ({self.shape.rows}, {self.shape.columns}), {self.share:.1%} removed"


def named_layer(name: str, share: float, *, small: bool) -> Layer:
    """Weights, second moment and inverse of a layer of a real model."""
    shape = shapes.named(name, small=small)
    H = shapes.second_moment(shape)
    count = round(share * shape.rows * shape.columns)
    return Layer(shape, shapes.weights(shape), H, shapes.inverse(H).to(torch.float32), count)


def lost_share(layer: Layer, surplus: int = 0) -> Callable[[Tensor], float]:
    """The share of the layer's output that is lost; infinite if the count is not exact.

    ``surplus`` is how many weights too many may be gone.
    """
    energy = shapes.cost(layer.W, torch.zeros_like(layer.W), layer.H)

    def error(pruned: Tensor) -> float:
        if not 0 <= int((pruned == 0).sum()) - layer.count <= surplus:
            return torch.inf
        return shapes.cost(layer.W, pruned, layer.H) / energy

    return error
