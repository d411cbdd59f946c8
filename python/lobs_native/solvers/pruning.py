"""The steps that pruning a layer takes, whatever the method: choose, repair, refine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lobs_native.solvers.costs import Costs
from lobs_native.solvers.measurement import error
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.repair import exchange, repair, solve
from lobs_native.solvers.settings import Target

__all__ = ["Pruned", "prune_problem", "repaired"]


@dataclass(frozen=True)
class Pruned:
    """What is removed from a layer, and the weights that are left, before they are rounded."""

    removed: Tensor  # (G, R, D) bool
    weights: Tensor  # (G, R, D)
    optimal: bool  # the weights are meant to be the best for ``removed``
    costs: Costs | None = None  # of the removals, before they were refined
    swaps: int = 0


def prune_problem(
    problem: Problem,
    method: type[Method],
    pattern: Pattern,
    *,
    target: Target,
    scope: str,
    refine: str | None,
    importance: Tensor | None = None,
) -> Pruned:
    """Choose, repair and refine. Raises ArgumentError if the mask removes more than the target."""
    chooser = method(problem, pattern, importance)
    removed, weights = _at_target(problem, chooser, target, scope)
    costs = chooser.costs(removed, scope)
    del chooser  # with its memory
    problem.check_mask(removed)
    if refine is None or not bool(removed.any()):  # with all weights kept nothing can be refined
        return Pruned(removed, weights, method.optimal, costs)
    if refine == "solve":
        weights = solve(problem, removed, precise=True, from_kept=True)
        return Pruned(removed, weights, True, costs)
    removed, weights, swaps = exchange(problem, pattern, removed)
    return Pruned(removed, weights, True, costs, swaps)


def repaired(problem: Problem, choice: Choice) -> tuple[Tensor, Tensor]:
    """What is removed and the weights that are left, (G, R, D) each: the method's own, or else the
    best ones."""
    weights = choice.weights
    return choice.removed, repair(problem, choice.removed) if weights is None else weights


def _at_target(
    problem: Problem, chooser: Method, target: Target, scope: str
) -> tuple[Tensor, Tensor]:
    """What is removed and the weights that are left, (G, R, D) each."""
    if target.max_error is not None:
        chooser.prepare()
        steps = problem.candidates if scope == "row" else problem.total
        removed, weights = _bisect(
            problem,
            lambda count: repaired(problem, chooser.choose(count / steps, scope)),
            steps,
            target.max_error,
        )
        if problem.drift is not None and not bool(removed.any()):
            least = error(problem, *problem.rounded(weights))
            if least > target.max_error:
                problem.workspace.note(
                    f"nothing was removed: what the layers before it lost already makes an error "
                    f"of {least:.3g}, above max_error"
                )
        return removed, weights
    if target.threshold is not None:
        choice = chooser.choose_below(target.threshold)
    elif target.sparsity is not None:
        choice = chooser.choose(target.sparsity, scope)
    else:
        choice = chooser.choose_masked()
    return repaired(problem, choice)


def _bisect(
    problem: Problem,
    removal: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """The largest removal (of 0 to ``steps``) found whose incurred error is at or below
    ``limit``."""
    low, high = 0, steps  # low is feasible; nothing above high is
    best = removal(0)
    while low < high:
        middle = (low + high + 1) // 2
        removed, weights = removal(middle)
        if error(problem, *problem.rounded(weights)) <= limit:
            low, best = middle, (removed, weights)
        else:
            high = middle - 1
    return best
