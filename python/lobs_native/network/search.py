"""A search over divisions of one budget, by pruning the network with each of them.

Costs of removals (``allocation``) are those of one layer at a time, on the original network. What
layers make up for one another, and what several errors do together, only shows in the pruned
network. So the network is pruned with one division after another, each time as a whole, with
everything that pruning does, and its output is measured on batches that nothing is calibrated on.

A division follows from factors on the layers' costs, so that all of them keep the budget and its
bounds to the weight. One kind of layer after another (layers whose names differ in numbers alone)
gets a larger factor, or a smaller one; so do all layers, in proportion to their place in the order.
What is better is kept. After every round in which a kind got no better, its steps are halved. This
is a pattern search (Hooke & Jeeves 1961); to search over layers' sparsities by the network's
output is the idea of EvoPress (Sieberling et al. 2025), which changes single layers at random
and needs thousands of cheap evaluations.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from lobs_native.network.allocation import Costs, shares

__all__ = ["Evaluation", "Record", "Search"]

_STEP = math.log(2.0)  # of the logarithm of a factor, at first
_FEW = 12  # layers up to which each is a kind of its own
_NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network that was pruned and measured."""

    loss: float  # on the batches held back
    seconds: float  # that it took


class Record(Protocol):
    """Where evaluations are kept, such as a run directory."""

    def evaluations(self) -> list[Evaluation]:
        """Those made before, in order."""

    def keep_evaluation(self, evaluation: Evaluation) -> None:
        """Keep one more."""


class Search:
    """A search that begins with the division by costs alone, and never ends with a worse one.

    Parameters
    ----------
    costs : {name: Costs}
        Of the layers that share the budget, in their order.
    weights : {name: int}
        How many weights of each may be removed.
    evaluate : callable
        Prunes the network to the sparsities {name: share}, and returns the loss. The network is the
        original one before and afterwards.
    record : Record, optional
        Evaluations that are there are not made again: the search takes the same way.
    """

    def __init__(
        self,
        costs: Mapping[str, Costs],
        weights: Mapping[str, int],
        evaluate: Callable[[Mapping[str, float]], float],
        record: Record | None = None,
    ) -> None:
        self.costs, self.weights = costs, weights
        self.evaluate, self.record = evaluate, record
        self.made: list[Evaluation] = []
        self._known = [] if record is None else record.evaluations()
        self._seen: dict[tuple[int, ...], float] = {}  # removals of all layers -> loss

    def shares(self, logarithms: Mapping[str, float]) -> dict[str, float]:
        """name -> sparsity, for logarithms of the factors on the layers' costs."""
        counts = self._counts(logarithms)
        return {name: n / self.weights[name] for name, n in counts.items()}

    def _counts(self, logarithms: Mapping[str, float]) -> dict[str, int]:
        parts = [
            dataclasses.replace(cost, values=cost.values * math.exp(logarithms.get(name, 0.0)))
            for name, cost in self.costs.items()
        ]
        return dict(zip(self.costs, shares(parts), strict=True))

    def best(self, evaluations: int, seconds: float | None = None) -> dict[str, float]:
        """The best division of at most so many besides the first; none is begun after so many
        seconds of evaluations, those on record included."""
        logarithms = dict.fromkeys(self.costs, 0.0)
        least = self._loss(logarithms)
        assert least is not None  # nothing was made before it
        directions = list(self._directions())
        steps = [_STEP] * len(directions)
        allowed = lambda: len(self.made) <= evaluations and (  # noqa: E731
            seconds is None or sum(x.seconds for x in self.made) < seconds
        )
        while allowed() and max(steps, default=0.0) > _STEP / 8:
            for i, direction in enumerate(directions):
                for step in (steps[i], -steps[i]):
                    moved = {k: x + step * direction[k] for k, x in logarithms.items()}
                    loss = self._loss(moved) if allowed() else None
                    if loss is not None and loss < least:
                        least, logarithms = loss, moved
                        break
                else:
                    steps[i] /= 2
        return self.shares(logarithms)
