"""compat.fisher.EmpiricalBlockFisherInverse against SparseML's own class: a million weights.

    python bench/hosts/host_fisher.py --folder DIR [--quick] [--pairs N] [--threads N] [--json FILE]

DIR holds a clone of neuralmagic/sparseml as DIR/sparseml. The whole life of an object is timed:
construction, 64 gradients, the diagonal, one product.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as in paired.py

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from hosts import host_runs, originals
from lobs_native.compat.fisher import EmpiricalBlockFisherInverse
from lobs_native.ops import reference
from speed import shapes
from speed.case import Case, Side, relative_error

FEW = 8  # blocks, which are independent: so many are checked against float64


def fisher_case(theirs: Any, d: int, B: int) -> Case:
    """One size of block. The answer is the diagonal and the product of the first blocks."""
    m = shapes.FISHER_GRADIENTS
    G = shapes.gradients(m, d)
    v = torch.randn(d, generator=torch.Generator().manual_seed(7))
    exact = torch.eye(B, dtype=torch.float64).mul(shapes.FISHER_ALPHA).repeat(FEW, 1, 1)
    reference.inverse_update_(exact, G[:, : FEW * B].to(torch.float64), float(m))
    product = exact @ v[: FEW * B].to(torch.float64).view(FEW, B, 1)
    expected = torch.cat([exact.diagonal(dim1=1, dim2=2).flatten(), product.flatten()])

    def both(kind: Any) -> tuple[Tensor, Tensor]:
        inverse = kind(m, B, d, 1 / shapes.FISHER_ALPHA, torch.device("cpu"))
        for g in G:
            inverse.add_grad(g)
        return inverse.diag(), inverse.mul(v)

    def first_blocks(parts: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part[: FEW * B] for part in parts])

    def side(name: str, kind: Any) -> Side:
        return Side(name, lambda: both(kind), result=first_blocks)

    return Case(
        inputs=(),
        name=f"block Fisher inverse, {d:,} weights, B={B}, {m} gradients, diag, mul",
        work=-(-d // B) * (m / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-3,
        ours=side("lobs", EmpiricalBlockFisherInverse),
        rivals={"SparseML": side("SparseML", theirs)},
    )


def cases(folder: Path, quick: bool) -> Iterator[Case]:
    theirs = originals.fisher_class(folder)
    for B in shapes.FISHER_BLOCKS:
        yield fisher_case(theirs, 20_000 if quick else shapes.FISHER_WEIGHTS, B)


if __name__ == "__main__":
    host_runs.run(__doc__, {"fisher": cases}, pairs=3, quick_pairs=3)
