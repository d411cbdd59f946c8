"""Sparsity patterns: which weights of a row are removed together, one frozen dataclass each."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
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
    "Columns",
    "GroupsOf",
    "Pattern",
    "Unstructured",
    "goes_first",
    "pattern_of",
]

FORCED, ZERO = -2.0, -1.0  # scores below every real one: masked out already, zero already


class Pattern(ABC):
    """What methods ask of a pattern. A subclass answers only where it differs from single weights.

    Methods remove *units*: ``unit`` neighbouring inputs of a row, together. Where ``is_grouped``,
    the pattern alone decides how many: ``per_group`` of every ``group`` neighbouring inputs.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The pattern as users write it."""

    @property
    def unit(self) -> int:
        """Weights of a row that are removed together."""
        return 1

    @property
    def group(self) -> int:
        """Neighbouring inputs of a row that form a group; 0 without groups."""
        return 0

    @property
    def per_group(self) -> int:
        """Weights that every group loses; 0 without groups."""
        return 0

    @property
    def is_grouped(self) -> bool:
        """Whether the pattern itself determines the sparsity."""
        return self.group > 0

    @property
    def is_unstructured(self) -> bool:
        """Whether single weights are removed, whatever their neighbours."""
        return False

    @property
    def exchanges(self) -> bool:
        """Whether single weights can be swapped: a kept one for a removed one."""
        return True

    @property
    def whole_inputs(self) -> bool:
        """Whether a unit is removed from all rows, so that the layer no longer reads an input."""
        return False

    @property
    def sparsity(self) -> float | None:
        """The share of weights that the pattern removes; None where a target decides."""
        return None

    def unit_scores(self, score: Tensor) -> Tensor:
        """Scores (..., C / unit) of whole units from those of their weights (..., C)."""
        return score

    def expand(self, units: Tensor) -> Tensor:
        """Bool (..., C) of weights from bool (..., C / unit) of whole units."""
        return units.repeat_interleave(self.unit, -1) if self.unit > 1 else units

    @abstractmethod
    def cuts(self, in_features: int, order: int, width: int) -> list[int]:
        """Bounds of column blocks, about ``width`` wide, which divide no unit and no group: rising
        from 0 to ``order``, which is ``in_features`` and the bias."""

    @abstractmethod
    def check_fit(self, in_features: int, mask: Tensor | None, *, prune_bias: bool) -> None:
        """Raise PatternError or ArgumentError if rows of ``in_features`` weights with this mask
        (..., in_features) cannot have the pattern."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be removed, whatever its neighbours."""

    @property
    def name(self) -> str:
        """The pattern as users write it."""
        return "unstructured"

    @property
    def is_unstructured(self) -> bool:
        """See :class:`Pattern`."""
        return True

    def cuts(self, in_features: int, order: int, width: int) -> list[int]:
        """See :class:`Pattern`."""
        return [*range(0, order, width), order]

    def check_fit(self, in_features: int, mask: Tensor | None, *, prune_bias: bool) -> None:
        """Accept any row."""


