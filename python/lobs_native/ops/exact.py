"""Exact Optimal Brain Surgeon: greedy removal of weights from every row, and its scratch memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, DtypeError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import (
    DTYPES,
    ExactPlan,
    WeightState,
    call,
    check_status,
    core,
    crossing,
    on_device,
    threads,
)

__all__ = ["MAX_BLOCK", "Trace", "affordable_threads", "exact_bytes", "exact_trace"]

MAX_BLOCK = core.MAX_BLOCK  # columns in a 1 x b block, at most


@dataclass(frozen=True)
class Trace:
    """The removals of :func:`exact_trace`."""

    order: Tensor  # (R, limit) int32, columns in order of removal; -1 after a row has ended
    loss: Tensor  # (R, limit), W's dtype: the cost of each removal; 0 after a row has ended
    count: Tensor  # (R,) int64, removals
    lost: Tensor  # (R,) bool: rounding ended the row early; redo it in a wider type
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
    """Remove weights from every row one at a time, the cheapest first, and re-optimise the others.

    This is true Optimal Brain Surgeon for each row: ``q = argmin w_q**2 / D_qq``,
    ``w -= (w_q / D_qq) D[:, q]``, ``D -= D[:, q] D[q, :] / D_qq``, starting from D = A. It is
    computed as a pivoted Cholesky factorisation of the shared A. The order is that of the plain
    algorithm in the same precision.

    Parameters
    ----------
    W : (R, C) float64 or float32, contiguous
        Written only with ``update``. Then it holds the repaired weights after the removals, with
        the removed ones exactly zero; rows that are ``lost`` keep their old values.
    A : (C, C) of W's dtype, symmetric
        Damped inverse second moment. Not modified.
    state : (R, C) uint8, optional
        Values of :class:`WeightState`: ``MAY_GO`` (0), ``GOES_FIRST`` (1: before all others,
        whatever it costs) or ``STAYS`` (2: but is repaired). Constant within a block. Not modified.
    limit : int, optional
        Maximum number of removals per row. Default: all.
    stop : float >= 0
        A row ends before the first removal that would cost more, unless that weight goes first.
    block : int
        1 x b blocks: b neighbouring columns go together, at the cost ``w_B^T D_BB^-1 w_B``. The
        last C % b columns stay.
    group, per_group : int
        N:M patterns: at most ``per_group`` of every ``group`` columns go, unless more of them go
        first. The last C % group columns stay.
    update : bool
        Write the repaired weights into W.
    memory : int, optional
        Maximum scratch memory in bytes. Fewer threads are used to stay below it; MemoryError is
        raised if one thread needs more. :func:`exact_bytes` is what one thread needs.
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
        W or A holds a NaN or an infinity.
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
    checks.square(A, "A", W, "W")
    checks.same_device(W, "W", A, "A")
    plan = _plan(C, W.dtype, limit, stop, block, group, per_group, update)
    if update:
        checks.apart(W, "W", A, "A")
    if state is not None:
        state = checks.tensor(state, "state", ndim=2, dtypes=(torch.uint8,)).contiguous()
        if state.shape != W.shape:
            raise ShapeError(f"state is {tuple(state.shape)} but W is ({R}, {C})")
        checks.same_device(W, "W", state, "state")
        if state.numel() and int(state.max()) > max(WeightState):
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
        return Trace(*reference.exact_trace(W, A, state, plan), chosen)
    order = torch.full((R, plan.limit), -1, dtype=torch.int32, device=W.device)
    loss = torch.zeros(R, plan.limit, dtype=W.dtype, device=W.device)
    count = torch.zeros(R, dtype=torch.int64, device=W.device)
    lost = torch.zeros(R, dtype=torch.uint8, device=W.device)
    if W.numel() and plan.limit:
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
        ended = torch.arange(plan.limit, device=W.device) >= count[:, None]
        order[ended] = -1
        loss[ended] = 0
    return Trace(order, loss, count, lost.to(torch.bool), chosen)


def _plan(
    C: int,
    dtype: torch.dtype,
    limit: int | None,
    stop: float,
    block: int,
    group: int,
    per_group: int,
    update: bool,
) -> ExactPlan:
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
    # A pivot below a few eps of its first value is rounding, not information.
    floor = 8 * torch.finfo(dtype).eps
    group, per_group = min(group, C + 1), min(per_group, C + 1)  # more columns than there are
    return ExactPlan(
        limit=min(limit, C),
        stop=stop,
        floor=floor,
        block=block,
        group=group,
        per_group=per_group,
        update=checks.flag(update, "update"),
    )


def exact_bytes(
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    limit: int | None = None,
    block: int = 1,
    group: int = 0,
    backend: str | None = None,
) -> int:
    """Scratch memory in bytes that one thread of :func:`exact_trace` needs for rows of ``columns``.

    On a device: one row in flight. 0 for ``"reference"``.
    """
    columns = checks.positive_int(columns, "columns")
    if dtype not in (torch.float64, torch.float32):
        raise DtypeError(f"dtype: {dtype}; rows are traced in torch.float64 or torch.float32")
    plan = _plan(columns, dtype, limit, math.inf, block, group, 0, True)
    chosen = dispatch.select_backend(backend, _home(backend))
    if chosen == "reference":
        return 0
    return core.exact_bytes(chosen, DTYPES[dtype], columns, plan)


def affordable_threads(
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 1 << 40,
    memory: int | None = None,
    backend: str | None = None,
) -> int:
    """Threads that :func:`exact_trace` would use for rows of ``columns`` with this scratch limit.

    On a device: how many of ``rows`` it would have in flight. MemoryError is raised if one of them
    needs more than ``memory``.
    """
    columns = checks.positive_int(columns, "columns")
    rows = checks.positive_int(rows, "rows")
    if dtype not in (torch.float64, torch.float32):
        raise DtypeError(f"dtype: {dtype}; rows are traced in torch.float64 or torch.float32")
    plan = _plan(columns, dtype, None, math.inf, 1, 0, 0, True)
    device = _home(backend)
    chosen = dispatch.select_backend(backend, device)
    if chosen == "reference":
        return 1
    return _workers(chosen, device, rows, dtype, columns, plan, memory)


def _home(backend: str | None) -> torch.device:
    """The device of a backend's tensors."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


def _workers(
    chosen: str,
    device: torch.device,
    R: int,
    dtype: torch.dtype,
    C: int,
    plan: ExactPlan,
    memory: int | None,
) -> int:
    """Threads, or on a device rows in flight, whose scratch fits into ``memory``.

    On a device half of the free memory by default.
    """
    most, one = (R, "row") if on_device(chosen) else (threads(), "thread")
    if device.type == "cuda":  # as many blocks as cuda/exact.cu launches
        most = min(R, 2 * torch.cuda.get_device_properties(device).multi_processor_count)
    if memory is not None:
        memory = checks.positive_int(memory, "memory")
    elif one == "thread":
        return most
    else:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
    each = core.exact_bytes(chosen, DTYPES[dtype], C, plan)
    if each > memory:
        raise MemoryError(
            f"memory: one {one} needs {each} bytes of scratch for {C} columns and {plan.limit} "
            f"removals, more than the {memory} allowed; raise memory or remove less"
        )
    return min(most, memory // each)
