"""Stacked experts as in transformers, and rows routed to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Experts(nn.Module):
    """Stacked as in transformers; with ``transposed`` as in GPT-OSS, with biases."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.is_transposed = 4, transposed
        up, down = ((4, 6, 16), (4, 8, 6)) if transposed else ((4, 16, 6), (4, 6, 8))
        self.gate_up_proj = nn.Parameter(torch.randn(up).double())
        self.down_proj = nn.Parameter(torch.randn(down).double())
        if transposed:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 16).double())
            self.down_proj_bias = nn.Parameter(torch.randn(4, 6).double())

    def product(self, x: Tensor, part: str, e: Tensor) -> Tensor:
        weight = getattr(self, part)
        if self.is_transposed:
            return x @ weight[e] + getattr(self, f"{part}_bias")[e]
        return functional.linear(x, weight[e])

    def hidden(self, x: Tensor, e: Tensor) -> Tensor:
        gate, up = self.product(x, "gate_up_proj", e).chunk(2, -1)
        return functional.silu(gate) * up

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique():
            rows = (chosen == e).nonzero()[:, 0]
            out[rows] += self.product(self.hidden(x[rows], e), "down_proj", e)
        return out


def routed(counts: list[int]) -> tuple[Tensor, Tensor]:
    """Random rows and their experts: ``counts[e]`` rows for expert e."""
    torch.manual_seed(1)
    chosen = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    order = torch.randperm(len(chosen))
    return torch.randn(len(chosen), 6).double(), chosen[order, None]
