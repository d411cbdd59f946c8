"""Second moment of a chunk of inputs: ``hessian_accumulate_``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines import hessian as baselines
from speed.case import Case, Side, relative_error


def cases(quick: bool) -> Iterator[Case]:
    """X^T X of correlated ReLU features."""
    sizes = (
        [(1024, 256, torch.float32), (1024, 256, torch.bfloat16)]
        if quick
        else [
            (8192, 1024, torch.float32),
            (8192, 1024, torch.bfloat16),
            (4096, 2048, torch.float32),
        ]
    )
    for N, C, dtype in sizes:
        yield accumulate_case(N, C, dtype)


def accumulate_case(N: int, C: int, dtype: torch.dtype) -> Case:
    """The lower triangle of X^T X, for X (N, C), to float32 accuracy."""
    X = shapes.relu_features(N, C).to(dtype)
    exact = X.to(torch.float64)
    close = relative_error((exact.T @ exact).tril())

    def zeros(H: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(H), X

    def float32_zeros(H: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(H, dtype=torch.float32), X

    def ours(H: Tensor, X: Tensor, *, backend: str | None = None) -> Tensor:
        ops.hessian_accumulate_(H, X, backend=backend)
        return H

    return Case(
        name=f"hessian ({N}, {C}) {str(dtype).removeprefix('torch.')}",
        inputs=(torch.zeros(C, C, dtype=torch.float64), X),
        prepare=zeros,
        work=N * C * (C + 1),
        unit="GFLOP/s",
        error=lambda H: close(H.tril()),
        tolerance=1e-5,
        ours=Side("lobs", ours),
        rivals={
            "torch-product": Side(
                "x.T @ x" if dtype == torch.float32 else "x.float().T @ x.float()",
                lambda H, X: baselines.gram(X),
            ),
            "published": Side(
                "published running mean",
                lambda H, X: baselines.gram_running_mean_(H, 0, X),
                prepare=float32_zeros,
                result=lambda H: H * (N / 2),  # from the mean of 2 x x^T
            ),
            "torch": Side("torch block triangle", baselines.gram_block_triangle_),
        },
    )
