"""How many units of each family stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.errors import ArgumentError
from lobs_native.network.shrinking.units import KINDS, Family
from lobs_native.solvers.joint import Removal

__all__ = ["Counts", "Work", "divided", "kept", "share_of", "shares_of", "uniform"]

Counts = list[int]  # of the units of each family that stay
_LEAST = 0.7  # of the units that a family would keep with one share for all
_AHEAD = 8  # numbers of units below the present one that are compared


def share_of(value: Any, name: str) -> float:
    """A share in (0, 1], checked."""
    checks.sparsity(value, name)
    if not value > 0:
        raise ArgumentError(f"{name}: {value}; something has to stay, so pass more than 0")
    return float(value)


def shares_of(keep: float | Mapping[str, float]) -> dict[str, float]:
    """The share of each kind's units that stays."""
    if isinstance(keep, Mapping):
        for kind in keep:
            checks.check_choice(kind, "keep", KINDS)
        return {kind: share_of(value, f"keep[{kind!r}]") for kind, value in keep.items()}
    return dict.fromkeys(KINDS, share_of(keep, "keep"))


def kept(family: Family, share: float, multiple: int) -> int:
    """How many units stay: at least one, neurons and channels in multiples."""
    step = _step(family, multiple)
    nearest = step * math.floor(share * family.units / step + 0.5)
    return min(family.units, max(step, nearest))


class Work:
    """What the layers of some families cost: the sum, over their weights, of ``each(name, shape)``.
    ``removals`` says which units of a family go first; without one any do.
    """

    def __init__(
        self,
        model: nn.Module,
        families: Sequence[Family],
        each: Callable[[str, Sequence[int]], float],
        removals: Sequence[Removal | None] = (),
    ) -> None:
        self.each = each
        self.families = families
        self.removals = removals
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        # weight -> (family, axis, how many of its indices the first k removals take)
        self._losses: dict[str, list[tuple[int, int, Tensor]]] = {}
        for f, family in enumerate(families):
            removal = removals[f] if removals else None
            order = list(range(family.units)) if removal is None else removal.order
            when = torch.full((family.units + 1,), family.units)  # when a unit goes; -1 never does
            when[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
            for slot in family.slots:
                tensor = slot.tensor(model)
                if tensor.ndim < 2:
                    continue
                self._shapes[slot.name] = tuple(tensor.shape)
                gone = torch.bincount(when[slot.units], minlength=family.units + 1)[: family.units]
                taken = torch.cat([torch.zeros(1, dtype=gone.dtype), gone.cumsum(0)])
                self._losses.setdefault(slot.name, []).append((f, slot.axis, taken))
        self._of: list[list[str]] = [
            [name for name, losses in self._losses.items() if any(g == f for g, _, _ in losses)]
            for f in range(len(families))
        ]

    def total(self, counts: Counts) -> float:
        """Of all weights, with so many units of each family."""
        return sum(self._cost(name, counts) for name in self._losses)

    def around(self, f: int, counts: Counts) -> float:
        """Of the weights that a family concerns."""
        return sum(self._cost(name, counts) for name in self._of[f])

    def _cost(self, name: str, counts: Counts) -> float:
        shape = list(self._shapes[name])
        for f, axis, taken in self._losses[name]:
            gone = int(taken[self.families[f].units - counts[f]])
            shape[axis] = max(0, shape[axis] - gone)  # the rows of a block that goes may go already
        if 0 in shape:
            return 0.0
        key = name, tuple(shape)
        if key not in self._known:
            self._known[key] = self.each(*key)
        return self._known[key]


def uniform(work: Work, target: float, multiple: int, name: str) -> float:
    """One share for all units, so that the work is at most ``target`` of the whole."""
    whole = work.total([f.units for f in work.families])

    def left(share: float) -> float:
        return work.total([kept(f, share, multiple) for f in work.families]) / whole

    low, high = 0.0, 1.0
    if left(low) > target:
        raise _too_little(name, target, left(low))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= target else (low, middle)
    return low


def divided(work: Work, target: float, multiple: int, name: str) -> Counts:
    """How many units of each family stay, so that the work is at most ``target`` of the whole:
    again and again, those go that cost least for the work that they save.

    Costs add up only where little goes: every family keeps at least 0.7 of what it would keep with
    one share for all. Without such a bound, some families lose nearly everything, and the network
    more than with one share: ``docs/results/shrinking.md``.
    """
    families, removals = work.families, [r for r in work.removals if r is not None]
    counts = [f.units for f in families]
    spent = [
        [0.0, *torch.tensor(r.spent, dtype=torch.float64).cumsum(0).tolist()] for r in removals
    ]
    share = _LEAST * uniform(work, target, multiple, name)
    steps = [
        [n for n in _steps(f, len(r.order), multiple) if n >= share * f.units]
        for f, r in zip(families, removals, strict=True)
    ]
    whole = left = work.total(counts)

    def saved_by(f: int, n: int) -> float:
        return work.around(f, counts) - work.around(f, [*counts[:f], n, *counts[f + 1 :]])

    def cost(f: int, n: int) -> float:
        return float(spent[f][families[f].units - n] - spent[f][families[f].units - counts[f]])

    while left > target * whole:
        choices = [
            (cost(f, n) / saved, f, n, saved)
            for f in range(len(families))
            for n in [n for n in steps[f] if n < counts[f]][:_AHEAD]
            if (saved := saved_by(f, n)) > 0
        ]
        if not choices:
            raise _too_little(name, target, left / whole)
        _, f, n, saved = min(choices)
        counts[f], left = n, left - saved
    while True:  # the last step may have gone further than it had to
        fitting = [
            (cost(f, n), f, n, saved)
            for f, family in enumerate(families)
            for n in [n for n in (family.units, *steps[f]) if n > counts[f]]
            if left - (saved := saved_by(f, n)) <= target * whole
        ]
        if not fitting or min(fitting)[0] >= 0:
            return counts
        _, f, n, saved = min(fitting)
        counts[f], left = n, left - saved


def _steps(family: Family, removable: int, multiple: int) -> list[int]:
    """The numbers of units that may stay, falling."""
    step = _step(family, multiple)
    least = max(family.units - removable, min(step, family.units))
    return [n for n in range(family.units - 1, least - 1, -1) if n % step == 0]


def _step(family: Family, multiple: int) -> int:
    """What numbers of its units are multiples of."""
    return multiple if family.kind in ("neurons", "channels") else 1


def _too_little(name: str, target: float, least: float) -> ArgumentError:
    return ArgumentError(
        f"{name}: {target:g}; with the fewest units that can stay it is {least:.3g}, so pass more, "
        "or a smaller multiple"
    )
