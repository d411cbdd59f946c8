"""The operations: check the tensors, choose a backend, call it, turn a status into an exception.

The only importer of the native module. A tensor crosses as pointer, dtype code, shape and strides,
so one build serves every torch; everything that could make native code read or write the wrong
memory is refused first, by checks.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, reference
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
)

try:
    from lobs_native import _core
except ImportError as error:  # pragma: no cover - only in a broken installation
    raise ImportError(
        "lobs_native._core, the compiled part, is missing or does not load. From a source tree, "
        f"run 'pip install .' and do not import from inside the tree. The loader said: {error}"
    ) from error

_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_SAMPLES = 4096  # samples in one native call, so that Ctrl-C is answered soon
_DEVICE_FAILED = 7
_TOGETHER = 1 << 24  # entries of blocks that torch updates at once
_LARGE_BLOCK = 512  # from here on a block's update is one big matrix product, which torch does best
_SOLVED_TOGETHER = 256 << 20  # bytes of systems that a device solves at once
_SIZES = 32  # a device solves systems together whose sizes round up to the same multiple of this

# A parallel region in a forked child hangs if the parent has had one, torch's own regions
# included: children of processes that use this package work on one thread.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def threads() -> int:
    """Threads that a native call will use: torch's setting, which is 1 in a forked child."""
    return max(1, torch.get_num_threads())


def parallel_runtime() -> str:
    """``"openmp"`` or ``"std::thread"``, as built."""
    return _core.parallel_runtime


# ---- backends ------------------------------------------------------------------------------------


def backends() -> list[tuple[str, bool, str]]:
    """List the backends as (name, ready, detail).

    Returns
    -------
    list of (str, bool, str)
        ``"cuda"``, ``"cpu"`` and ``"reference"``. ``"cpu"`` stands for the fastest instruction-set
        level of this machine, or the one that the environment variable ``LOBS_CPU_LEVEL`` names
        (``v1``, ``v3``, ``v4``); its detail names the level. Each level is also a backend by
        itself, called ``"cpu_v3"`` and so on.
    """
    native = _core.backends()
    level = _core.resolve("cpu")
    rows = [row[:3] for row in native if row[0] == "cuda"]
    chosen = next((row for row in native if row[0] == level), None)
    if chosen is None:
        rows.append(("cpu", False, _wrong_level()))
    else:
        detail = f"{level} ({chosen[2]}), {threads()} threads, {parallel_runtime()}"
        rows.append(("cpu", chosen[1], detail))
    rows.append(("reference", True, "plain torch in float64; slow; any device"))
    return rows


def levels() -> list[tuple[str, bool, str]]:
    """The CPU levels as (name, ready, detail), fastest first; each name is a backend as well."""
    return [row[:3] for row in _core.backends() if row[0].startswith("cpu_")]


def _wrong_level() -> str:
    known = ", ".join(name.removeprefix("cpu_") for name, _, _ in levels())
    asked = os.environ.get("LOBS_CPU_LEVEL")
    return f"LOBS_CPU_LEVEL is {asked!r}, which is no level of this platform; use one of {known}"


