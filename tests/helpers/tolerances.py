"""How far a result may be from the float64 reference, relative to the largest entry, and why."""

from __future__ import annotations

import torch
from torch import Tensor

# One unit of a product's own rounding is 1e-16 and 6e-8; sums here have up to a few hundred terms.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5}


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected entry."""
    scale = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / (scale or 1.0)