class _Neighbours(Pattern):
    """Patterns of ``size`` neighbouring inputs of a row, which have no place for a bias."""

    size: int

    def cuts(self, in_features: int, order: int, width: int) -> list[int]:
        """See :class:`Pattern`; a bias has a block of its own."""
        step = max(self.size, width // self.size * self.size)
        return [*range(0, in_features, step), in_features] + [order] * (order > in_features)

    def check_fit(self, in_features: int, mask: Tensor | None, *, prune_bias: bool) -> None:
        """See :class:`Pattern`."""
        if in_features % self.size:
            raise PatternError(
                f"pattern: {self.name!r} does not divide rows of {in_features} weights; leave this "
                "layer out or prune it unstructured"
            )
        if prune_bias:
            raise ArgumentError(f"prune_bias: pattern {self.name!r} cannot include a bias")
        if mask is not None:
            self._check_mask(mask.reshape(*mask.shape[:-1], -1, self.size))

    @abstractmethod
    def _check_mask(self, mask: Tensor) -> None:
        """ArgumentError for a mask (..., C / size, size) that the pattern does not allow."""


@dataclass(frozen=True)
class GroupsOf(_Neighbours):
    """N:M: of every ``size`` neighbouring inputs of a row, ``keep`` stay."""

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
        """The pattern as users write it."""
        return f"{self.keep}:{self.size}"

    @property
    def group(self) -> int:
        """See :class:`Pattern`."""
        return self.size

    @property
    def per_group(self) -> int:
        """See :class:`Pattern`."""
        return self.size - self.keep

    @property
    def sparsity(self) -> float:
        """The share of weights that this pattern removes."""
        return 1 - self.keep / self.size

    def _check_mask(self, mask: Tensor) -> None:
        most = int((~mask).sum(-1).max())
        if most > self.per_group:
            raise ArgumentError(
                f"mask: it removes {most} of {self.size} in some group, but pattern "
                f"{self.name!r} keeps {self.keep}"
            )


class _Together(_Neighbours):
    """``size`` neighbouring inputs are kept or removed together."""

    @property
    def exchanges(self) -> bool:
        """See :class:`Pattern`."""
        return False

    @property
    def unit(self) -> int:
        """See :class:`Pattern`."""
        return self.size


@dataclass(frozen=True)
class Blocks(_Together):
    """1 x b: ``size`` neighbouring inputs of a row are kept or removed together."""

    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= ops.MAX_BLOCK:
            raise PatternError(
                f"pattern: '1x{self.size}'; blocks have 1 to {ops.MAX_BLOCK} weights"
            )

    @property
    def name(self) -> str:
        """The pattern as users write it."""
        return f"1x{self.size}"

    def unit_scores(self, score: Tensor) -> Tensor:
        """See :class:`Pattern`: the sum of a block's scores, FORCED or ZERO where all of it is."""
        blocks = score.reshape(*score.shape[:-1], -1, self.size)
        total = blocks.clamp_min(0.0).sum(-1)
        total[(blocks < 0).all(-1)] = ZERO
        total[(blocks == FORCED).all(-1)] = FORCED
        return total

    def _check_mask(self, mask: Tensor) -> None:
        if not bool((mask == mask[..., :1]).all()):
            raise ArgumentError(f"mask: it does not consist of whole {self.name} blocks")


@dataclass(frozen=True)
class Columns(_Together):
    """``size`` neighbouring inputs are kept or removed together, by all rows: columns of the weight
    matrix. A layer without them is a smaller dense layer."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PatternError(f"pattern: '{self.size} columns'; at least 1 is removed together")

    @property
    def name(self) -> str:
        """The pattern as users write it."""
        return "columns" if self.size == 1 else f"{self.size} columns"

    @property
    def whole_inputs(self) -> bool:
        """See :class:`Pattern`."""
        return True

    def _check_mask(self, mask: Tensor) -> None:
        if not bool((mask == mask[..., :1, :, :1]).all()):
            raise ArgumentError(f"mask: it does not consist of {self.name} of all rows")


PATTERNS: tuple[type[Pattern], ...] = (Unstructured, GroupsOf, Blocks, Columns)
_WRITTEN: dict[str, Callable[..., Pattern]] = {
    "unstructured": Unstructured,
    r"(\d{1,6}):(\d{1,6})": GroupsOf,
    r"1x(\d{1,6})": Blocks,
    "columns": Columns,
    r"(\d{1,6}) columns": Columns,
}


def pattern_of(pattern: object) -> Pattern:
    """The pattern that a user names or passes. Raises PatternError for an unknown name, DtypeError
    for another type."""
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise DtypeError(
            f"pattern: expected a name or a pattern object, got {type(pattern).__name__}"
        )
    for written, make in _WRITTEN.items():
        if match := re.fullmatch(written, pattern):
            return make(*map(int, match.groups()))
    raise PatternError(
        f"pattern: {pattern!r} is not a pattern; use 'unstructured', 'N:M' (keep N of M, as "
        "'2:4'), '1xB' (as '1x4'), 'columns', or 'B columns' (as '64 columns')"
    )


def goes_first(forced: Tensor, zero: Tensor, group: int, per_group: int) -> Tensor:
    """Which weights (..., B) of whole groups are removed before all others: those that the mask
    removes, and existing zeros as far as the group has room for them."""
    groups = (*forced.shape[:-1], -1, group)
    demanded, extra = forced.reshape(groups), (zero & ~forced).reshape(groups)
    room = per_group - demanded.sum(-1, keepdim=True)
    return (demanded | (extra & (extra.cumsum(-1) <= room))).reshape(forced.shape)
