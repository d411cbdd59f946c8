"""Between two matrix products of ADMM, with torch: naively, and in place as fast as torch can."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What an iteration reads and writes, and room for temporary values."""

    p: Tensor
    d: Tensor
    x: Tensor
    removed: Tensor
    y: Tensor
    cost: Tensor
    below: Tensor  # bool


class Plan(NamedTuple):
    """``count`` weights of all, or of each row; or ``per_group`` of every ``group`` columns."""

    count: int
    by_row: bool = False
    group: int = 0
    per_group: int = 0


def step_by_topk(s: State, plan: Plan) -> int:
    """Written as the formula: a new tensor at every step, and the lowest by ``topk``."""
    y = (s.p + s.x) + torch.where(s.removed, -(s.d + s.x), 0.0)
    cost = y.abs()
    count = plan.per_group or plan.count
    pools = cost.view(-1, plan.group) if plan.group else cost if plan.by_row else cost.view(1, -1)
    lowest = pools.topk(count, dim=1, largest=False, sorted=False).indices
    now = torch.zeros_like(pools, dtype=torch.bool).scatter_(1, lowest, True).view_as(y)
    changed = int((now & ~s.removed).sum())
    s.d.copy_(torch.where(now, -y, y) - s.x)
    s.removed.copy_(now)
    return changed


def step_by_kthvalue(s: State, plan: Plan) -> int:
    """In place, with ``kthvalue`` for the cut. More go where several are equal to it."""
    _price(s)
    if plan.by_row:
        torch.le(s.cost, s.cost.kthvalue(plan.count, dim=1, keepdim=True).values, out=s.below)
    else:
        torch.le(s.cost, s.cost.view(-1).kthvalue(plan.count).values, out=s.below)
    return _finish(s)


def step_by_histogram(s: State, plan: Plan) -> int:
    """In place; the cut of all by a histogram of the keys' upper half, then by ``kthvalue`` of the
    few that share it."""
    _price(s)
    keys = s.cost.view(-1).view(torch.int16)[1::2]  # little-endian: the upper halves
    total = torch.bincount(keys, minlength=1 << 15).cumsum(0)
    digit = int(torch.searchsorted(total, plan.count))
    before = int(total[digit - 1]) if digit else 0
    inside = s.cost.view(-1)[keys == digit]
    torch.le(s.cost, inside.kthvalue(plan.count - before).values, out=s.below)
    return _finish(s)


def step_by_network(s: State, plan: Plan) -> int:
    """In place; 2:4 by comparing all pairs of a group, without sorting. Columns are slices."""
    assert (plan.group, plan.per_group) == (4, 2)
    _price(s)
    a = [s.cost[:, i::4] for i in range(4)]
    below = {(i, j): a[i] <= a[j] for i in range(4) for j in range(i + 1, 4)}
    for i in range(4):
        # The number of columns that go before column i: earlier ones also where they are equal.
        before = torch.zeros_like(a[i], dtype=torch.uint8)
        for j in range(4):
            if j < i:
                before += below[j, i]
            elif j > i:
                before += ~below[i, j]
        s.below[:, i::4] = before < 2
    return _finish(s)


def _price(s: State) -> None:
    """y, and |y| as the cost."""
    torch.add(s.d, s.x, out=s.cost)
    s.cost.mul_(s.removed)
    torch.add(s.p, s.x, out=s.y).sub_(s.cost)
    torch.abs(s.y, out=s.cost)


def _finish(s: State) -> int:
    """d and removed from y and what is to go."""
    changed = int(torch.gt(s.below, s.removed, out=s.removed).sum())
    s.removed.copy_(s.below)
    torch.where(s.below, torch.neg(s.y, out=s.cost), s.y, out=s.d)
    s.d.sub_(s.x)
    return changed
