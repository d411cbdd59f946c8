"""A step of conjugate gradients on the kept columns of each row, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def step(w: Tensor, g: Tensor, p: Tensor, h: Tensor, removed: Tensor, rr: Tensor) -> None:
    """Written as the formula: a new tensor at every step."""
    h = h.masked_fill(removed, 0)
    q = (p.double() * h.double()).sum(dim=1)
    a = torch.where(q > 0, rr / q, 0.0).to(w.dtype)[:, None]
    w += a * p
    g -= a * h
    t = g.double().square().sum(dim=1)
    p.copy_(g + (t / rr).to(w.dtype)[:, None] * p)
    rr.copy_(t)


def step_in_place(w: Tensor, g: Tensor, p: Tensor, h: Tensor, removed: Tensor, rr: Tensor) -> None:
    """In place, with sums in float32 by products of vectors. Overwrites h."""
    h.masked_fill_(removed, 0)
    q = torch.linalg.vecdot(p, h).double()
    a = torch.where(q > 0, rr / q, 0.0).to(w.dtype)[:, None]
    w.addcmul_(a, p)
    g.addcmul_(a, h, value=-1)
    t = torch.linalg.vecdot(g, g).double()
    p.mul_((t / rr).to(w.dtype)[:, None]).add_(g)
    rr.copy_(t)
