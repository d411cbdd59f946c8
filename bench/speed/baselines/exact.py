"""Exact removal: the loop published with OBC, and a pivoted Cholesky in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    """The outcome of exact removal for R rows.

    Costs are ``w_q**2 / D_qq``, without the published factor of a half.
    """

    order: Tensor  # (R, k) int64: columns in the order of their removal
    loss: Tensor  # (R, k)
    weights: Tensor  # (R, C), repaired


class PublishedRows:
    """A batch of rows in the loop that came with OBC, which has no licence: reimplemented.

    As published, each row owns a (C, C) inverse, all of which is rewritten at every removal, and
    the weights after every removal are kept (not with groups). Every removal takes the same time,
    so that a sample of them tells how long all of them take.
    """

    def __init__(self, W: Tensor, A: Tensor, keep: int = 0, size: int = 0) -> None:
        R, C = W.shape
        self.w = W.clone()
        self.inverse = A.expand(R, C, C).clone()
        self.dead = torch.zeros(R, C, dtype=torch.bool)
        self.size = size
        self.room = size - keep  # removals that a group may have
        self.last = C // size * self.room if size else C
        self.taken = torch.zeros(R, C // size if size else 0, dtype=torch.int64)
        self.history = None if size else torch.zeros(C + 1, R, C, dtype=W.dtype)
        if self.history is not None:
            self.history[0] = self.w
        self.order = torch.zeros(R, self.last, dtype=torch.int64)
        self.loss = torch.zeros(R, self.last, dtype=W.dtype)
        self.removed = 0

    def remove(self, count: int) -> None:
        """Remove ``count`` more weights from every row."""
        rows = torch.arange(len(self.w))
        for step in range(self.removed, self.removed + count):
            diag = self.inverse.diagonal(dim1=1, dim2=2)
            score = self.w**2 / diag
            if self.size:
                full = (self.taken >= self.room).repeat_interleave(self.size, dim=1)
                score[self.dead | full] = torch.inf
            else:
                score[self.dead] = torch.inf
            q = score.argmin(dim=1)
            self.order[:, step] = q
            self.loss[:, step] = score[rows, q]
            d = diag[rows, q]
            row = self.inverse[rows, q]
            self.w -= row * (self.w[rows, q] / d)[:, None]
            self.dead[rows, q] = True
            self.w[self.dead] = 0
            if self.history is not None:
                self.history[step + 1] = self.w
            else:
                self.taken[rows, q // self.size] += 1
            self.removed += 1
            if self.removed < self.last:
                row /= d.sqrt()[:, None]
                self.inverse -= torch.bmm(row[:, :, None], row[:, None, :])


def obc_unstructured(W: Tensor, A: Tensor, until: int | None = None, parallel: int = 32) -> Exact:
    """ExactOBS as published, ``until`` weights of every row, ``parallel`` rows at a time."""
    return _published(W, A, until, parallel)


def obc_groups(W: Tensor, A: Tensor, keep: int, size: int, parallel: int = 32) -> Exact:
    """The published N:M loop: ``keep`` of every ``size`` neighbours stay."""
    return _published(W, A, None, parallel, keep, size)


def _published(
    W: Tensor, A: Tensor, until: int | None, parallel: int, keep: int = 0, size: int = 0
) -> Exact:
    parts = []
    for w in W.split(parallel):
        rows = PublishedRows(w, A, keep, size)
        count = rows.last if until is None else until
        rows.remove(count)
        parts.append(Exact(rows.order[:, :count], rows.loss[:, :count], rows.w))
    return _joined(parts)


def exact_torch(
    W: Tensor,
    A: Tensor,
    until: int,
    keep: int = 0,
    size: int = 0,
    panel: int = 128,
    parallel: int = 32,
) -> Exact:
    """The best that torch does: a pivoted Cholesky of every row, ``parallel`` rows in step.

    A column of the current inverse is formed when it is needed, from the inverse at the start of
    the panel and the vectors since. Every ``panel`` removals these update the rows' private
    inverses by one product. Removed columns are dropped once they are half of all. Forming every
    column from A and all vectors (``panel`` >= ``until``, no private inverses) takes 1.5 to 4 times
    as long, because all vectors are then read again for every removal.
    """
    return _joined([_in_panels(w, A, until, keep, size, panel) for w in W.split(parallel)])


def _joined(parts: list[Exact]) -> Exact:
    return Exact(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _in_panels(W: Tensor, A: Tensor, until: int, keep: int, size: int, panel: int) -> Exact:
    R, C = W.shape
    panel = max(1, min(panel, until))
    rows = torch.arange(R)
    order = torch.empty(R, until, dtype=torch.int64)
    loss = torch.empty(R, until, dtype=W.dtype)
    name = torch.arange(C).expand(R, C)  # column of W that a working column stands for
    taken = torch.zeros(R, -(-C // size) if size else 0, dtype=torch.int64)
    w, diag = W.clone(), A.diagonal().expand(R, C).clone()
    dead = torch.zeros(R, C, dtype=torch.bool)
    closed = dead.clone() if size else dead  # removed, or not to be removed
    score = torch.empty_like(w)
    inverse: Tensor | None = None  # (R, C, C); None while it is A for every row
    for first in range(0, until, panel):
        width = min(panel, until - first)
        V = torch.empty(R, width, w.shape[1], dtype=W.dtype)
        for i in range(width):
            torch.mul(w, w, out=score).div_(diag).masked_fill_(closed, torch.inf)
            cost, q = score.min(dim=1, keepdim=True)  # (R, 1)
            column = A[q[:, 0]] if inverse is None else inverse[rows, q[:, 0]]
            if i:
                pick = q[:, :, None].expand(R, i, 1)
                coefficients = V[:, :i].gather(2, pick).mT  # (R, 1, i)
                column = torch.baddbmm(column[:, None], coefficients, V[:, :i], alpha=-1)[:, 0]
            scale = column.gather(1, q).rsqrt_()
            v = torch.mul(column, scale, out=V[:, i])
            w.addcmul_(v, w.gather(1, q) * scale, value=-1)
            diag.addcmul_(v, v, value=-1)
            dead.scatter_(1, q, True)
            column_removed = name.gather(1, q)
            order[:, first + i], loss[:, first + i] = column_removed[:, 0], cost[:, 0]
            if size:
                closed.scatter_(1, q, True)
                group = column_removed // size
                taken.scatter_add_(1, group, torch.ones_like(group))
                full = taken.gather(1, group) >= size - keep
                closed |= (name // size == group) & full
        done = first + width
        if done == until:
            break
        start = A.expand(R, C, C) if inverse is None else inverse
        inverse = torch.baddbmm(start, V.mT, V, alpha=-1)
        if 2 * (C - done) <= w.shape[1]:
            live = (~dead).nonzero()[:, 1].view(R, C - done)
            across = live[:, None].expand(R, C - done, C - done)
            inverse = inverse.gather(1, live[:, :, None].expand(R, C - done, w.shape[1]))
            inverse = inverse.gather(2, across)
            name, w, diag, closed = (x.gather(1, live) for x in (name, w, diag, closed))
            dead = torch.zeros_like(closed)
            closed, score = (closed if size else dead), torch.empty_like(w)
    weights = torch.zeros_like(W).scatter_(1, name, w.masked_fill_(dead, 0))
    return Exact(order, loss, weights)
