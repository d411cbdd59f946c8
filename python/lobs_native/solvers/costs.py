"""Predictions of the error of a removal, from the costs that a method computed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["POINTS", "Costs", "along", "costs_between", "curve_of"]

POINTS = 30  # of a curve


@dataclass(frozen=True)
class Costs:
    """The error that the costs of removals add up to, in units of ``PrunedWeight.error`` with the
    damped H, at one sparsity and along a curve."""

    predicted: float
    sparsity: tuple[float, ...] | None = None  # rising; None where the method has no such curve
    error: tuple[float, ...] | None = None
    # (G, R) float64: what the removals from each row cost, of weights that are the best there are;
    # None where the method does not know
    rows: Tensor | None = None


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


def costs_between(counts: Sequence[int], errors: Sequence[float]) -> Tensor:
    """(counts[-1],) float64, rising: what each removal costs where the error is known after
    ``counts`` removals alone, which rise.

    Between them the logarithm of the error is a monotone cubic of the logarithm of the count
    (Fritsch & Butland 1984); before the first it is a straight line.
    """
    tiny = max(errors[-1], 1e-300) * 1e-12
    error = torch.tensor(errors, dtype=torch.float64).clamp_min(tiny).cummax(0).values.log()
    place = torch.tensor(counts, dtype=torch.float64).log()
    at = torch.arange(1, counts[-1] + 1, dtype=torch.float64).log_()
    if len(counts) == 1:  # the error of small removals is about the square of their share
        total = (error + 2 * (at - place)).exp_()
    else:
        total = _monotone(place, error, at).exp_()
    costs = torch.diff(total, prepend=total.new_zeros(1))
    return costs.cummax(0).values


def _monotone(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The monotone cubic through (x, y), both rising, at ``at``; a straight line before x[0]."""
    step, slope = x.diff(), y.diff() / x.diff()
    left, right = slope[:-1], slope[1:]
    both = (left + right).clamp_min(1e-300)
    weight = (1 + step[1:] / (step[:-1] + step[1:])) / 3
    inner = left * right / ((1 - weight) * left + weight * right).clamp_min(1e-300) * (both > 0)
    last = slope[-1:]
    if len(slope) > 1:  # of the parabola through the last three points
        last = (last + step[-1] * (slope[-1] - slope[-2]) / (step[-1] + step[-2])).clamp_min(0)
    tangent = torch.cat([slope[:1], inner, last])
    i = (torch.searchsorted(x, at, right=True) - 1).clamp(0, len(x) - 2)
    t = (at - x[i]) / step[i]
    h = step[i]
    inside = (
        y[i] * (1 - t) ** 2 * (1 + 2 * t)
        + tangent[i] * h * t * (1 - t) ** 2
        + y[i + 1] * t**2 * (3 - 2 * t)
        + tangent[i + 1] * h * t**2 * (t - 1)
    )
    return torch.where(at < x[0], y[0] + slope[0] * (at - x[0]), inside)
