"""Selection and sorting of the lowest scores, with exact counts and defined ties."""

from __future__ import annotations

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import call, check_status, has

__all__ = ["rank_lowest", "rank_rows"]


def rank_lowest(score: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """Choose exactly ``count`` scores of each row, the lowest ones.

    Parameters
    ----------
    score : (R, C) float64, without NaN
        Infinities are allowed; plus infinity is chosen last. Not modified.
    count : int, 0 <= count <= C
        Number of scores to choose.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    (R, C) bool
        True for the chosen scores. Among equals the lowest column goes first.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NonFiniteError
        score holds a NaN.
    """
    score = checks.tensor(score, "score", ndim=2, dtypes=(torch.float64,)).contiguous()
    R, C = score.shape
    if isinstance(count, bool) or not isinstance(count, int):
        raise DtypeError(f"count: expected an integer, got {type(count).__name__}")
    if not 0 <= count <= C:
        raise ArgumentError(f"count: {count}; there are {C} scores in a row")
    # Without infinities a sum tells that there is no NaN, in a third of the time.
    if not bool(torch.isfinite(score.sum())) and bool(torch.isnan(score).any()):
        raise NonFiniteError("score: it holds NaN, which has no rank")
    chosen_backend = dispatch.select_backend(backend, score.device)
    if chosen_backend == "reference":
        return reference.rank_lowest(score, count)
    chosen = torch.empty(R, C, dtype=torch.bool, device=score.device)
    if score.numel():
        status, _ = call(
            "rank_lowest",
            chosen_backend,
            score.device,
            chosen.data_ptr(),
            score.data_ptr(),
            R,
            C,
            count,
        )
        check_status(status)
    return chosen


def rank_rows(
    score: Tensor, chosen: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sort the chosen columns of each row by rising score.

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
        Columns, row after row, as :func:`static_order_prune_` takes them. Among equals the lowest
        column goes first.
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
    name = dispatch.select_backend(backend, score.device)
    if name == "reference" or not has(name, "rank_rows"):  # sorted by torch
        return reference.rank_rows(score, chosen)
    R, C = score.shape
    start = torch.zeros(R + 1, dtype=torch.int64)
    # As bytes, which torch adds up ten times as fast as bools.
    start[1:] = chosen.view(torch.uint8).sum(dim=1, dtype=torch.int32).cumsum(0)
    order = torch.empty(int(start[-1]), dtype=torch.int32)
    if order.numel():
        status, _ = call(
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
        check_status(status)
    return order, start
