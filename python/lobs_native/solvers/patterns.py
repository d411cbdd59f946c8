"""Which weights may go together: one frozen dataclass per sparsity pattern, and their list."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lobs_native import ops
from lobs_native.errors import ArgumentError, DtypeError, PatternError

__all__ = [
    "FORCED",
    "PATTERNS",
    "ZERO",
    "Blocks",
    "GroupsOf",
    "Pattern",
    "Unstructured",
    "check_fit",
    "pattern_of",
]

FORCED, ZERO = -2.0, -1.0  # scores below every real one: masked out already, zero already


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be removed, whatever its neighbours."""

    @property
    def name(self) -> str:
        """As users write it."""
        return "unstructured"


@dataclass(frozen=True)
class GroupsOf:
    """N:M: of every ``size`` neighbouring inputs, ``keep`` weights are kept; ``GroupsOf(2, 4)`` is
    "2:4"."""

    keep: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.size or self.size < 1:
            raise PatternError(
                f"pattern: '{self.keep}:{self.size}' keeps {self.keep} of {self.size}; it must "
                "keep 0 to all of at least one"
            )

    @property
    def name(self) -> str:
        """As users write it."""
        return f"{self.keep}:{self.size}"

    @property
    def sparsity(self) -> float:
        """The share of weights that this pattern removes."""
        return 1 - self.keep / self.size


@dataclass(frozen=True)
class Blocks:
    """1 x b: ``size`` neighbouring inputs of a row are kept or removed together."""

    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= ops.MAX_BLOCK:
            raise PatternError(
                f"pattern: '1x{self.size}'; blocks have 1 to {ops.MAX_BLOCK} weights"
            )

    @property
    def name(self) -> str:
        """As users write it."""
        return f"1x{self.size}"

    def scores(self, score: Tensor) -> Tensor:
        """Scores (..., C / size) of whole blocks from those of their weights (..., C)."""
        blocks = score.reshape(*score.shape[:-1], -1, self.size)
        total = blocks.clamp_min(0.0).sum(-1)
        total[(blocks < 0).all(-1)] = ZERO
        total[(blocks == FORCED).all(-1)] = FORCED
        return total


Pattern = Unstructured | GroupsOf | Blocks
PATTERNS: tuple[type[Pattern], ...] = (Unstructured, GroupsOf, Blocks)
_WRITTEN: dict[str, Callable[[int, int], Pattern]] = {
    r"(\d{1,6}):(\d{1,6})": GroupsOf,
    r"(1)x(\d{1,6})": lambda _, size: Blocks(size),
}


def pattern_of(pattern: object) -> Pattern:
    """The pattern that a user means by an object or a name. Raises PatternError for anything
    else."""
    if isinstance(pattern, PATTERNS):
        return pattern
    if not isinstance(pattern, str):
        raise DtypeError(
            f"pattern: expected a name or a pattern object, got {type(pattern).__name__}"
        )
    if pattern == "unstructured":
        return Unstructured()
    for written, make in _WRITTEN.items():
        if match := re.fullmatch(written, pattern):
            return make(int(match[1]), int(match[2]))
    raise PatternError(
        f"pattern: {pattern!r} is not a pattern; use 'unstructured', 'N:M' (keep N of M, as '2:4') "
        "or '1xB' (as '1x4')"
    )


def check_fit(pattern: Pattern, columns: int, mask: Tensor | None, prune_bias: bool) -> None:
    """PatternError or ArgumentError if rows of ``columns`` cannot have this pattern."""
    if isinstance(pattern, Unstructured):
        return
    if columns % pattern.size:
        raise PatternError(
            f"pattern: {pattern.name!r} does not divide rows of {columns} weights; leave this "
            "layer out or prune it unstructured"
        )
    if prune_bias:
        raise ArgumentError(f"prune_bias: a bias has no place in pattern {pattern.name!r}")
    if mask is None:
        return
    grouped = mask.reshape(*mask.shape[:-1], -1, pattern.size)
    if isinstance(pattern, Blocks) and not bool((grouped == grouped[..., :1]).all()):
        raise ArgumentError(f"mask: it is not made of whole {pattern.name} blocks")
    if isinstance(pattern, GroupsOf):
        most = int((~grouped).sum(-1).max())
        if most > pattern.size - pattern.keep:
            raise ArgumentError(
                f"mask: it removes {most} of {pattern.size} in some group, but pattern "
                f"{pattern.name!r} keeps {pattern.keep}"
            )
