"""Removal of units that several layers read: one costs the sum of what all its readers lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.problem import Problem, in_errors

__all__ = ["Reader", "Removal", "cheapest_first", "joint_removal"]


@dataclass(frozen=True)
class Reader:
    """A layer that reads units: ``problem`` with one second moment, which is inverted; ``columns``
    (C,) int64, the unit of each input, or -1; ``importance`` multiplies its errors."""

    problem: Problem
    columns: Tensor
    importance: float = 1.0

    def layer(self, units: int) -> ops.ColumnLayer:
        """The inputs that are units, in the order of the units."""
        order = self.columns.argsort(stable=True)
        order = order[self.columns[order] >= 0]
        counts = self.columns[order].bincount(minlength=units)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        inverse = self.problem.inverses[0]
        scale = in_errors(inverse.scale, self.problem.exponent) * self.importance
        w = self.problem.working(0, torch.float64)[:, order]
        return ops.ColumnLayer(w, inverse.A[order][:, order], start.to(w.device), scale)


@dataclass(frozen=True)
class Removal:
    """An order in which units can be removed, and what each removal costs."""

    order: list[int]
    spent: list[float]


def joint_removal(readers: Sequence[Reader], units: int, parts: Sequence[Tensor] = ()) -> Removal:
    """Remove the unit that costs least in all readers together, repair all of them, and repeat.

    Parameters
    ----------
    readers : Sequence[Reader]
        At least one. A unit need not be read by all of them, and may have any number of columns.
        Not modified.
    units : int
        How many there are.
    parts : Sequence[(n,) int64]
        Sets of units of which one has to stay each: what one layer makes. One unit stays always.

    Returns
    -------
    Removal
        Every prefix of its order is the choice for its length. The costs are the errors
        ``tr(dW H dW^T)`` of all readers, damped, times their importances.
    """
    sets = [torch.tensor(sorted(part), dtype=torch.int64) for part in _sets(units, parts)]
    layers = [reader.layer(units) for reader in readers]
    backend = readers[0].problem.workspace.backend
    trace = ops.columns_trace(layers, units, sets=sets, backend=backend)
    return Removal(trace.order, trace.cost)


def cheapest_first(
    readers: Sequence[Reader], units: int, parts: Sequence[Tensor], scores: Sequence[Tensor]
) -> Removal:
    """Units by the sums of the scores (C,) of their columns in all readers, without repair; as many
    stay as :func:`joint_removal` leaves."""
    total = torch.zeros(units, dtype=torch.float64)
    for reader, score in zip(readers, scores, strict=True):
        known = reader.columns >= 0
        total.index_add_(0, reader.columns[known].cpu(), score[known].cpu())
    sets = _sets(units, parts)
    order = []
    for unit in total.argsort(stable=True).tolist():
        if all(len(part) > 1 for part in sets if unit in part):
            order.append(unit)
            for part in sets:
                part.discard(unit)
    return Removal(order, total[order].tolist())


def _sets(units: int, parts: Sequence[Tensor]) -> list[set[int]]:
    """Those of which one unit has to stay each, the set of all units included."""
    return [*(set(part.tolist()) - {-1} for part in parts), set(range(units))]
