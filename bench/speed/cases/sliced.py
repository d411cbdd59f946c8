"""Products of few rows with a sparse weight: ``SparseLinear`` and ``sliced_linear``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

import lobs_native as lobs
from lobs_native import ops
from speed import shapes
from speed.case import Case, Side, relative_error

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
ROWS = (1, 8, 32, 128)


def cases(quick: bool) -> Iterator[Case]:
    """The layer 768 -> 3072 with random zeros, for one row to a batch, in float32 and bfloat16."""
    shape = shapes.named("bert-base.fc1", small=quick)
    for sparsity in (0.9,) if quick else SPARSITIES:
        for rows in (1, 32) if quick else ROWS:
            yield product_case(shape, sparsity, rows)
    for sparsity in () if quick else (0.5, 0.7, 0.9):
        yield product_case(shape, sparsity, 1, torch.bfloat16)


def product_case(
    shape: shapes.LayerShape, sparsity: float, rows: int, dtype: torch.dtype = torch.float32
) -> Case:
    """One product. The rate counts the operations of the dense one, for all sides."""
    generator = torch.Generator().manual_seed(8)
    R, C = shape.rows, shape.columns
    weight = shapes.weights(shape)
    weight.masked_fill_(torch.rand(R, C, generator=generator) < sparsity, 0)
    x = torch.randn(rows, C, generator=generator)
    weight, x = weight.to(dtype), x.to(dtype)
    layer = lobs.SparseLinear(weight)
    sliced = ops.SlicedWeight.pack(weight)

    def ours(x: Tensor, backend: str | None = None) -> Tensor:
        if backend is None:
            return layer(x)
        parts = (sliced.values, sliced.columns, sliced.steps)
        sizes = {"rows": R, "features": C, "width": sliced.width}
        return ops.sliced_linear(x, *parts, **sizes, backend=backend)

    def dense(x: Tensor) -> Tensor:
        return functional.linear(x, weight)

    rivals = {"torch": Side("torch dense", dense)}
    if dtype == torch.float32:
        csr = weight.to_sparse_csr()
        rivals["csr"] = Side("torch CSR, csr @ x.T", lambda x: (csr @ x.T).T)
    name = f"sparse product {C} -> {R}, {sparsity:.0%} zeros, {rows} rows"
    return Case(
        name=name if dtype == torch.float32 else f"{name}, bfloat16",
        inputs=(x,),
        work=2.0 * rows * R * C,
        unit="GFLOP/s of dense",
        error=relative_error(x.double() @ weight.double().T),
        tolerance=1e-5 if dtype == torch.float32 else 5e-3,
        ours=Side("lobs", ours),
        rivals=rivals,
    )
