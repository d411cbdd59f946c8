"""Exact pruning in its simplest form, in float64: the reference for the library."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lobs_native import PrunedWeight


class Plain:
    """One row, one removal at a time, in float64, with D downdated as published."""

    def __init__(
        self,
        w: np.ndarray,
        A: np.ndarray,
        state: np.ndarray | None = None,
        *,
        limit: int | None = None,
        stop: float = math.inf,
        block: int = 1,
        group: int = 0,
        per_group: int = 0,
    ) -> None:
        C = len(w)
        w, D = w.copy(), A.copy()
        whole = C - C % (group or block)
        kind = np.zeros(C, np.uint8) if state is None else state.copy()
        kind[whole:] = 2
        there = np.ones(C, bool)
        order: list[int] = []
        loss: list[float] = []
        while len(order) + block <= (C if limit is None else limit):
            first = there & (kind == 1)
            may = first if first.any() else there & (kind == 0)
            if group and not first.any():
                taken = (~there[:whole]).reshape(-1, group).sum(1)
                may[:whole] &= np.repeat(taken < per_group, group)
            starts = np.flatnonzero(may)[::block]
            if len(starts) == 0:
                break
            if block == 1:
                cost = w[starts] ** 2 / np.diagonal(D)[starts]
            else:
                inside = starts[:, None] + np.arange(block)
                parts = D[inside[:, :, None], inside[:, None, :]]
                solved = np.linalg.solve(parts, w[inside][:, :, None])[:, :, 0]
                cost = (solved * w[inside]).sum(1)
            best = int(cost.argmin())
            if not first.any() and cost[best] > stop:
                break
            for q in range(starts[best], starts[best] + block):
                order.append(q)
                loss.append(w[q] ** 2 / D[q, q])
                w -= w[q] / D[q, q] * D[:, q]
                D -= np.outer(D[:, q], D[q] / D[q, q])
                there[q] = False
        w[~there] = 0.0
        self.order, self.loss = order, np.array(loss)
        self.weight = torch.from_numpy(w)


def least_squares(w: Tensor, H: Tensor, gone: Tensor) -> Tensor:
    """The best row for a mask: kept weights solve H[K, K] d = H[K, gone] w[gone]."""
    K, P = ~gone, gone
    out = torch.zeros_like(w)
    out[K] = w[K] + torch.linalg.solve(H[K][:, K], H[K][:, P] @ w[P])
    return out


def error_of(change: Tensor, H: Tensor) -> float:
    return float((change @ H * change).sum())


def damped(H: Tensor, damping: float) -> Tensor:
    """A second moment with a fraction of its mean diagonal added, float64."""
    H = H.to(torch.float64).clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    return H


def traced(W: Tensor, H: Tensor, state: Tensor | None = None, **options: Any) -> list[Plain]:
    """Every row of W (R, C) traced with the inverse of H (C, C)."""
    A = torch.linalg.inv(H).numpy()
    states = [None] * len(W) if state is None else list(state.numpy())
    rows = W.to(torch.float64).numpy()
    return [Plain(w, A, s, **options) for w, s in zip(rows, states, strict=True)]


def merged(
    rows: Sequence[Plain], count: int, block: int = 1, first: Sequence[int] | None = None
) -> list[int]:
    """The number of weights removed from each row when the layer loses ``count`` blocks, always the
    cheapest among the next ones of all rows, after the ``first`` ones of each row."""
    taken = [0] * len(rows)
    if first is not None:
        taken = list(first)
        count -= sum(taken) // block

    def offer(r: int) -> tuple[float, int]:
        return float(rows[r].loss[taken[r] : taken[r] + block].sum()), r

    heap = [offer(r) for r in range(len(rows)) if taken[r] < len(rows[r].order)]
    heapq.heapify(heap)
    for _ in range(count):
        _, r = heapq.heappop(heap)
        taken[r] += block
        if taken[r] < len(rows[r].order):
            heapq.heappush(heap, offer(r))
    return taken


def mask_of(rows: Sequence[Plain], taken: Sequence[int], columns: int) -> Tensor:
    """(R, columns) bool, True = kept: each row without the first ``taken`` of its order."""
    mask = torch.ones(len(rows), columns, dtype=torch.bool)
    for r, (row, k) in enumerate(zip(rows, taken, strict=True)):
        mask[r, row.order[:k]] = False
    return mask


def damped_error(W: Tensor, out: PrunedWeight, H: Tensor, damping: float = 0.01) -> float:
    """What pruning W cost, with the damped H."""
    return error_of(out.weight.double() - W.double(), damped(H, damping))


def per_row(out: PrunedWeight) -> list[int]:
    """Weights removed from each row."""
    return (~out.mask).sum(1).tolist()
