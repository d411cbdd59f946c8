"""Predictions of the error of a removal, from the costs that a method computed on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["POINTS", "Costs", "along", "curve_of"]

POINTS = 30  # of a curve


@dataclass(frozen=True)
class Costs:
    """The error that the costs of removals add up to, in units of ``PrunedWeight.error`` with the
    damped H, at one sparsity and along a curve."""

    predicted: float
    sparsity: tuple[float, ...] | None = None  # rising; None where the method has no such curve
    error: tuple[float, ...] | None = None


def curve_of(predicted: float, chosen: float, sparsity: Tensor, error: Tensor) -> Costs:
    """Costs whose curve (P,) float64 includes the chosen point, each sparsity once."""
    points = dict(zip(sparsity.tolist(), error.tolist(), strict=True)) | {chosen: predicted}
    across = sorted(points)
    return Costs(predicted, tuple(across), tuple(points[x] for x in across))


def along(length: int, share: float) -> Tensor:
    """(P,) int64, rising from 0 to ``length - 1``: places in a list of removals that begins with
    none and ends with ``share`` of all weights. Half of them are spaced evenly in what is removed,
    half in the logarithm of what is kept."""
    if length < 2:
        return torch.zeros(1, dtype=torch.int64)
    half = POINTS // 2
    even = torch.linspace(0.0, 1.0, half, dtype=torch.float64)
    last = max(1 - share, 1 / length)
    kept = last**even
    shares = torch.cat([even, (1 - kept) / (1 - last)]) if last < 1 else even
    place: Tensor = (shares * (length - 1)).round().long().unique()
    return place
