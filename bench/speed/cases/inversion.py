"""The damped inverse of a layer's second moment, which is not an operation of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native.solvers.inversion import invert, invert_
from speed import shapes
from speed.case import Case, Side, copy_first, relative_error


def cases(quick: bool) -> Iterator[Case]:
    """Two widths of a layer."""
    for C in (256,) if quick else (1024, 4096):
        yield invert_case(C)
    for dtype in (torch.float32, torch.float64):
        yield sweep_case(256 if quick else 3072, dtype)


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


def sweep_case(C: int, dtype: torch.dtype) -> Case:
    """The inverse of a well-conditioned (C, C) in place, against torch's and a product's rate."""
    H = shapes.second_moment(shapes.LayerShape("layer", 1, C))
    H = H / H.diagonal().mean()
    H.diagonal().add_(0.5)
    M = H.to(dtype)
    out = torch.empty_like(M)

    def ours(M: Tensor) -> Tensor:
        assert invert_(M)
        return M

    return Case(
        name=f"symmetric inverse of {C:,} columns, {str(dtype).removeprefix('torch.')}",
        inputs=(M,),
        prepare=copy_first,
        work=float(C) ** 3,
        unit="GFLOP/s",
        error=relative_error(torch.linalg.inv(H)),
        tolerance=1e-4 if dtype == torch.float32 else 1e-11,
        ours=Side("lobs", ours),
        rivals={
            "torch": Side(
                "torch Cholesky and its inverse",
                lambda M: torch.cholesky_inverse(torch.linalg.cholesky(M)),
            ),
            "product": Side(
                "torch.mm",
                lambda M: torch.mm(M, M, out=out),
                note="the ratio is ours' share of the rate of a matrix product",
                work=2.0 * C**3,
                error=relative_error(H @ H),
            ),
        },
    )
