"""The protocol of methods: they choose what is removed; repair and measurement are shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lobs_native.solvers.costs import Costs
from lobs_native.solvers.extent import Extent, Flops, MemoryPlan
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
    factor_alone: ClassVar[bool] = False  # a factor of the second moment serves as well
    optimal: ClassVar[bool] = True  # its kept weights are the best for their mask; this is checked
    thresholds: ClassVar[bool] = False  # implements choose_below
    in_blocks: ClassVar[bool] = False  # processes share its rows in whole blocks (``rows.blocks``)
    compares_layers: ClassVar[bool] = False  # implements cheapest: layers can share one budget

    # ---- plans, before there is a problem --------------------------------------------------------

    @classmethod
    def matrices(cls, extent: Extent) -> int:
        """Bytes of inverses, weights and temporaries, at the most at one time; besides second
        moments and the layer's own weights. They are for processes as measured, with what kernels
        and libraries take in between.

        By default an inverse and a copy of it, or of the second moment, and of the weights as many
        as when the best ones for a mask are sought.
        """
        size = extent.kernel.itemsize
        square = size + 8 * (cls.inverts or extent.inverted)
        return square * extent.squares + (6 * size + 2) * extent.weights

    @classmethod
    def memory(
        cls, extent: Extent, *, limit: int | None = None, backend: str | None = None
    ) -> MemoryPlan:
        """All that the method takes, where kernels get ``limit`` bytes of scratch at most. Raises
        MemoryError if that is less than :meth:`least_scratch`."""
        rows = extent.groups * extent.rows
        return MemoryPlan(
            rows=rows,
            columns=extent.order,
            threads=0,
            scratch=0,
            trace=0,
            matrices=cls.matrices(extent),
            private_inverses=min(rows, 32) * extent.kernel.itemsize * extent.order**2,
        )

    @classmethod
    def least_scratch(cls, extent: Extent, backend: str | None) -> int:
        """Bytes of scratch without which its kernels cannot work."""
        return 0

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """The arithmetic of a layer. By default that of inverting, and of measuring the error."""
        inverting = 2.0 * extent.order * extent.squares if cls.inverts else 0.0
        return Flops(double=inverting + 4.0 * extent.order * extent.weights)

    @classmethod
    def flops_by_row(cls, extent: Extent) -> Flops:
        """That part of :meth:`flops` which processes divide by rows where the problem's workspace
        shares them. By default none: each does all of it."""
        return Flops()

    # ---- choices ---------------------------------------------------------------------------------

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
