"""Exact greedy Optimal Brain Surgeon over rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
)
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import CODES, _core, call, check_status, crossing, on_device, threads

__all__ = ["MAX_BLOCK", "Trace", "affordable_threads", "exact_bytes", "exact_trace"]

MAX_BLOCK = 64  # columns in a 1 x b block, at most


@dataclass(frozen=True)
class Trace:
    """What :func:`exact_trace` found."""

    order: Tensor  # (R, limit) int32, columns in order of removal; -1 where a row has ended
    loss: Tensor  # (R, limit), W's dtype: what each removal cost; 0 where a row has ended
    count: Tensor  # (R,) int64, removals
    lost: Tensor  # (R,) bool: rounding ended the row early, redo it in a wider type
    backend: str


def exact_trace(
    W: Tensor,
    A: Tensor,
    *,
    state: Tensor | None = None,
    limit: int | None = None,
    stop: float = math.inf,
    block: int = 1,
    group: int = 0,
    per_group: int = 0,
    update: bool = False,
    memory: int | None = None,
    backend: str | None = None,
) -> Trace:
    """Remove weights from every row one at a time, the cheapest first, re-optimising the rest after
    each.

    True Optimal Brain Surgeon per row: ``q = argmin w_q**2 / D_qq``, ``w -= (w_q / D_qq) D[:, q]``,
    ``D -= D[:, q] D[q, :] / D_qq``, with D = A at first. Done as a pivoted Cholesky factorisation
    of the shared A; the order is that of the plain algorithm in the same precision.

    Parameters
    ----------
    W : (R, C) float64 or float32, contiguous
        Written only with ``update``: then it holds the repaired weights after the removals, removed
        ones exactly zero (rows that are ``lost`` keep their old values).
    A : (C, C) of W's dtype, symmetric
        Damped inverse second moment. Not modified.
    state : (R, C) uint8, optional
        0 = may go, 1 = goes before all others (whatever it costs), 2 = stays but is repaired. The
        same throughout a block. Not modified.
    limit : int, optional
        Removals per row at most; all by default.
    stop : float >= 0
        A row ends before the first removal that would cost more (not counting state 1).
    block : int
        1 x b blocks: b neighbouring columns go together, at ``w_B^T D_BB^-1 w_B``. The C % b last
        columns stay.
    group, per_group : int
        N:M patterns: of every ``group`` columns at most ``per_group`` go, unless state 1 says more.
        The C % group last columns stay.
    update : bool
        Write the repaired weights into W.
    memory : int, optional
        Bytes of scratch at most; fewer threads are used where it takes that, and MemoryError is
        raised where one thread needs more. :func:`exact_bytes` tells what a thread needs.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    Trace

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NonFiniteError
        W or A hold a NaN or an infinity.
    NotPositiveDefiniteError
        A has a diagonal entry that is not positive.

    Notes
    -----
    Source: Hassibi & Stork 1993; Frantar, Singh & Alistarh 2022 (ExactOBS).
    """
    checked = checks.output if update else checks.tensor
    W = checked(W, "W", ndim=2, dtypes=(torch.float64, torch.float32)).contiguous()
    checks.check_finite(W, "W")
    A = checks.tensor(A, "A", ndim=2, dtypes=(W.dtype,)).contiguous()
    R, C = W.shape
    if A.shape != (C, C):
        raise ShapeError(f"W is ({R}, {C}) but A is {tuple(A.shape)}: A must be ({C}, {C})")
    checks.same_device(W, "W", A, "A")
    plan = _exact_plan(C, W.dtype, limit, stop, block, group, per_group, update)
    if update:
        checks.apart(W, "W", A, "A")
    if state is not None:
        state = checks.tensor(state, "state", ndim=2, dtypes=(torch.uint8,)).contiguous()
        if state.shape != W.shape:
            raise ShapeError(f"state is {tuple(state.shape)} but W is ({R}, {C})")
        checks.same_device(W, "W", state, "state")
        if state.numel() and int(state.max()) > 2:
            raise ArgumentError(f"state: {int(state.max())}; entries are 0, 1 or 2")
        blocks = state[:, : C - C % block].reshape(-1, block)
        if block > 1 and not bool((blocks == blocks[:, :1]).all()):
            raise ArgumentError(f"state: it differs within a block of {block} columns")
    checks.check_finite(A, "A")
    chosen = dispatch.select_backend(backend, W.device)
    if W.numel() and not bool((A.diagonal() > 0).all()):
        q = int((~(A.diagonal() > 0)).to(torch.uint8).argmax())
        raise NotPositiveDefiniteError(
            f"A: {float(A[q, q])} at ({q}, {q}); it must be positive: raise the damping"
        )
    if chosen == "reference":
        order, loss, count, lost = reference.exact_trace(W, A, state, *plan)
        return Trace(order, loss, count, lost.to(torch.bool), chosen)
    limit = plan[0]
    order = torch.full((R, limit), -1, dtype=torch.int32, device=W.device)
    loss = torch.zeros(R, limit, dtype=W.dtype, device=W.device)
    count = torch.zeros(R, dtype=torch.int64, device=W.device)
    lost = torch.zeros(R, dtype=torch.uint8, device=W.device)
    if W.numel() and limit:
        status, _ = call(
            "exact_trace",
            chosen,
            W.device,
            order.data_ptr(),
            loss.data_ptr(),
            count.data_ptr(),
            lost.data_ptr(),
            crossing(W),
            A.data_ptr(),
            0 if state is None else state.data_ptr(),
            plan,
            workers=_workers(chosen, W.device, R, W.dtype, C, plan, memory),
        )
        check_status(status)
        ended = torch.arange(limit, device=W.device) >= count[:, None]
        order[ended] = -1
        loss[ended] = 0
    return Trace(order, loss, count, lost.to(torch.bool), chosen)


_Plan = tuple[int, float, float, int, int, int, bool]


def _exact_plan(
    C: int,
    dtype: torch.dtype,
    limit: int | None,
    stop: float,
    block: int,
    group: int,
    per_group: int,
    update: bool,
) -> _Plan:
    limit = C if limit is None else checks.count(limit, "limit")
    stop = checks.real(stop, "stop")
    if not stop >= 0:
        raise ArgumentError(f"stop: {stop:g}; it must be >= 0")
    block = checks.positive_int(block, "block")
    group = checks.count(group, "group")
    per_group = checks.count(per_group, "per_group")
    if block > MAX_BLOCK:
        raise ArgumentError(f"block: {block}; blocks have at most {MAX_BLOCK} columns")
    if group and block > 1:
        raise ArgumentError(f"block: {block} with group={group}; use one of them")
    if per_group > group:
        raise ArgumentError(f"per_group: {per_group} of a group of {group} columns")
    # A pivot below a few eps of where it started is rounding, not information.
    floor = 8 * torch.finfo(dtype).eps
    group, per_group = min(group, C + 1), min(per_group, C + 1)  # more columns than there are
    return (min(limit, C), stop, floor, block, group, per_group, checks.flag(update, "update"))


def exact_bytes(
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    limit: int | None = None,
    block: int = 1,
    group: int = 0,
    backend: str | None = None,
) -> int:
    """Bytes of scratch that one thread (on a device, one row) of :func:`exact_trace` needs for rows
    of ``columns``; 0 for "reference"."""
    columns = checks.positive_int(columns, "columns")
    if dtype not in (torch.float64, torch.float32):
        raise DtypeError(f"dtype: {dtype}; rows are traced in torch.float64 or torch.float32")
    plan = _exact_plan(columns, dtype, limit, math.inf, block, group, 0, True)
    chosen = dispatch.select_backend(backend, _home(backend))
    if chosen == "reference":
        return 0
    return _core.exact_bytes(chosen, CODES[dtype], columns, plan)


def affordable_threads(
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 1 << 40,
    memory: int | None = None,
    backend: str | None = None,
) -> int:
    """Threads that :func:`exact_trace` would use for rows of ``columns`` with this limit on
    scratch; on a device, how many of ``rows`` it would have in flight. MemoryError where one needs
    more than that."""
    columns = checks.positive_int(columns, "columns")
    rows = checks.positive_int(rows, "rows")
    if dtype not in (torch.float64, torch.float32):
        raise DtypeError(f"dtype: {dtype}; rows are traced in torch.float64 or torch.float32")
    plan = _exact_plan(columns, dtype, None, math.inf, 1, 0, 0, True)
    device = _home(backend)
    chosen = dispatch.select_backend(backend, device)
    if chosen == "reference":
        return 1
    return _workers(chosen, device, rows, dtype, columns, plan, memory)


def _home(backend: str | None) -> torch.device:
    """Where a backend's tensors would be."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


def _workers(
    chosen: str,
    device: torch.device,
    R: int,
    dtype: torch.dtype,
    C: int,
    plan: _Plan,
    memory: int | None,
) -> int:
    """Threads, or on a device rows in flight, whose scratch fits into ``memory``; on a device half
    of what is free by default."""
    most, one = (R, "row") if on_device(chosen) else (threads(), "thread")
    if device.type == "cuda":  # as many blocks as cuda/exact.cu launches
        most = min(R, 2 * torch.cuda.get_device_properties(device).multi_processor_count)
    if memory is not None:
        memory = checks.positive_int(memory, "memory")
    elif one == "thread":
        return most
    else:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
    each = _core.exact_bytes(chosen, CODES[dtype], C, plan)
    if each > memory:
        raise MemoryError(
            f"memory: one {one} needs {each} bytes of scratch for {C} columns and {plan[0]} "
            f"removals, more than the {memory} allowed; raise memory or remove less"
        )
    return min(most, memory // each)
