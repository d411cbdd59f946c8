"""Tolerances of results, relative to the largest entry of the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

# The rounding of a single product is 1e-16 and 6e-8, and sums here have up to a few hundred terms.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected entry."""
    scale = float(expected.abs().max())
    return float((actual.double() - expected.double()).abs().max()) / (scale or 1.0)
