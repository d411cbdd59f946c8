"""Whether two networks return the same for one batch, to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native.calibration.outputs import floating_tensors
from lobs_native.calibration.session import Session

__all__ = ["alike", "apart", "output_of"]

_AGREES = 16.0  # times rounding to the power of 3/4: 1e-4 in float32, 0.09 in float16


@torch.no_grad()
def output_of(session: Session, batch: Any) -> list[Tensor]:
    """The floating-point tensors that the model returns for a batch; inside
    :meth:`Session.evaluating`."""
    torch.manual_seed(session.seed)
    return [x.clone() for x in floating_tensors(session.call(session.model, batch))]


def apart(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How far outputs are from those wanted: the largest difference of a tensor, relative to its
    norm; infinite for other shapes."""
    if [a.shape for a in wanted] != [b.shape for b in found]:
        return math.inf
    differences = [
        float((a.double() - b.double()).norm()) / (float(a.double().norm()) or 1.0)
        for a, b in zip(wanted, found, strict=True)
    ]
    return max(differences, default=0.0)


def alike(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether they differ by rounding at most."""
    eps = max((float(torch.finfo(a.dtype).eps) for a in wanted), default=0.0)
    return apart(wanted, found) <= _AGREES * math.pow(eps, 0.75)
