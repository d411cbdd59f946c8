"""The block inverse Fisher of WoodFisher and oBERT: ``inverse_update_``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference
from speed import shapes
from speed.baselines import inverse as baselines
from speed.case import Case, Side, clock, relative_error

CHECKED = 8  # blocks are independent, so a few of them check the rest


def cases(quick: bool) -> Iterator[Case]:
    """64 gradients of a million weights."""
    for B in shapes.FISHER_BLOCKS:
        weights = 20_000 if quick else shapes.FISHER_WEIGHTS
        yield update_case(weights, B, shapes.FISHER_GRADIENTS, sample=4)


def update_case(d: int, B: int, r: int, *, sample: int | None = None) -> Case:
    """r gradients of d weights into blocks (B, B).

    With ``sample``, the time of the published updates is extrapolated from that many gradients.
    """
    blocks = -(-d // B)
    m = float(r)

    def start(F: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        F.zero_().diagonal(dim1=1, dim2=2).fill_(shapes.FISHER_ALPHA)
        return F, G

    def ours(F: Tensor, G: Tensor, *, backend: str | None = None) -> Tensor:
        ops.inverse_update_(F, G, m, backend=backend)
        return F

    def one_by_one(F: Tensor, G: Tensor) -> Tensor:
        return baselines.inverse_update_one_by_one_(F, G, m)

    published = Side("published rank-1 updates", one_by_one)
    F, G = torch.empty(blocks, B, B), shapes.gradients(r, blocks * B)
    if sample is not None:
        sampled = clock(lambda F, G: one_by_one(F, G[:sample]), lambda: start(F, G))
        published = Side(
            published.label,
            one_by_one,
            seconds=lambda: sampled() * (r / sample),
            note=f"extrapolated from {sample} of {r} gradients",
        )
    expected, _ = start(torch.empty(min(CHECKED, blocks), B, B, dtype=torch.float64), G)
    reference.inverse_update_(expected, G[:, : len(expected) * B], m)
    return Case(
        name=f"inverse update, {d:,} weights, B={B}, {r} gradients",
        inputs=(F, G),
        prepare=start,
        work=blocks * (r / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-3,
        ours=Side("lobs", ours),
        rivals={
            "published": published,
            "torch": Side(
                "torch, 16 at once", lambda F, G: baselines.inverse_update_together_(F, G, m)
            ),
        },
    )
