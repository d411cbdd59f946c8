"""Traces of exact removals: one pass that answers for every sparsity of a layer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.checks import check_choice
from lobs_native.errors import ArgumentError
from lobs_native.solvers.exact import Exact
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.pruning import Pruned, repaired
from lobs_native.solvers.result import PrunedWeight, finish, first_group
from lobs_native.solvers.settings import SCOPES, LayerSettings
from lobs_native.solvers.weight import one_layer
from lobs_native.solvers.workspace import Workspace

__all__ = ["WeightTrace", "trace_weight"]

_POINTS = 1001


class WeightTrace:
    """The result of :func:`trace_weight`: order and cost of the removals from each row.

    Attributes
    ----------
    order : (R, K) int32
        Columns of each row in the order of removal; -1 where nothing more was traced. A bias that
        may be removed is column C.
    loss : (R, K) float32, or float64 for a float64 weight
        What each removal cost, in units of ``error`` with the damped H: the first k of a row add up
        to its error. 0 where nothing more was traced. A block's cost is spread over its columns.
    """

    def __init__(self, exact: Exact, notes: Sequence[str], seconds: float) -> None:
        self._exact = exact
        self._notes = tuple(notes)
        self.seconds = seconds

    @property
    def order(self) -> Tensor:
        """See the class."""
        return self._exact.removals.order.to(self._exact.problem.before.device, copy=True)

    @property
    def loss(self) -> Tensor:
        """See the class."""
        problem, removals = self._exact.problem, self._exact.removals
        wide = problem.weight_dtype == torch.float64
        unit = removals.row_scale * removals.unit_cost()
        loss = removals.loss.to(torch.float64) * unit
        return loss.to(problem.before.device, torch.float64 if wide else torch.float32)

    @ops.full_precision()
    def at(self, sparsity: float, scope: str = "layer") -> PrunedWeight:
        """The layer at one sparsity, as :func:`lobs_native.prune_weight` prunes it.

        Rows that were not traced far enough are traced further first.

        Parameters
        ----------
        sparsity : float in [0, 1]
            Share of the weights that are zero afterwards; with an N:M pattern, that of the pattern.
        scope : "layer" or "row"
            The cheapest removals of the whole layer, or the same number in every row.

        Raises
        ------
        ArgumentError, DtypeError
            An argument does not fit, or the mask already removes more than that.
        """
        begun = time.perf_counter()
        sparsity = checks.sparsity(sparsity)
        check_choice(scope, "scope", SCOPES)
        exact, problem, pattern = self._exact, self._exact.problem, self._exact.pattern
        fixed = pattern.sparsity
        if fixed is not None and not math.isclose(sparsity, fixed, abs_tol=1e-9):
            raise ArgumentError(
                f"sparsity: {sparsity:g}; pattern {pattern.name!r} removes {fixed:g} of the weights"
            )
        if scope == "row" and not pattern.is_grouped:
            units = nearest_count(sparsity, problem.candidates // pattern.unit)
            exact.removals.trace_all(units * pattern.unit)
        with problem.workspace.passing_notes():  # those on this cut are not for the next
            removed, weights = repaired(problem, exact.choose(sparsity, scope))
            problem.check_mask(removed)
            costs = exact.costs(removed, scope)
            pruned = Pruned(removed, weights, exact.optimal, costs)
            return first_group(
                finish(problem, pruned, method="exact", begun=begun, notes=self._notes)
            )

    def curve(self, scope: str = "layer", points: int = _POINTS) -> tuple[Tensor, Tensor]:
        """Error against sparsity, as the trace predicts it.

        The error is that of the damped H, which is never below the incurred one.

        Parameters
        ----------
        scope : "layer" or "row"
        points : int
            At most this many, evenly spaced over what was traced of every row.

        Returns
        -------
        sparsity, error : (P,) float64
            From 0 removals on; ``error`` in units of ``PrunedWeight.error``.
        """
        check_choice(scope, "scope", SCOPES)
        points = checks.positive_int(points, "points")
        sparsity, error = self._exact.curve(scope)
        if len(sparsity) > points:
            pick = torch.linspace(0, len(sparsity) - 1, points).round().long()
            sparsity, error = sparsity[pick], error[pick]
        return sparsity, error


@ops.full_precision()
def trace_weight(
    weight: Any,
    hessian: Any,
    *,
    method: str = "exact",
    pattern: Any = "unstructured",
    until: float = 1.0,
    bias: Any = None,
    prune_bias: bool = False,
    mask: Any = None,
    damping: float = 0.01,
    memory: int | None = None,
    backend: str | None = None,
) -> WeightTrace:
    """Remove the weights of a layer one by one, exactly, and keep the order and the costs.

    One trace gives the layer at every sparsity (:meth:`WeightTrace.at`) and the curve of error
    against sparsity (:meth:`WeightTrace.curve`).

    Parameters
    ----------
    weight, hessian, pattern, bias, prune_bias, mask, damping, memory, backend
        As in :func:`lobs_native.prune_weight`. Not modified.
    method : "exact"
    until : float in (0, 1]
        Share of each row's weights to trace. Rows are traced further when ``at`` needs it.

    Returns
    -------
    WeightTrace

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, PatternError, BackendError, NonFiniteError
        An argument does not fit; the message names it.
    NotPositiveDefiniteError
        The second moment cannot be inverted, or rounding in float64 left a pivot that is not
        positive.

    Notes
    -----
    Source: Hassibi & Stork 1993; Frantar, Singh & Alistarh 2022 (ExactOBS).
    """
    begun = time.perf_counter()
    W, H, b, allowed, notes = one_layer(weight, hessian, bias, mask)
    settings = LayerSettings(
        method=check_choice(method, "method", ("exact",)),
        pattern=pattern,
        damping=damping,
        prune_bias=prune_bias,
    )
    until = checks.real(until, "until")
    if not 0 < until <= 1:
        raise ArgumentError(f"until: {until:g}; it is a share of each row, above 0 and at most 1")
    problem = Problem.of(  # of copies: the trace outlives this call, and its inputs may change
        W.clone(),
        b,
        [H.clone()],
        damping=settings.damping,
        inverted=True,
        prune_bias=settings.prune_bias,
        mask=None if allowed is None else allowed.clone(),
        workspace=Workspace(
            ops.select_backend(backend, W.device),
            None if memory is None else checks.positive_int(memory, "memory"),
        ),
    )
    pattern = settings.resolved_pattern
    pattern.check_fit(W.shape[2], allowed, prune_bias=settings.prune_bias)
    exact = Exact(problem, pattern)
    exact.removals.trace_all(max(pattern.unit, nearest_count(until, problem.candidates)))
    return WeightTrace(exact, notes, time.perf_counter() - begun)
