"""The repair of a layer whose rows all lose the same inputs: a ridge regression of what these
contributed on the inputs that stay, with as much damping as the number of samples calls for.

From few samples a regression follows their noise. Neurons of SmolLM2, a quarter removed, 2,048
tokens: with damping 0.01 the layers' errors were below 0.02 on these and 0.18 to 0.30 on others,
where leaving the weights alone made 0.13 to 0.19, and damping 1 to 3 made 0.11 to 0.15.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lobs_native.solvers.inversion import invert_

__all__ = ["Repair", "regressed"]

_STEP = 10**0.5  # from one damping to the next
_STEPS = 8  # at most: up to 10,000 times the damping asked for
# Neighbouring rows that tell as much as one. For tokens of a text, damping comes out too low with 1
# (errors on other rows were up to 1.6 times the least) and too high with 3 (1.1 times).
_ALIKE = 2.0
_MANY = 0.02  # share of the noise that is explained, below which nothing is gained


class Repair(NamedTuple):
    """How the weights that stay change, and with how much damping that was found."""

    change: Tensor  # (R, K) float64
    factor: float  # on the damping asked for


def regressed(
    H: Tensor, lost: Tensor, removed: Tensor, shift: float, samples: float, scale: float = 1.0
) -> Repair | None:
    """The best change of the kept weights, where all rows lose the same.

    Minimises ``tr((lost - change) H (lost - change)^T) + s |change|^2``. The shift s is ``shift``
    or, where that gives a lower generalised cross-validation ``error / (1 - freedom / n)^2``, up to
    10,000 times as much: the first minimum, with n half of the ``samples`` (neighbouring rows are
    alike) and ``freedom = tr(H (H + s I)^-1)``. From 100 samples for each kept column on, and
    where one column alone stays, such as that of a bias, ``shift`` it is.

    Parameters
    ----------
    H : (D, D) float64
        Second moment without damping, times ``scale``. Not modified.
    lost : (R, P) float64
        The weights that are removed. Not modified.
    removed : (D,) bool
        Whose they are: P of them; K = D - P stay.
    shift : float
        What the damping asked for adds to the diagonal of H.
    samples : float
        Of how many H is the mean; infinite if that is not known.

    Returns
    -------
    Repair or None
        None where H, damped, is not positive definite on the kept columns.

    Source: Golub, Heath & Wahba 1979.
    """
    kept = ~removed
    across = H[removed].div_(scale)
    pull = lost @ across[:, kept]
    whole = float(((lost @ across[:, removed]) * lost).sum())
    del across
    within = H[kept][:, kept].div_(scale)
    # More of nothing is nothing; and one column alone has no others whose noise it could follow.
    steps = 1 if shift == 0 or len(within) == 1 else _STEPS + 1
    best, least = None, math.inf
    for step in range(steps):
        factor = _STEP**step
        s = shift * factor
        M = within.clone() if step + 1 < steps else within
        M.diagonal().add_(s)
        if not invert_(M):
            return best
        freedom = len(M) - s * float(M.diagonal().sum())
        change = pull @ M
        part = _ALIKE * max(0.0, freedom) / samples
        error = max(0.0, whole - float((change * pull).sum()) - s * float(change.square().sum()))
        validated = math.inf if part >= 1 else error / (1 - part) ** 2
        if best is not None and validated >= least and least < math.inf:
            break
        best, least = Repair(change, factor), validated
        if part < _MANY:
            break
    return best
