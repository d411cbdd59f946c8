"""Error against kept share, where such a curve bends, and sensitivities of single weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from paper.data import Images
from paper.networks import Case, percent_wrong
from paper.small.ways import prune_by

Points = tuple[tuple[float, float], ...]


def curve(case: Case, way: str, layers: Sequence[str], shares: Sequence[float]) -> Points:
    """(kept share, error in percent) with the given layers at the same share, all others as they
    are, without retraining."""
    points = []
    for share in shares:
        kept = dict.fromkeys(layers, share)
        errors = [
            percent_wrong(
                prune_by(way, case.model, kept, split.calibration, case.seed).model, split.test
            )
            for split in case.splits
        ]
        points.append((share, sum(errors) / len(errors)))
    return tuple(points)


def inflection(points: Sequence[tuple[float, float]], dense: float) -> float:
    """The kept share where the error begins to rise: the paper's "inflection point", exactly.

    In logarithms of both, error against kept share is flat and then rises in nearly a straight
    line. Of all hinges ``log e = log dense + slope * max(0, log(k0 / k))`` the one nearest to the
    points in least squares is chosen (``k0`` on a grid of 2,000 shares, the best slope for each in
    closed form), and its ``k0`` is the answer. Points whose error is above half of the largest one
    are left out, since there the curve bends again, towards guessing; if that leaves fewer than
    three, all count.

    Parameters
    ----------
    points : sequence of (kept share, error)
        Errors in any unit, at least three left of the bend, shares above 0.
    dense : float
        The error before pruning. Errors of zero, this one included, count as half of the smallest
        that is not.

    Returns
    -------
    float
        A share between the smallest and the largest of the points; the smallest if no error is
        above the dense one.
    """
    floor = min((e for e in (dense, *(e for _, e in points)) if e > 0), default=1.0) / 2
    dense = dense or floor
    ceiling = max(error for _, error in points) / 2
    used = [(k, e or floor) for k, e in points if e <= max(ceiling, dense)]
    if len(used) < 3:
        used = [(k, e or floor) for k, e in points]
    x = torch.tensor([math.log(k) for k, _ in used], dtype=torch.float64)
    y = torch.tensor([math.log(e / dense) for _, e in used], dtype=torch.float64)
    grid = torch.linspace(float(x.min()), float(x.max()), 2000, dtype=torch.float64)
    rise = (grid[:, None] - x).clamp_min(0.0)  # (grid, points)
    slope = (rise @ y).clamp_min(0.0) / (rise**2).sum(1).clamp_min(1e-300)
    distance = ((y - slope[:, None] * rise) ** 2).sum(1)
    return math.exp(float(grid[distance.argmin()]))  # of equal ones the first, the smallest share


def sensitivities(case: Case, layer: str, alpha: float = 1e6) -> Tensor:
    """The paper's L_q = w_q**2 / (2 A_qq) of all weights and biases of a linear layer (rows,
    inputs + 1), with ``A = (H + I / alpha)^-1`` and H over the inputs of the original network."""
    module = case.model.get_submodule(layer)
    if not isinstance(module, nn.Linear):
        raise ArgumentError(f"layer: {layer!r} is a {type(module).__name__}, expected an nn.Linear")
    H = second_moment(case, layer)
    A = torch.linalg.inv(H + torch.eye(len(H), dtype=H.dtype) / alpha)
    both = torch.cat([module.weight, module.bias[:, None]], dim=1).detach().double()
    L: Tensor = both.square() / (2 * A.diagonal())
    return L


@torch.no_grad()
def second_moment(case: Case, layer: str) -> Tensor:
    """Mean second moment of a linear layer's inputs and a one, over the calibration images of all
    splits."""
    module = case.model.get_submodule(layer)
    moment = lobs.Hessian(module.in_features, bias=True)  # type: ignore[arg-type]
    handle = module.register_forward_pre_hook(lambda _, inputs: moment.update(inputs[0]) and None)
    try:
        for images in _calibration(case):
            case.model(images)
    finally:
        handle.remove()
    return moment.matrix()


def _calibration(case: Case) -> list[Tensor]:
    parts: list[Images] = [split.calibration for split in case.splits]
    return [batch for part in parts for batch in part.batches()]
