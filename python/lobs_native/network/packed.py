"""Masks as bits, an eighth of what bool tensors take, for as long as a network is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedMask", "packed_bytes"]


@dataclass(frozen=True)
class PackedMask:
    """A bool tensor of any shape, on its device."""

    bits: Tensor  # (ceil(entries / 8),) uint8, the first entry in the lowest bit
    shape: torch.Size
    removed: int  # entries that are False

    @classmethod
    def of(cls, mask: Tensor) -> PackedMask:
        """Pack a bool tensor; it is not modified."""
        entries = mask.reshape(-1).view(torch.uint8)
        bits = entries.new_zeros(packed_bytes(len(entries)))
        for place in range(8):
            of_place = entries[place::8]
            bits[: len(of_place)] |= of_place << place
        return cls(bits, mask.shape, len(entries) - int(mask.sum()))

    def unpacked(self) -> Tensor:
        """The bool tensor."""
        entries = torch.empty(self.shape.numel(), dtype=torch.uint8, device=self.bits.device)
        for place in range(8):
            of_place = entries[place::8]
            of_place.copy_(self.bits[: len(of_place)] >> place & 1)
        return entries.view(torch.bool).view(self.shape)


def packed_bytes(entries: int) -> int:
    """The bytes of so many bits."""
    return -(-entries // 8)
