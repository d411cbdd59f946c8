"""A small stack of attention-like blocks, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Like a transformer block: three layers that read one tensor, then two in a row, each part
    with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        y = self.norm(x)
        weights = torch.softmax(self.q(y) @ self.k(y).mT * scale + (0 if mask is None else mask), 2)
        x = x + weights @ self.v(y)
        return (x + self.down(torch.relu(self.up(self.norm(x)))), weights)


class Model(nn.Module):
    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)
        self.forwards = 0

    def between(self, x: Tensor, i: int) -> dict[str, Any]:
        return {"scale": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(x)
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(
            torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e4
        )
        for i, layer in enumerate(self.layers):
            x = layer(x, mask=mask, **self.between(x, i))[0]
        return self.head(x)


def made(kind: type[Model] = Model, **options: Any) -> Model:
    torch.manual_seed(3)
    return kind(**options)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(6, 7, 5, generator=generator) for _ in range(count)]
