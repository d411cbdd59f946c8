"""Pruning of one weight matrix by the second moment of its inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.hessian import Hessian, few_rows, second_moment
from lobs_native.solvers.methods import method_of
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.pruning import prune_problem
from lobs_native.solvers.result import PrunedWeight, finish, first_group
from lobs_native.solvers.rows import WHOLE, Rows
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.workspace import Workspace

__all__ = ["PrunedWeight", "prune_groups", "prune_weight"]


def prune_weight(
    weight: Any,
    hessian: Any,
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    threshold: float | None = None,
    method: str = "auto",
    pattern: Any = "unstructured",
    scope: str = "layer",
    bias: Any = None,
    prune_bias: bool = False,
    mask: Any = None,
    damping: float = 0.01,
    refine: str | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> PrunedWeight:
    """Remove weights from one layer and repair the rest.

    ``"exact"`` is true Optimal Brain Surgeon. It removes the weight whose removal costs least,
    ``w_q**2 / A_qq``, lets all others of its row compensate, downdates A, and repeats. ``"admm"``
    alternates between the best weights near a sparse matrix and the sparse matrix nearest to them,
    each weight measured by that price, and ends with kept weights whose error is within some
    thousandths of the best for their mask. It costs some 30 products of the layer's size, whatever
    is removed, and loses 3 to 5 percent less than "exact" (N:M: 17 percent) on layers of
    transformers. ``"auto"`` is "exact" up to 256 columns, where that takes less time, and "admm"
    beyond; ``method`` of the result says which. ``"sweep"`` is SparseGPT's: columns from left to
    right in blocks of 128, with one shared factor; it is several times faster and makes 1.5 to 2
    times the error. ``"lobs"`` is the paper's procedure: rank all weights once by ``w**2 / A_qq``,
    remove them in that order, and after each removal add ``-(w_q / A_qq) A[:, q]`` to its row, with
    ``A = (H + damping * mean(diag H) * I)^-1`` never downdated. ``"magnitude"`` ranks by ``abs(w)``
    and ``"wanda"`` by ``abs(w) * sqrt(H_qq)``; neither changes the kept weights.

    Parameters
    ----------
    weight : (R, C) float64, float32, float16 or bfloat16
        One output unit per row. Not modified. Gradients are not tracked.
    hessian : Hessian, or (C, C) tensor
        Mean second moment of the layer's inputs; with ``bias``, (C + 1, C + 1), the ones column
        last. Not modified.
    sparsity : float in [0, 1]
        Share of the weights that are zero afterwards: exactly the nearest whole number of them (a
        half rounds down), including zeros that were there before.
    threshold : float >= 0
        The paper's epsilon: remove every weight with ``sqrt(L_q) <= threshold``, where ``L_q = w**2
        / (2 A_qq)`` (eq. 5-7).
    max_error : float >= 0
        Remove as many as leave the incurred ``error`` at or below this. A bisection over the count
        finds how many.
    method : "auto", "exact", "admm", "sweep", "lobs", "magnitude" or "wanda"
    pattern : "unstructured", "N:M" or "1xB"
        ``"2:4"`` keeps 2 of every 4 neighbouring inputs of a row. It determines the sparsity, so
        leave the three targets out. ``"1x4"`` removes 4 neighbouring inputs of a row together. Rows
        must be whole groups.
    scope : "layer" or "row"
        Compare weights over the whole layer, or give every row the same number of removals. Under
        "sweep", the whole layer means all rows of a block of columns.
    bias : (R,), optional
        Updated together with the weights; never removed unless ``prune_bias``. Not modified.
    prune_bias : bool
        Rank and remove biases like weights, as the authors' code does. They then count in
        ``sparsity``.
    mask : (R, C) bool, optional
        True = may stay. Entries that are False are removed first, whatever they cost. Without a
        target, exactly those are removed, and the rest is repaired.
    damping : float >= 0
        Fraction of the mean diagonal of H that is added to the diagonal. Where Cholesky fails, 10
        and 100 times as much is tried; ``damping``, ``status`` and ``notes`` of the result then say
        so. Where all rows lose the same, the kept weights are solved for with more if the rows of
        ``hessian`` are few, by generalised cross-validation (Golub, Heath & Wahba 1979).
    refine : None, "solve" or "exchange"
        "solve" recomputes the kept weights for the final mask in float64, whatever the method.
        "exchange" then swaps a kept weight of a row against a removed one as long as one swap
        lowers the error, and takes C * C / 2 doubles per thread. It does not work with 1xB patterns
        and brings nothing back that the mask removes. For CUDA tensors the exchanges are made on
        the CPU, and ``notes`` says so.
    memory : int, optional
        Limit on the bytes of scratch for "exact": it then uses fewer threads (on a device, fewer
        rows at a time), or raises MemoryError; see :func:`plan_memory`.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    PrunedWeight
        New tensors like the inputs, the mask, the incurred error, and what was used and noted.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, PatternError, BackendError
        An argument does not fit; the message names it.
    NonFiniteError
        A NaN or an infinity in weight, bias or hessian (either triangle).
    NotPositiveDefiniteError
        The second moment cannot be inverted even with 100 times the damping.

    Notes
    -----
    Ties go to the lowest row, then column (except under "admm": weights that are equal at first do
    not stay so). Inputs that are zero in every sample ("dead") cost
    nothing, so their weights are removed first under ``"lobs"`` and ``"wanda"``. With a damping
    below 1e-4 the removal runs in float64 whatever the weight's type. ``optimality`` of the result
    says how far the kept weights are from the best for their mask and the damped H, in units of
    rounding: below about 30, they are the best. For methods that do not aim at the best, it is that
    of 32 rows.

    Sources: Dong, Chen & Pan 2017, algorithm 1, for "lobs"; Hassibi & Stork 1993 and Frantar, Singh
    & Alistarh 2022 for "exact"; Boza 2024 and Meng et al. 2024 (ALPS) for "admm", whose scaling is
    ours; Frantar & Alistarh 2023 for "sweep"; Sun et al. 2024 for "wanda".
    """
    W, H, b, allowed, notes = one_layer(weight, hessian, bias, mask)
    settings = LayerSettings(
        sparsity=sparsity,
        threshold=threshold,
        max_error=max_error,
        method=method,
        pattern=pattern,
        scope=scope,
        damping=damping,
        prune_bias=prune_bias,
        refine=refine,
    )
    out = prune_groups(
        W,
        [H],
        settings,
        samples=[hessian.rows] if isinstance(hessian, Hessian) else (),
        bias=b,
        mask=allowed,
        memory=memory,
        backend=backend,
        notes=notes,
    )
    return first_group(out)


def one_layer(
    weight: Any, hessian: Any, bias: Any, mask: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[str]]:
    """Check a layer's tensors. Returns weight (1, R, C), second moment, bias (1, R), mask
    (1, R, C), and notes on the second moment."""
    W = checks.tensor(weight, "weight", ndim=2)
    H = hessian.matrix() if isinstance(hessian, Hessian) else second_moment(hessian, "hessian")
    notes = []
    if isinstance(hessian, Hessian) and 1 < hessian.rows < hessian.columns:
        notes.append(few_rows(hessian.rows, hessian.columns))
    b = None if bias is None else checks.tensor(bias, "bias", ndim=1)[None]
    allowed = None
    if mask is not None:
        allowed = checks.tensor(mask, "mask", ndim=2, dtypes=(torch.bool,))[None]
    return W[None], H, b, allowed, notes


# ---- the work, over G groups that are ranked together (grouped convolutions; G = 1 otherwise) ----


@ops.full_precision()
def prune_groups(
    W: Tensor,
    moments: Sequence[Tensor],
    settings: LayerSettings,
    *,
    samples: Sequence[float] = (),
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    memory: int | None = None,
    backend: str | None = None,
    notes: Sequence[str] = (),
    drift: Drift | None = None,
    importance: Tensor | None = None,
    rows: Rows = WHOLE,
) -> PrunedWeight:
    """:func:`prune_weight` for a layer of G groups, each with its own second moment, ranked as one
    layer.

    W (G, R, C), moments G times (C, C) or (C + 1, C + 1), bias (G, R), mask (G, R, C). ``samples``
    says how many each second moment is of, where that is known: few make it cheaper. With a
    drift, the weights that make up for it are pruned instead of W, whatever the method, and errors
    are relative to the desired outputs. ``importance`` (G, R) multiplies the costs of a row where
    "exact" compares rows. ``rows`` may divide those of one group among processes, all of which call
    this alike and get the same. Returns a PrunedWeight whose tensors have a leading G.
    """
    begun = time.perf_counter()
    settings.check_target(masked=mask is not None)
    settings = settings.for_order(W.shape[2] + (bias is not None))
    pattern, target, scope = settings.resolved_pattern, settings.target, settings.scope
    method, prune_bias, refine = settings.method, settings.prune_bias, settings.refine
    if memory is not None:
        memory = checks.positive_int(memory, "memory")
    chosen = method_of(method, pattern)
    problem = Problem.of(
        W,
        bias,
        moments,
        damping=settings.damping,
        inverted=chosen.inverts or refine is not None,
        factor_alone=chosen.factor_alone,
        narrow=refine is None,
        samples=samples,
        prune_bias=prune_bias,
        mask=mask,
        workspace=Workspace(ops.select_backend(backend, W.device), memory, rows=rows),
        drift=drift,
    )
    pattern.check_fit(W.shape[2], mask, prune_bias=prune_bias)
    pruned = prune_problem(
        problem,
        chosen,
        pattern,
        target=target,
        scope=scope,
        refine=refine,
        importance=importance,
    )
    return finish(problem, pruned, method=method, begun=begun, notes=notes)