def select_backend(backend: str | None, device: torch.device) -> str:
    """The backend's own name for a call on ``device``.

    ``None`` means the fastest: the CPU kernels for CPU tensors, the CUDA kernels for CUDA tensors
    where they can run (else ``"reference"``, with one warning), ``"reference"`` for any other
    device. What was chosen is in every result.
    """
    if backend is None:
        backend = _fastest(device)
    if not isinstance(backend, str):
        raise DtypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend == "reference":
        return backend
    native = {row[0]: row for row in _core.backends()}
    if backend != "cpu" and backend not in native:
        known = ", ".join(["cpu", *native, "reference"])
        raise BackendError(f"backend: there is none called {backend!r}; known: {known}")
    row = native.get(_core.resolve(backend) or "")
    if row is None:
        raise BackendError(f"backend: {_wrong_level()}")
    if not row[1]:
        raise BackendError(
            f"backend: {backend!r} is not ready here: {row[2]}. Use 'cpu' or 'reference'."
        )
    kind = "cuda" if row[0] == "cuda" else "cpu"
    if device.type != kind:
        raise BackendError(
            f"backend: {backend!r} works on {kind} tensors, these are on {device}; move them, or "
            "leave backend out"
        )
    return row[0]


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "reference"
    _, ready, detail, _ = next(row for row in _core.backends() if row[0] == "cuda")
    if not ready:
        warnings.warn(
            f"lobs_native: CUDA tensors are worked on in plain torch, slowly: {detail}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference"
    return "cuda"


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """torch's float32 products in float32, whatever the user has set for the whole process.

    With TF32 or bfloat16 products a repair would be wrong in its fourth digit.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_device(backend: str) -> bool:
    """Whether a backend (its own name) runs on a device and only enqueues its work."""
    return any(row[0] == backend and row[3] for row in _core.backends())


def _native(
    operation: str, backend: str, device: torch.device, *arguments: Any, workers: int | None = None
) -> tuple[int, int]:
    """Call an operation of _core; (status, where).

    On a device the kernels go to torch's current stream, all scratch comes from torch's allocator,
    and reading the status is the one point where the host waits.
    """
    call = getattr(_core, operation)
    workers = threads() if workers is None else workers
    if not on_device(backend):
        status, where = call(backend, *arguments, workers)
        return int(status), int(where)
    held: list[Tensor] = []

    def allocate(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=device))
        return held[-1].data_ptr()

    report = torch.full((1,), -1, dtype=torch.int64, device=device)
    ordinal, stream = 0, 0
    if device.type == "cuda":
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
    place = (ordinal, stream, allocate, report.data_ptr())
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        status, where = call(backend, *arguments, workers, place)
    if status == _DEVICE_FAILED:
        raise LobsError(f"backend: {backend!r}: the device refused {operation}: error {where}")
    if status == 0 and (word := int(report)) != -1:
        return word % 16, word // 16
    return int(status), int(where)


def _crossing(x: Tensor) -> tuple[int, int, Sequence[int], Sequence[int]]:
    return (x.data_ptr(), _CODES.get(x.dtype, -1), tuple(x.shape), tuple(x.stride()))


def _memory(status: int) -> None:
    if status == 3:
        raise MemoryError("lobs_native: scratch memory for a native call could not be allocated")
    if status:  # pragma: no cover - a status that the caller did not expect
        raise LobsError(f"native call ended with status {status}")


# ---- operations ----------------------------------------------------------------------------------


def hessian_accumulate_(
    H: Tensor,
    X: Tensor,
    weights: Tensor | None = None,
    *,
    ones: bool = False,
    backend: str | None = None,
) -> str:
    """Add a chunk's second moment to the lower triangle of ``H``: ``H += X^T diag(weights) X``.

    Parameters
    ----------
    H : (D, D) float64 or float32, contiguous
        Written in place; only the lower triangle is read or written.
    X : (N, C) float64, float32, float16 or bfloat16, any strides
        Not modified. D = C, or C + 1 with ``ones``.
    weights : (N,) float, finite, >= 0, optional
        Weight of each row. Rows of weight 0 are not read.
    ones : bool
        Treat X as if a last column of ones followed (for a bias).
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that did it.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NonFiniteError
        X or weights hold a NaN or an infinity; H is untouched.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, eq. 9 (times the number of rows).
    """
    H = checks.output(H, "H", ndim=2, dtypes=(torch.float64, torch.float32))
    X = checks.tensor(X, "X", ndim=2)
    checks.flag(ones, "ones")
    D = X.shape[1] + (1 if ones else 0)
    if H.shape != (D, D):
        raise ShapeError(f"H is {tuple(H.shape)} but X is {tuple(X.shape)}: H must be ({D}, {D})")
    checks.same_device(H, "H", X, "X")
    checks.apart(H, "H", X, "X")
    if weights is not None:
        checks.apart(H, "H", checks.tensor(weights, "weights", dtypes=checks.WEIGHTS), "weights")
        weights = checks.token_weights(weights, X.shape[0], X.device)
    chosen = select_backend(backend, H.device)
    if X.shape[0] == 0:
        return chosen
    if chosen == "reference":
        checks.check_finite(X, "X", None if weights is None else weights > 0)
        reference.hessian_accumulate_(H, X, weights, ones)
        return chosen
    pointer = 0 if weights is None else weights.data_ptr()
    status, where = _native(
        "hessian_accumulate", chosen, H.device, _crossing(H), _crossing(X), pointer, ones
    )
    if status == 1:
        raise checks.not_finite("X", X, where)
    _memory(status)
    return chosen


def inverse_update_(F: Tensor, G: Tensor, m: float, *, backend: str | None = None) -> str:
    """Bring inverse second moments up to date with r samples: ``F <- F - F G^T (m I + G F G^T)^-1 G
    F``.

    Parameters
    ----------
    F : (blocks, B, B) float64 or float32, contiguous, symmetric
        Written in place.
    G : (r, d) of F's dtype, (blocks - 1) * B < d <= blocks * B
        Samples, one a row; block b sees columns b*B .. b*B+B-1. Not modified. Missing columns count
        as zero.
    m : float > 0
        Number of samples the mean is taken over.
    backend : str, optional
        A name from ``backends()``. Blocks larger than 512, or on a device larger than its
        multiprocessors' shared memory, go through torch's matrix products on any backend but
        ``"reference"``.

    Returns
    -------
    str
        The backend that did it: a backend's name, or ``"torch"`` for large blocks.

    Raises
    ------
    NonFiniteError
        G holds a NaN or an infinity; F is untouched.
    NotPositiveDefiniteError
        F lost definiteness; names the block. F must be thrown away.

    Notes
    -----
    Equals r rank-1 updates (Dong, Chen & Pan 2017, section 3.4.1; WoodFisher and oBERT for blocks).
    """
    F = checks.output(F, "F", ndim=3, dtypes=(torch.float64, torch.float32))
    G = checks.tensor(G, "G", ndim=2, dtypes=(F.dtype,))
    blocks, B, _ = F.shape
    d = G.shape[1]
    if F.shape[2] != B or not (blocks - 1) * B < d <= blocks * B:
        raise ShapeError(
            f"F is {tuple(F.shape)} and G is {tuple(G.shape)}: F must be (blocks, B, B) and G "
            "have more than "
            f"(blocks - 1) * B and at most blocks * B columns"
        )
    checks.same_device(F, "F", G, "G")
    checks.apart(F, "F", G, "G")
    m = checks.real(m, "m")
    if not 0 < m <= torch.finfo(F.dtype).max:
        raise ArgumentError(f"m: {m}; it must be positive and fit into {F.dtype}")
    chosen = select_backend(backend, F.device)
    if G.shape[0] == 0:
        return chosen
    if chosen == "reference":
        checks.check_finite(G, "G")
        if (block := reference.inverse_update_(F, G, m)) >= 0:
            raise _lost_definiteness(block)
        return chosen
    if B > _LARGE_BLOCK:
        checks.check_finite(G, "G")
        _update_large(F, G, m)
        return "torch"
    G = G.contiguous()
    if G.shape[0] > _SAMPLES:
        checks.check_finite(G, "G")  # all of it before the first part is written
    for part in G.split(_SAMPLES):
        status, where = _native(
            "inverse_update",
            chosen,
            F.device,
            F.data_ptr(),
            _CODES[F.dtype],
            blocks,
            B,
            _crossing(part),
            float(m),
        )
        if status == 5:  # the device's shared memory does not hold a block, whatever the part
            checks.check_finite(G, "G")
            _update_large(F, G, m)
            return "torch"
        if status == 1:
            raise checks.not_finite("G", G, where)
        if status == 2:
            raise _lost_definiteness(where)
        _memory(status)
    return chosen


def _lost_definiteness(block: int) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"F: block {block} is no longer positive definite; it must be thrown away. "
        "Start from a smaller alpha, or use float64."
    )


@full_precision()
def _update_large(F: Tensor, G: Tensor, m: float) -> None:
    """Several blocks go together where they are small for torch's products."""
    blocks, B, _ = F.shape
    together = max(1, _TOGETHER // (B * B))
    for first in range(0, blocks, together):
        f = F[first : first + together]  # (b, B, B), a view
        part = G[:, first * B : (first + together) * B]
        if missing := f.shape[0] * B - part.shape[1]:
            part = torch.nn.functional.pad(part, (0, missing))
        for g in part.unflatten(1, (-1, B)).transpose(0, 1).split(min(B, _LARGE_BLOCK), dim=1):
            y = g @ f  # (b, r, B)
            s = y @ g.mT  # (b, r, r)
            s.diagonal(dim1=1, dim2=2).add_(m)
            factor, info = torch.linalg.cholesky_ex(s)
            finite = torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(dim=1)
            if bool((lost := (info != 0) | ~finite).any()):
                raise _lost_definiteness(first + int(lost.to(torch.uint8).argmax()))
            z = torch.linalg.solve_triangular(factor, y, upper=False)  # (b, r, B)
            f.baddbmm_(z.mT, z, alpha=-1)


def saliency_argmin(
    W: Tensor, diag: Tensor, live: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Find, in every row, the live weight that costs least to remove: ``w_q**2 / diag_q``.

    Parameters
    ----------
    W : (R, C) float64 or float32
        One output unit per row. Not modified.
    diag : (C,) or (R, C), W's dtype, positive where live
        Diagonal of the inverse second moment. Not modified.
    live : (C,) or (R, C) bool
        True where a removal is allowed. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    column : (R,) int64
        The lowest column on a tie; -1 where nothing is live.
    value : (R,) W's dtype
        Its cost, the exact increase of tr(dW H dW^T); infinity where nothing is live.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NotPositiveDefiniteError
        A live ``diag`` entry is not positive; names row and column.
    NonFiniteError
        A live weight is not finite; names row and column.

    Notes
    -----
    All backends agree exactly, ties included: there is no sum to reorder.
    Source: Hassibi & Stork 1993; Dong, Chen & Pan 2017, eq. 6, without its factor 1/2.
    """
    W = checks.tensor(W, "W", ndim=2, dtypes=(torch.float64, torch.float32))
    diag = checks.tensor(diag, "diag", dtypes=(W.dtype,))
    live = checks.tensor(live, "live", dtypes=(torch.bool,))
    R, C = W.shape
    for x, name in ((diag, "diag"), (live, "live")):
        if tuple(x.shape) not in ((C,), (R, C)):
            raise ShapeError(
                f"{name} is {tuple(x.shape)} but W is ({R}, {C}): it must be ({C},) or ({R}, {C})"
            )
        checks.same_device(W, "W", x, name)
    chosen = select_backend(backend, W.device)
    W, diag, live = (x.contiguous().expand(R, C) for x in (W, diag, live))
    column = torch.empty(R, dtype=torch.int64, device=W.device)
    value = torch.empty(R, dtype=W.dtype, device=W.device)
    if R == 0:
        return column, value
    if chosen == "reference" or C == 0:
        fault = live & ~((diag > 0) & torch.isfinite(diag) & torch.isfinite(W))
        where = int(fault.reshape(-1).to(torch.uint8).argmax()) if bool(fault.any()) else -1
        if where < 0:
            if C:
                column, value = reference.saliency_argmin(W, diag, live)
            else:
                column.fill_(-1)
                value.fill_(torch.inf)
    else:
        status, where = _native(
            "saliency_argmin",
            chosen,
            W.device,
            column.data_ptr(),
            value.data_ptr(),
            _crossing(W),
            _crossing(diag),
            _crossing(live),
        )
        if status not in (1, 2):
            _memory(status)
            where = -1
    if where >= 0:
        r, q = divmod(where, C)
        if not 0 < float(diag[r, q]) < float("inf"):
            raise NotPositiveDefiniteError(
                f"diag: {float(diag[r, q])} at row {r}, column {q}; it must be positive and "
                "finite where live: raise the damping"
            )
        raise NonFiniteError(
            f"W: {float(W[r, q])} at row {r}, column {q}, which is live; inputs must be finite"
        )
    return column, value


def static_order_prune_(
    W: Tensor, A: Tensor, order: Tensor, start: Tensor, *, backend: str | None = None
) -> str:
    """Remove given weights from every row in a given order, without downdating the inverse (the
    paper's update).

    For each q in a row's order, ``w -= (w_q / A_qq) * A[:, q]`` with the current ``w_q``; then the
    removed become zero. Equal to one triangular solve ``c = -tril(A[P, P])^-1 w[P]``, ``w += A[:,
    P] c``, ``w[P] = 0``.

    Parameters
    ----------
    W : (R, C) float64 or float32, contiguous
        Written in place.
    A : (C, C) of W's dtype, symmetric
        Inverse second moment, shared by all rows. Not modified.
    order : (K,) int32
        Columns to remove, row after row, each at most once per row. Not modified.
    start : (R + 1,) int64
        Row r owns ``order[start[r]:start[r + 1]]``. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that did it.

    Raises
    ------
    ShapeError, ArgumentError
        Shapes disagree, or order and start do not describe removals.
    NotPositiveDefiniteError
        A diagonal entry of A to be divided by is not positive; W is untouched.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, algorithm 1 and eq. 6.
    """
    W = checks.output(W, "W", ndim=2, dtypes=(torch.float64, torch.float32))
    checks.check_finite(W, "W")
    A = checks.tensor(A, "A", ndim=2, dtypes=(W.dtype,)).contiguous()
    order = checks.tensor(order, "order", ndim=1, dtypes=(torch.int32,)).contiguous()
    start = checks.tensor(start, "start", ndim=1, dtypes=(torch.int64,)).contiguous()
    R, C = W.shape
    if A.shape != (C, C):
        raise ShapeError(f"W is ({R}, {C}) but A is {tuple(A.shape)}: A must be ({C}, {C})")
    if start.shape != (R + 1,):
        raise ShapeError(
            f"W is ({R}, {C}) but start is {tuple(start.shape)}: it must be ({R + 1},)"
        )
    for x, name in ((A, "A"), (order, "order"), (start, "start")):
        checks.same_device(W, "W", x, name)
        checks.apart(W, "W", x, name)
    K = order.numel()
    in_range = int(start.min()) >= 0 and int(start.max()) <= K  # so that differences fit
    count = start.diff()  # (R,)
    if not in_range or int(start[0]) != 0 or int(start[-1]) != K or (R and int(count.min()) < 0):
        raise ArgumentError(f"start: it must rise from 0 to {K}, the length of order")
    chosen = select_backend(backend, W.device)
    if K == 0:
        return chosen
    checks.check_finite(A, "A")
    if chosen == "reference":
        status, where = _check_order(A, order, start)
        if status == 0:
            reference.static_order_prune_(W, A, order, start)
    else:
        status, where = _native(
            "static_order_prune",
            chosen,
            W.device,
            _crossing(W),
            A.data_ptr(),
            order.data_ptr(),
            start.data_ptr(),
        )
    if status == 6:
        r = int(torch.searchsorted(start, where, right=True)) - 1
        raise ArgumentError(
            f"order: column {int(order[where])} of row {r} is not in 0 to {C - 1}, or occurs twice"
        )
    if status == 2:
        q = int(order[where])
        raise NotPositiveDefiniteError(
            f"A: {float(A[q, q])} at ({q}, {q}), but it must be positive to remove column {q}: "
            "raise the damping"
        )
    _memory(status)
    return chosen


def _check_order(A: Tensor, order: Tensor, start: Tensor) -> tuple[int, int]:
    """The native check in plain Python: (6, position) of a bad column, (2, position) of a pivot."""
    positive = (A.diagonal() > 0).tolist()
    bounds = start.tolist()
    for first, last in itertools.pairwise(bounds):
        seen: set[int] = set()
        for place, q in enumerate(order[first:last].tolist(), first):
            if not 0 <= q < len(positive) or q in seen:
                return 6, place
            if not positive[q]:
                return 2, place
            seen.add(q)
    return 0, 0


def rank_lowest(score: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """Choose the ``count`` lowest scores of each row, exactly that many.

    Parameters
    ----------
    score : (R, C) float64, without NaN
        Not modified. Infinities are allowed: plus infinity is chosen last.
    count : int, 0 <= count <= C
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    (R, C) bool
        True for the chosen; the lowest column goes first among equals.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    """
    score = checks.tensor(score, "score", ndim=2, dtypes=(torch.float64,)).contiguous()
    R, C = score.shape
    if isinstance(count, bool) or not isinstance(count, int):
        raise DtypeError(f"count: expected an integer, got {type(count).__name__}")
    if not 0 <= count <= C:
        raise ArgumentError(f"count: {count}; there are {C} scores in a row")
    if bool(torch.isnan(score).any()):
        raise NonFiniteError("score: it holds NaN, which has no rank")
    chosen_backend = select_backend(backend, score.device)
    if chosen_backend == "reference":
        return reference.rank_lowest(score, count)
    chosen = torch.empty(R, C, dtype=torch.bool, device=score.device)
    if score.numel():
        status, _ = _native(
            "rank_lowest",
            chosen_backend,
            score.device,
            chosen.data_ptr(),
            score.data_ptr(),
            R,
            C,
            count,
        )
        _memory(status)
    return chosen


def rank_rows(
    score: Tensor, chosen: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Put the chosen columns of each row in order of rising score.

    Parameters
    ----------
    score : (R, C) float64, without NaN where chosen
        Not modified.
    chosen : (R, C) bool
        Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    order : (K,) int32
        Columns, row after row; the lowest column first among equals. What
        :func:`static_order_prune_` takes.
    start : (R + 1,) int64
        Row r owns ``order[start[r]:start[r + 1]]``.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    """
    score = checks.tensor(score, "score", ndim=2, dtypes=(torch.float64,)).contiguous()
    chosen = checks.tensor(chosen, "chosen", ndim=2, dtypes=(torch.bool,)).contiguous()
    if chosen.shape != score.shape:
        raise ShapeError(
            f"chosen is {tuple(chosen.shape)} but score is {tuple(score.shape)}: they must agree"
        )
    checks.same_device(score, "score", chosen, "chosen")
    name = select_backend(backend, score.device)
    if name == "reference" or on_device(name):  # a device's sort is torch's
        return reference.rank_rows(score, chosen)
    R, C = score.shape
    start = torch.zeros(R + 1, dtype=torch.int64)
    start[1:] = chosen.sum(dim=1).cumsum(0)
    order = torch.empty(int(start[-1]), dtype=torch.int32)
    if order.numel():
        status, _ = _native(
            "rank_rows",
            name,
            score.device,
            order.data_ptr(),
            start.data_ptr(),
            chosen.data_ptr(),
            score.data_ptr(),
            R,
            C,
        )
        _memory(status)
    return order, start


# ---- exact greedy removal ------------------------------------------------------------------------

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
    chosen = select_backend(backend, W.device)
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
        status, _ = _native(
            "exact_trace",
            chosen,
            W.device,
            order.data_ptr(),
            loss.data_ptr(),
            count.data_ptr(),
            lost.data_ptr(),
            _crossing(W),
            A.data_ptr(),
            0 if state is None else state.data_ptr(),
            plan,
            workers=_workers(chosen, W.device, R, W.dtype, C, plan, memory),
        )
        _memory(status)
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
    chosen = select_backend(backend, _home(backend))
    if chosen == "reference":
        return 0
    return _core.exact_bytes(chosen, _CODES[dtype], columns, plan)


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
    chosen = select_backend(backend, device)
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
    each = _core.exact_bytes(chosen, _CODES[dtype], C, plan)
    if each > memory:
        raise MemoryError(
            f"memory: one {one} needs {each} bytes of scratch for {C} columns and {plan[0]} "
            f"removals, more than the {memory} allowed; raise memory or remove less"
        )
    return min(most, memory // each)


def support_solve_(X: Tensor, M: Tensor, chosen: Tensor, *, backend: str | None = None) -> str:
    """Solve one small symmetric system per row, all cut from one matrix: ``M[P, P] x = b[P]``.

    Parameters
    ----------
    X : (R, C) float64 or float32, contiguous
        Right-hand sides, overwritten by the solutions; entries outside P become zero.
    M : (C, C) of X's dtype, symmetric positive definite
        Not modified.
    chosen : (R, C) bool
        Row r's P. Not modified.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that did it.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    NonFiniteError
        X or M hold a NaN or an infinity; X is untouched.
    NotPositiveDefiniteError
        M[P, P] is not positive definite for some row, which is named; X must be thrown away.

    Notes
    -----
    With M = A (inverse second moment) and P removed, ``w - A[:, P] x`` is the best repair of w
    (Hassibi & Stork 1993 for several weights at once).
    """
    X = checks.output(X, "X", ndim=2, dtypes=(torch.float64, torch.float32))
    M = checks.tensor(M, "M", ndim=2, dtypes=(X.dtype,)).contiguous()
    P = checks.tensor(chosen, "chosen", ndim=2, dtypes=(torch.bool,)).contiguous()
    R, C = X.shape
    if M.shape != (C, C):
        raise ShapeError(f"X is ({R}, {C}) but M is {tuple(M.shape)}: M must be ({C}, {C})")
    if P.shape != X.shape:
        raise ShapeError(f"chosen is {tuple(P.shape)} but X is ({R}, {C})")
    for x, name in ((M, "M"), (P, "chosen")):
        checks.same_device(X, "X", x, name)
        checks.apart(X, "X", x, name)
    checks.check_finite(X, "X")
    checks.check_finite(M, "M")
    name = select_backend(backend, X.device)
    if X.numel() == 0:
        return name
    if name == "reference":
        row = reference.support_solve_(X, M, P)
    elif on_device(name):
        row = _solve_supports(X, M, P)
    else:
        status, row = _native(
            "support_solve", name, X.device, _crossing(X), M.data_ptr(), P.data_ptr()
        )
        if status != 2:
            _memory(status)
            row = -1
    if row >= 0:
        raise NotPositiveDefiniteError(
            f"M: not positive definite on the {int(P[row].sum())} columns of row {row}: raise the "
            "damping, or use float64"
        )
    return name


@full_precision()
def _solve_supports(X: Tensor, M: Tensor, P: Tensor) -> int:
    """:func:`support_solve_` in torch's batched Cholesky: -1, or the lowest row without a solution.

    Rows of about the same number of columns go together, filled up with rows and columns of the
    identity.
    """
    C = X.shape[1]
    counts = P.sum(1)  # (R,)
    rounded = ((counts + _SIZES - 1) // _SIZES * _SIZES).clamp_max(C)
    failed = torch.zeros(len(X), dtype=torch.bool, device=X.device)
    for k in rounded.unique().tolist():
        rows = (rounded == k).nonzero()[:, 0]
        if k == 0:
            X[rows] = 0
            continue
        # The systems, their factors, and what torch holds of either while it solves; the sort.
        each = 4 * X.element_size() * k * k + 16 * C
        for some in rows.split(max(1, _SOLVED_TOGETHER // each)):
            inside = torch.arange(k, device=X.device) < counts[some, None]  # (n, k)
            # Chosen columns first, in order, then others, which take no part.
            columns = P[some].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
            systems = M[columns[:, :, None], columns[:, None, :]]  # (n, k, k)
            systems.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0)
            systems.diagonal(dim1=1, dim2=2).masked_fill_(~inside, 1)
            sides = X[some].gather(1, columns).masked_fill_(~inside, 0)
            factors, info = torch.linalg.cholesky_ex(systems)
            del systems
            finite = torch.isfinite(factors.diagonal(dim1=1, dim2=2)).all(1)
            failed[some] = (info != 0) | ~finite
            solved = torch.cholesky_solve(sides[:, :, None], factors)[:, :, 0]
            X[some] = torch.zeros_like(X[some]).scatter_(1, columns, solved)
    return int(failed.to(torch.uint8).argmax()) if bool(failed.any()) else -1


def exchange_(
    W: Tensor,
    A: Tensor,
    kept: Tensor,
    *,
    fixed: Tensor | None = None,
    group: int = 0,
    limit: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, str]:
    """Swap a kept weight of a row against a removed one as long as one swap lowers the error.

    Each round makes the one swap, of all pairs, that lowers ``dw H dw^T`` most; afterwards the
    kept weights are the best there are for the final set.

    Parameters
    ----------
    W : (R, C) float64, contiguous
        The original weights; overwritten by the repaired ones, zero where removed.
    A : (C, C) float64, symmetric positive definite
        Damped inverse second moment. Not modified.
    kept : (R, C) bool, contiguous
        The kept set to start from; overwritten by the final one.
    fixed : (R, C) bool, optional
        True where a weight stays on its side. Not modified.
    group : int
        Swap within groups of this many columns only (N:M patterns); 0 = anywhere in the row.
    limit : int, optional
        Swaps per row at most; 0 only re-solves.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    swaps : (R,) int64
    left : (R,) float64
        The row's error afterwards, in the damped second moment.
    str
        The backend that did it: a CPU level for a device, whose tensors are copied over and back.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NonFiniteError
        W or A hold a NaN or an infinity; nothing is written.
    NotPositiveDefiniteError
        A is not positive definite on some row's columns; W and kept must be thrown away.

    Notes
    -----
    Source: exchange steps of subset selection (Miller 2002, section 3.5).
    """
    W = checks.output(W, "W", ndim=2, dtypes=(torch.float64,))
    A = checks.tensor(A, "A", ndim=2, dtypes=(torch.float64,)).contiguous()
    kept = checks.output(kept, "kept", ndim=2, dtypes=(torch.bool,))
    R, C = W.shape
    if A.shape != (C, C):
        raise ShapeError(f"W is ({R}, {C}) but A is {tuple(A.shape)}: A must be ({C}, {C})")
    if fixed is not None:
        fixed = checks.tensor(fixed, "fixed", ndim=2, dtypes=(torch.bool,)).contiguous()
        checks.apart(W, "W", fixed, "fixed")
        checks.apart(kept, "kept", fixed, "fixed")
    for x, name in ((kept, "kept"), (fixed, "fixed")):
        if x is not None and x.shape != W.shape:
            raise ShapeError(f"{name} is {tuple(x.shape)} but W is ({R}, {C})")
        if x is not None:
            checks.same_device(W, "W", x, name)
    checks.same_device(W, "W", A, "A")
    checks.apart(W, "W", A, "A")
    checks.apart(W, "W", kept, "kept")
    group = checks.count(group, "group")
    group = min(group, C + 1)  # more columns than there are
    rounds = 10 * C if limit is None else min(10 * C, checks.count(limit, "limit"))
    checks.check_finite(W, "W")
    checks.check_finite(A, "A")
    chosen = select_backend(backend, W.device)
    swaps = torch.zeros(R, dtype=torch.int64, device=W.device)
    left = torch.zeros(R, dtype=torch.float64, device=W.device)
    if W.numel() == 0:
        return swaps, left, chosen
    if on_device(chosen):
        return _exchange_on_host(W, A, kept, fixed, group, rounds)
    if chosen == "reference":
        swaps, left, row = reference.exchange_(W, A, kept, fixed, group, rounds)
    else:
        status, row = _native(
            "exchange",
            chosen,
            W.device,
            kept.data_ptr(),
            swaps.data_ptr(),
            left.data_ptr(),
            _crossing(W),
            A.data_ptr(),
            0 if fixed is None else fixed.data_ptr(),
            group,
            rounds,
        )
        if status != 2:
            _memory(status)
            row = -1
    if row >= 0:
        raise NotPositiveDefiniteError(
            f"A: not positive definite on the removed columns of row {row}: raise the damping"
        )
    return swaps, left, chosen


def _exchange_on_host(
    W: Tensor, A: Tensor, kept: Tensor, fixed: Tensor | None, group: int, limit: int
) -> tuple[Tensor, Tensor, str]:
    """:func:`exchange_` by the CPU's kernels for tensors of a device."""
    w, k = W.cpu(), kept.cpu()
    swaps, left, used = exchange_(
        w,
        A.cpu(),
        k,
        fixed=None if fixed is None else fixed.cpu(),
        group=group,
        limit=limit,
        backend="cpu",
    )
    W.copy_(w)
    kept.copy_(k)
    return swaps.to(W.device), left.to(W.device), used


# ---- sweep ---------------------------------------------------------------------------------------


def sweep_block_(
    W: Tensor,
    U: Tensor,
    gone: Tensor,
    E: Tensor,
    *,
    group: int = 0,
    per_group: int = 0,
    backend: str | None = None,
) -> str:
    """One block of columns of SparseGPT's sweep: choose, remove, and repair inside the block.

    For each column j: ``e = w_j / U_jj`` where it goes, ``w[j:] -= e U[j, j:]``. The caller repairs
    what is right of the block: ``W[:, right] -= E @ U[block, right]``.

    Parameters
    ----------
    W : (R, B) float64 or float32, columns contiguous
        The block; may be a part of a larger matrix. Written in place.
    U : (B, B) of W's dtype, columns contiguous
        Diagonal block of the upper factor, ``U^T U = A``. Not modified.
    gone : (R, B) uint8, contiguous
        With ``group`` = 0: 1 where a weight goes. With a group: 1 = goes before others and counts,
        2 = stays; overwritten by the choice.
    E : (R, B) of W's dtype, columns contiguous
        Overwritten by e, zero where a weight stays.
    group, per_group : int
        Of every ``group`` columns the ``per_group`` of lowest ``w**2 / U_jj**2`` go. B must be a
        multiple of ``group``.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    str
        The backend that did it.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NotPositiveDefiniteError
        A diagonal entry of U is not positive; nothing is written.

    Notes
    -----
    Source: Frantar & Alistarh 2023 (SparseGPT), algorithm 1.
    """
    floats = (torch.float64, torch.float32)
    W = checks.output(W, "W", ndim=2, dtypes=floats, rows_apart=True)
    U = checks.tensor(U, "U", ndim=2, dtypes=(W.dtype,))
    E = checks.output(E, "E", ndim=2, dtypes=(W.dtype,), rows_apart=True)
    gone = checks.output(gone, "gone", ndim=2, dtypes=(torch.uint8,))
    R, B = W.shape
    if U.shape != (B, B):
        raise ShapeError(f"W is ({R}, {B}) but U is {tuple(U.shape)}: U must be ({B}, {B})")
    U = U if B == 0 or U.stride(1) == 1 else U.contiguous()
    for x, name in ((gone, "gone"), (E, "E")):
        if x.shape != W.shape:
            raise ShapeError(f"{name} is {tuple(x.shape)} but W is ({R}, {B})")
    for x, name in ((U, "U"), (gone, "gone"), (E, "E")):
        checks.same_device(W, "W", x, name)
        checks.apart(W, "W", x, name)
    for x, name in ((U, "U"), (gone, "gone")):
        checks.apart(E, "E", x, name)
    checks.apart(gone, "gone", U, "U")
    group = checks.count(group, "group")
    per_group = checks.count(per_group, "per_group")
    if group and (B % group or per_group > group):
        raise ArgumentError(
            f"group: {per_group} of {group} columns do not fit a block of {B} columns"
        )
    chosen = select_backend(backend, W.device)
    if W.numel() == 0:
        return chosen
    if chosen == "reference":
        bad = ~(U.diagonal() > 0)
        status, j = (2, int(bad.to(torch.uint8).argmax())) if bool(bad.any()) else (0, 0)
        if status == 0:
            reference.sweep_block_(W, U, gone, E, group, per_group)
    else:
        status, j = _native(
            "sweep_block",
            chosen,
            W.device,
            _crossing(W),
            _crossing(U),
            gone.data_ptr(),
            _crossing(E),
            group,
            per_group,
        )
    if status == 2:
        raise NotPositiveDefiniteError(
            f"U: {float(U[j, j])} at ({j}, {j}); it must be positive: raise the damping"
        )
    _memory(status)
    return chosen
