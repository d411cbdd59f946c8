"""The cheapest weight of each row, with and without temporary tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def saliency_argmin(W: Tensor, diag: Tensor, live: Tensor) -> Tensor:
    """Cheapest live column of each row, written naively: a new tensor at every step."""
    return torch.where(live, W * W / diag, torch.inf).argmin(dim=1)


def saliency_argmin_in_place(W: Tensor, diag: Tensor, removed: Tensor, cost: Tensor) -> Tensor:
    """The same in place: the caller provides ``cost`` (R, C), and ``removed`` instead of live."""
    torch.mul(W, W, out=cost)
    cost.div_(diag).masked_fill_(removed, torch.inf)
    return cost.argmin(dim=1)
