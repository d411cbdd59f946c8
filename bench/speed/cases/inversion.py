"""The damped inverse of a layer's second moment, which is not an operation of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native.solvers.inversion import invert
from speed import shapes
from speed.case import Case, Side


def cases(quick: bool) -> Iterator[Case]:
    """Two widths of a layer."""
    for C in (256,) if quick else (1024, 4096):
        yield invert_case(C)


def invert_case(C: int) -> Case:
    """(H + damping * mean(diag H) * I)^-1 for H (C, C) float64; the error is the residual."""
    H = shapes.second_moment(shapes.LayerShape("layer", 1, C))
    damped = shapes.damped(H)

    def ours(H: Tensor) -> Tensor:
        inverse = invert(H, shapes.DAMPING, "H")
        return inverse.A.div_(inverse.scale)

    def residual(A: Tensor) -> float:
        product = A @ damped
        product.diagonal().sub_(1.0)
        return float(product.norm()) / C**0.5

    return Case(
        name=f"damped inverse of {C:,} columns, float64",
        inputs=(H,),
        work=float(C) ** 3,
        unit="GFLOP/s",
        error=residual,
        tolerance=1e-9,
        ours=Side("lobs", ours),
        rivals={
            "published": Side(
                "torch.linalg.inv, as published", lambda H: torch.linalg.inv(shapes.damped(H))
            ),
            "torch": Side("torch Cholesky and its inverse", shapes.inverse),
        },
    )
