"""A step of conjugate gradients on the kept columns of each row: ``conjugate_step_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import reference
from speed import shapes
from speed.baselines import conjugate as baselines
from speed.case import Case, Side

_Answer = tuple[Tensor, Tensor, Tensor]


def cases(quick: bool) -> Iterator[Case]:
    """A layer of a model with 7 billion weights, half removed."""
    shape = shapes.LayerShape("7b.attention", 4096, 4096)
    yield step_case(shape.small() if quick else shape)


def step_case(shape: shapes.LayerShape) -> Case:
    """The first step. The error is the largest of w, g and p, relative to the largest entry."""
    R, C = shape.rows, shape.columns
    generator = torch.Generator().manual_seed(6)
    removed = torch.rand(R, C, generator=generator) < 0.5
    w = shapes.weights(shape).masked_fill_(removed, 0)
    g = torch.randn(R, C, generator=generator).masked_fill_(removed, 0)
    h = g * 1.5 + torch.randn(R, C, generator=generator) * 0.1
    rr = g.double().square().sum(dim=1)
    wanted = tuple(t.double() for t in (w, g, g)), rr.clone()
    reference.conjugate_step_(*wanted[0], h.double(), removed, wanted[1])

    def prepare(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x if x.dtype == torch.bool else x.clone() for x in inputs)

    def written(step: Callable[..., Any]) -> Callable[..., _Answer]:
        def run(w: Tensor, g: Tensor, p: Tensor, *others: Tensor, **how: Any) -> _Answer:
            step(w, g, p, *others, **how)
            return w, g, p

        return run

    def error(answer: _Answer) -> float:
        pairs = zip(answer, wanted[0], strict=True)
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)

    return Case(
        name=f"conjugate gradients, a step ({R}, {C})",
        inputs=(w, g, g.clone(), h, removed, rr),
        work=(7 * 4 + 1) * R * C,
        unit="GB/s",
        error=error,
        tolerance=1e-5,
        prepare=prepare,
        ours=Side("lobs", written(ops.conjugate_step_)),
        rivals={
            "published": Side("torch, new tensors", written(baselines.step)),
            "torch": Side("torch in place", written(baselines.step_in_place)),
        },
    )
