"""A search over divisions of one budget, by pruning the network with each of them.

Costs of removals (``allocation``) are those of one layer at a time, on the original network. What
layers make up for one another, and what several errors do together, only shows in the pruned
network. So the network is pruned with one division after another, each time as a whole, with
everything that pruning does, and its output is measured on batches that nothing is calibrated on.

A division follows from factors on the layers' costs, so that all of them keep the budget and its
bounds to the weight. One kind of layer after another (a layer; of more than 12, those whose
names differ in numbers alone) gets twice the factor, or half of it; and, of more than 12, all
layers by their place in the order. What is better is kept, and the step of what got no better is
halved. This is a pattern search (Hooke & Jeeves 1961). To search over layers' sparsities by the
network's output is the idea of EvoPress (Sieberling et al. 2025), which changes single layers at
random and needs thousands of cheap evaluations.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from lobs_native.network.allocation import Costs, shares

__all__ = ["Record", "Search"]

_STEP = math.log(2.0)  # of the logarithm of a factor, at first
_SMALLEST = _STEP / 8
_FEW = 12  # layers up to which each is a kind of its own
_NUMBER = re.compile(r"\d+")


class Record(Protocol):
    """Where evaluations are kept, such as a run directory: losses, and the seconds each took."""

    def evaluations(self) -> list[tuple[float, float]]:
        """Those made before, in order."""

    def keep_evaluation(self, loss: float, seconds: float) -> None:
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
    clock : callable
        The time in seconds; where processes search together, the same for all.
    """

    def __init__(
        self,
        costs: Mapping[str, Costs],
        weights: Mapping[str, int],
        evaluate: Callable[[Mapping[str, float]], float],
        record: Record | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs, self.weights = costs, weights
        self.evaluate, self.record, self.clock = evaluate, record, clock
        self.losses: list[float] = []
        self.seconds = 0.0
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
        seconds of evaluations, those on record included. With none, nothing is evaluated."""
        best = dict.fromkeys(self.costs, 0.0)
        if not evaluations or not self.costs:
            return self.shares(best)
        least = self._loss(best)
        directions = self._directions()
        steps = [_STEP] * len(directions)
        while self._may_go_on(evaluations, seconds) and max(steps, default=0.0) > _SMALLEST:
            for i, direction in enumerate(directions):
                for step in (steps[i], -steps[i]):
                    if not self._may_go_on(evaluations, seconds):
                        break
                    moved = {k: x + step * direction[k] for k, x in best.items()}
                    loss = self._loss(moved)
                    if loss < least:
                        least, best = loss, moved
                        break
                else:
                    steps[i] /= 2
        return self.shares(best)

    def summary(self) -> dict[str, float] | None:
        """For the report; None if nothing was evaluated."""
        if not self.losses:
            return None
        return {
            "evaluations": len(self.losses),
            "loss at first": self.losses[0],
            "least loss": min(self.losses),
            "seconds": self.seconds,
        }

    def _may_go_on(self, evaluations: int, seconds: float | None) -> bool:
        return len(self.losses) <= evaluations and (seconds is None or self.seconds < seconds)

    def _loss(self, logarithms: Mapping[str, float]) -> float:
        """The loss of a division, by pruning the network, if it is a new one."""
        counts = self._counts(logarithms)
        key = tuple(counts.values())
        if key not in self._seen:
            if len(self.losses) < len(self._known):
                loss, seconds = self._known[len(self.losses)]
            else:
                begun = self.clock()
                loss = self.evaluate({name: n / self.weights[name] for name, n in counts.items()})
                seconds = self.clock() - begun
                if self.record is not None:
                    self.record.keep_evaluation(loss, seconds)
            self.losses.append(loss)
            self.seconds += seconds
            self._seen[key] = loss
        return self._seen[key]

    def _directions(self) -> list[dict[str, float]]:
        """What the logarithms of the factors are changed by: all, by their place; and each kind,
        those with the most weights first."""
        names = list(self.costs)
        kinds: dict[str, list[str]] = {}
        for name in names:
            kind = name if len(names) <= _FEW else _NUMBER.sub("0", name)
            kinds.setdefault(kind, []).append(name)
        ordered = sorted(kinds.values(), key=lambda some: -sum(self.weights[k] for k in some))
        found = [{k: float(k in some) for k in names} for some in ordered if some != names]
        if len(names) > _FEW:
            found.insert(0, {k: i / (len(names) - 1) - 0.5 for i, k in enumerate(names)})
        return found
