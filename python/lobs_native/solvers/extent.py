"""What is known of a layer before its problem exists, and what a method plans for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Extent", "Flops", "MemoryPlan"]


@dataclass(frozen=True)
class Extent:
    """The size of a problem, and what will be asked of the method that solves it."""

    groups: int  # G
    rows: int  # R, of one group
    order: int  # D
    share: float  # of the weights, to remove
    dtype: torch.dtype  # of the weights
    searched: bool = False  # choices at several shares, until the error is the wanted one
    shared: bool = False  # costs of removals first, from which layers share one budget
    inverted: bool = False  # the inverse is needed whatever the method: to correct, or to refine
    samples: float = math.inf  # of which the second moments are, as far as known

    @property
    def kernel(self) -> torch.dtype:
        """What the kernels compute in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def weights(self) -> int:
        """G * R * D."""
        return self.groups * self.rows * self.order

    @property
    def squares(self) -> int:
        """G * D * D."""
        return self.groups * self.order**2


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, by the speed at which they are carried out."""

    single: float = 0.0  # in large products of float32
    double: float = 0.0  # in large products of float64, and in its inverses
    removal: float = 0.0  # in the kernel of exact removal

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.single + other.single, self.double + other.double, self.removal + other.removal
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a method needs besides its inputs; ``str()`` is meant for people."""

    rows: int
    columns: int
    threads: int  # that the limit allows; on a device, rows in flight; 0 without scratch
    scratch: int  # of all of them
    trace: int  # order and cost of every removal
    matrices: int  # inverse, weights and temporaries
    private_inverses: int  # of the published exact algorithm: one inverse per row, for 32 rows

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.scratch + self.trace + self.matrices

    def __str__(self) -> str:
        def mb(size: int) -> str:
            return f"{size / 1e6:,.0f} MB"

        parts = [f"{mb(self.matrices)} matrices"]
        if self.threads:
            parts = [
                f"{mb(self.scratch)} scratch for {self.threads} rows at a time",
                f"{mb(self.trace)} trace",
                *parts,
            ]
        return f"{self.rows} x {self.columns}: {mb(self.total)} = {' + '.join(parts)}"
