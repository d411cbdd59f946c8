"""What a layer makes up for: layers before it have changed its inputs, so that its outputs are not
what they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native.solvers.inversion import Inverse

__all__ = ["Drift", "trusted_share"]

_EXACT = 256  # columns up to which a trace is not estimated
_PROBES = 16  # vectors of signs that estimate it (Hutchinson 1990), to some percent
_ALIKE = 3.0  # neighbouring rows that tell as much as one: tokens of a text, pixels of an image
_MOST = 0.95  # of the noise: the most that a regression is taken to explain


@dataclass(frozen=True)
class Drift:
    """The distance of a layer with its original weights, on its inputs x, from desired outputs y:
    means over the samples, of all groups together.

    The best weights are then not the original ones but, with damping, ``W + (A pull)^T``: the
    minimum of ``|y - x W'^T|^2`` plus the damping times ``|W' - W|^2``. From few rows, a part of
    that only follows their noise: see :func:`trusted_share`.
    """

    pull: Sequence[Tensor]  # G times (D, R) float64: x^T (y - x W^T)
    inherited: float  # |y - x W^T|^2
    energy: float  # the unit of relative errors
    rows: float = math.inf  # of x: what the means are over

    def shrunk(self, share: float) -> Drift:
        """That of the outputs a ``share`` of the way from x W^T to y."""
        pull = [share * p for p in self.pull]
        return Drift(pull, share**2 * self.inherited, self.energy, self.rows)


def trusted_share(
    drift: Drift,
    corrections: Sequence[Tensor],
    inverses: Sequence[Inverse],
    moments: Sequence[Tensor],
) -> float:
    """The share of the corrections (D, R) that is more than noise, from 0 to 1.

    A regression on n rows explains a part df / n of any noise, for df degrees of freedom:
    ``tr(H A)`` of the damped inverse A. What is left unexplained tells how much noise there is, and
    so how much of what is explained is noise. Errors of corrections add up from block to block:
    SmolLM2 at 2:4, calibrated on 4,096 tokens, lost 1.24 nats by whole corrections, 0.77 by these
    shares of them, and 0.79 without any.

    Source: the shrinkage of a regression that minimises its expected error on other rows (James &
    Stein 1961; Copas 1983).
    """
    explained = sum(float((c * p).sum()) for c, p in zip(corrections, drift.pull, strict=True))
    if math.isinf(drift.rows) or not explained > 0:
        return 1.0
    freedom = 0.0
    for inverse, H in zip(inverses, moments, strict=True):
        trace = _trace(inverse, H) / inverse.scale
        shift = inverse.damping * float(H.diagonal().mean())
        freedom += max(0.0, len(H) - shift * trace) / len(moments)
    part = min(freedom * _ALIKE / drift.rows, _MOST)
    noise = max(0.0, drift.inherited - explained) / (1 - part)
    return max(0.0, 1.0 - noise * part / explained)


def _trace(inverse: Inverse, H: Tensor) -> float:
    """Of the inverse of H."""
    D = len(H)
    if D <= _EXACT:
        return float(inverse.times(torch.eye(D, dtype=H.dtype, device=H.device)).trace())
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (D, _PROBES), generator=generator).to(H) * 2 - 1
    return float((signs * inverse.times(signs)).sum()) / _PROBES
