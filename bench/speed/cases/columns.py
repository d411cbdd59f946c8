"""Removal of units of columns from all rows at once: ``columns_trace``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines.columns import ColumnGroup
from speed.case import Case, Side, relative_error

SHARE = 0.25  # of the units, to remove


def cases(quick: bool) -> Iterator[Case]:
    """Single neurons, and heads of 64 columns."""
    for name in ("bert-base.attention", "bert-large.attention"):
        for size in (1, 4 if quick else 64):
            yield removal_case(name, size, small=quick)


def removal_case(layer: str, size: int, *, small: bool) -> Case:
    """A quarter of a layer's units of ``size`` columns, one after another, from W and A."""
    shape = shapes.named(layer, small=small)
    R, C = shape.rows, shape.columns
    A, W = shapes.inverse(shapes.second_moment(shape)), shapes.weights(shape).double()
    count = round(SHARE * (C // size))
    k = count * size
    expected = updated(W, A, size, count)

    def error(found: Tensor) -> float:
        same = torch.equal(found[0], expected[0])
        return float((found[1] / expected[1] - 1).abs().max()) if same else math.inf

    unit = "columns" if size == 1 else f"heads of {size} columns"
    return Case(
        name=f"{shape} ({R} x {C}), {count} of {C // size} {unit} removed",
        inputs=(W, A),
        work=3.0 * C * k**2 + 2.0 * R * C * k,
        unit="GFLOP/s",
        error=error,
        tolerance=1e-6,
        ours=Side("lobs", lambda W, A, **how: traced(W, A, size, count, **how)),
        rivals={
            "published": Side(
                "torch, W and A updated by every removal",
                lambda W, A: updated(W, A, size, count),
            ),
            "torch": Side(
                "torch, rows computed ahead from factors",
                lambda W, A: removed(W, A, size, count),
            ),
            "products": Side(
                "torch.mm",
                lambda W, A: W @ A,
                note="the ratio is ours' share of the rate of a matrix product",
                work=2.0 * R * C**2,
                error=relative_error(W @ A),
            ),
        },
    )


def traced(W: Tensor, A: Tensor, size: int, count: int, **how: Any) -> Tensor:
    """(2, count): the units in the order of removal, and what each costs."""
    start = torch.arange(0, len(A) + 1, size)
    trace = ops.columns_trace([ops.ColumnLayer(W, A, start)], count, **how)
    return torch.tensor([trace.order, trace.cost], dtype=W.dtype)


def removed(W: Tensor, A: Tensor, size: int, count: int) -> Tensor:
    """The same in torch."""
    group = ColumnGroup(W, A, size, 1.0)
    order = []
    for _ in range(count):
        rank = group.ranks()
        unit = int(group.unit[rank.argmin()])
        order.append((unit, group.remove(unit, rank)))
    return torch.tensor(order, dtype=W.dtype).T


def updated(W: Tensor, A: Tensor, size: int, count: int) -> Tensor:
    """The same as papers have it: after every removal all weights and the inverse are updated."""
    W, A = W.clone(), A.clone()
    units = len(A) // size
    gone = torch.zeros(units, dtype=torch.bool)
    order = []
    for _ in range(count):
        a = A.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        w = W.view(-1, units, size).permute(1, 2, 0)  # (units, size, R)
        if size == 1:
            cost = w.square().sum((1, 2)) / a.view(-1)
        else:
            cost = (w * torch.linalg.solve(a, w)).sum((1, 2))
        cost[gone] = torch.inf
        unit = int(cost.argmin())
        order.append((unit, float(cost[unit])))
        s = slice(unit * size, (unit + 1) * size)
        solved = torch.linalg.solve(A[s, s], A[s])
        W -= W[:, s] @ solved
        A -= A[:, s] @ solved
        gone[unit] = True
        A[s, s] = torch.eye(size, dtype=A.dtype)
    return torch.tensor(order, dtype=W.dtype).T
