"""All that an iteration of ADMM does between two matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NonFiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import (
    AdmmPlan,
    Status,
    WeightState,
    call,
    check_status,
    crossing,
    has,
    on_device,
)

__all__ = ["AdmmStep", "admm_step_"]


class AdmmStep(NamedTuple):
    """What :func:`admm_step_` found."""

    changed: int  # weights that are removed now and were not before
    cut: float  # what the costliest removed unit costs, for the next call; 0 if that is not known


def admm_step_(
    p: Tensor,
    d: Tensor,
    x: Tensor,
    removed: Tensor,
    *,
    count: int | None = None,
    unit: int = 1,
    group: int = 0,
    per_group: int = 0,
    by_row: bool = False,
    state: Tensor | None = None,
    cut: float = 0.0,
    backend: str | None = None,
) -> AdmmStep:
    """Project on the sparse weights, and update the duals and the right-hand side of the next step.

    ``y = (p + x) + u`` with ``u = -(d + x)`` where a weight was removed, else 0; the weights of
    lowest ``|y|`` are removed; ``d = -y - x`` where removed, else ``y - x``. The sparse weights are
    then ``d + x`` where a weight is kept. To start, ``p = d = 0`` and nothing is removed.

    Parameters
    ----------
    p, x : (R, C) float64 or float32, contiguous
        The product ``d M rho`` with ``M = (H + rho I)^-1``, and the original weights. Not modified.
    d : (R, C) of x's dtype, contiguous
        Written in place.
    removed : (R, C) bool, contiguous
        What the last step removed. Overwritten by what this one removes.
    count : int, optional
        Units to remove: of all rows together, or with ``by_row`` of each row. Left out with a
        group, required otherwise.
    unit : int
        This many neighbouring columns go together, at the cost ``sum(y**2)``. The last C % unit
        columns stay.
    group, per_group : int
        N:M patterns: ``per_group`` of every ``group`` columns go. The last C % group columns stay.
    by_row : bool
        Remove ``count`` units of each row.
    state : (R, C) uint8, optional
        Values of :class:`WeightState`; that of a unit's first column counts. What goes first is
        removed before all others and what stays never, even if that makes more or fewer removals.
        Not modified.
    cut : float >= 0
        The ``cut`` of the last step, 0 for the first. It makes the call faster if it is close to
        the new one, and never changes the result.
    backend : str, optional
        A name from ``backends()``. Without one, a backend that lacks this operation leaves it to
        plain torch.

    Returns
    -------
    AdmmStep
        ``(changed, cut)``. ``cut`` is 0 with ``by_row``, with groups and on a device.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit; nothing is written.
    NonFiniteError
        Some y is not finite; the message names row and column. Discard d and removed.

    Notes
    -----
    Among equals the lowest row goes first, then the lowest column. Every y and d is rounded in x's
    type as the brackets say, so all backends agree.
    Source: Boza 2024 (arXiv 2401.02938); Meng et al. 2024 (ALPS).
    """
    d = checks.output(d, "d", ndim=2, dtypes=(torch.float64, torch.float32))
    p = checks.tensor(p, "p", ndim=2, dtypes=(d.dtype,)).contiguous()
    x = checks.tensor(x, "x", ndim=2, dtypes=(d.dtype,)).contiguous()
    removed = checks.output(removed, "removed", ndim=2, dtypes=(torch.bool,))
    R, C = d.shape
    if state is not None:
        state = checks.tensor(state, "state", ndim=2, dtypes=(torch.uint8,)).contiguous()
    for other, name in ((p, "p"), (x, "x"), (removed, "removed"), (state, "state")):
        if other is None:
            continue
        if other.shape != d.shape:
            raise ShapeError(f"{name} is {tuple(other.shape)} but d is ({R}, {C})")
        checks.same_device(d, "d", other, name)
        checks.apart(d, "d", other, name)
        if other is not removed:
            checks.apart(removed, "removed", other, name)
    if state is not None and state.numel() and int(state.max()) > max(WeightState):
        raise ArgumentError(f"state: {int(state.max())}; entries are 0, 1 or 2")
    plan = _plan(R, C, count, unit, group, per_group, by_row, cut)
    chosen = dispatch.select_backend(backend, d.device)
    if d.numel() == 0:
        return AdmmStep(0, 0.0)
    if chosen == "reference" or not has(chosen, "admm_step"):
        changed, highest, where = reference.admm_step_(p, d, x, removed, state, plan)
    else:
        found = torch.zeros(1, dtype=torch.int64, device=d.device)
        costliest = torch.zeros(1, dtype=torch.float64)
        status, where = call(
            "admm_step",
            chosen,
            d.device,
            found.data_ptr(),
            0 if on_device(chosen) else costliest.data_ptr(),
            crossing(p),
            crossing(d),
            crossing(x),
            removed.data_ptr(),
            0 if state is None else state.data_ptr(),
            plan,
        )
        if status != Status.NOT_FINITE:
            check_status(status)
            where = -1
        # On a device `call` has waited for the status already.
        changed, highest = int(found), float(costliest)
    if where >= 0:
        r, q = divmod(where, C)
        raise NonFiniteError(
            f"p: y = (p + x) + u is not finite at row {r}, column {q}, with p {float(p[r, q])} and "
            f"x {float(x[r, q])}: d and removed are lost; start again with another rho"
        )
    return AdmmStep(changed, highest)


def _plan(
    R: int,
    C: int,
    count: int | None,
    unit: int,
    group: int,
    per_group: int,
    by_row: bool,
    cut: float,
) -> AdmmPlan:
    unit = checks.positive_int(unit, "unit")
    group = checks.count(group, "group")
    per_group = checks.count(per_group, "per_group")
    by_row = checks.flag(by_row, "by_row")
    cut = checks.real(cut, "cut")
    if not cut >= 0:
        raise ArgumentError(f"cut: {cut:g}; it must be >= 0")
    if per_group > group:
        raise ArgumentError(f"per_group: {per_group} of a group of {group} columns")
    if group and unit > 1:
        raise ArgumentError(f"unit: {unit} with group={group}; use one of them")
    if group and count is not None:
        raise ArgumentError(f"count: {count} with group={group}, which says how many go; leave out")
    if count is None and not group:
        raise ArgumentError("count: None; it is required unless there are groups")
    count = 0 if count is None else checks.count(count, "count")
    unit, group = min(unit, C + 1), min(group, C + 1)  # more columns than there are
    units = C // unit * (1 if by_row else R)
    if not group and count > units:
        of = "a row" if by_row else "all rows"
        raise ArgumentError(f"count: {count}; there are {units} units of {unit} columns in {of}")
    return AdmmPlan(
        count=count,
        unit=unit,
        group=group,
        per_group=min(per_group, C + 1),
        by_row=by_row,
        cut=cut,
    )
