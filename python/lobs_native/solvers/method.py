"""The protocol of methods: they choose what is removed; repair and measurement are shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lobs_native.solvers.costs import Costs
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem

__all__ = ["Choice", "Method"]


@dataclass(frozen=True)
class Choice:
    """What a method removes.

    ``weights`` are there if the method has repaired (or deliberately left) the kept weights in its
    own way. None leaves that to :func:`lobs_native.solvers.repair.repair`: the best weights for
    ``removed``.
    """

    removed: Tensor  # (G, R, D) bool
    weights: Tensor | None = None  # (G, R, D) in the unit of ``Problem.before``, zero where removed


class Method(ABC):
    """A way to choose the weights of one layer that are removed.

    One object serves one problem and may be asked for several choices. It never writes to the
    problem, but may take notes in ``problem.workspace``. Subclasses are entered in
    ``solvers/methods.py``; the class variables are what the rest of the package has to know of a
    method before it runs.

    Parameters
    ----------
    problem : Problem
        With inverses if ``inverts``.
    pattern : Pattern
        Which weights are removed together; it fits the rows.
    importance : (G, R) float, optional
        Factors on what a row's removals cost. Methods that do not compare rows by cost ignore it.
    """

    inverts: ClassVar[bool] = True  # needs the inverse of the second moment
    optimal: ClassVar[bool] = True  # its kept weights are the best for their mask; this is checked
    thresholds: ClassVar[bool] = False  # implements choose_below
    compares_layers: ClassVar[bool] = False  # implements cheapest: layers can share one budget

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        self.problem = problem
        self.pattern = pattern
        self.importance = importance

    @abstractmethod
    def choose(self, share: float, scope: str) -> Choice:
        """Remove a share of the candidates: ``nearest_count`` of them over the whole layer (scope
        "layer") or in every row ("row"), masked weights and zeros first, ties to the lowest row,
        then column. Where the pattern is grouped, it alone says how many."""

    def choose_below(self, threshold: float) -> Choice:
        """Remove every weight whose saliency is at or below ``threshold``."""
        raise NotImplementedError(f"{type(self).__name__} has no saliencies to compare")

    def choose_masked(self) -> Choice:
        """Remove what the user's mask removes, and nothing else."""
        return Choice(self.problem.masked())

    def prepare(self) -> None:  # noqa: B027 (few methods have anything to prepare)
        """Do what choices at all shares have in common; called before a search over shares."""

    def cheapest(self, units: int) -> tuple[Tensor, float]:
        """Costs of the ``units`` cheapest removals of the layer, (units,) float64, ascending; and
        what a cost of one is in tr(dW H dW^T), infinite beyond float64."""
        raise NotImplementedError(f"{type(self).__name__} does not compare layers")

    def costs(self, removed: Tensor, scope: str) -> Costs | None:
        """What the removals of the latest choices add up to. None where the method has no such sum,
        or not for ``removed`` (G, R, D)."""
        return None
