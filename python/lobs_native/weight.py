"""One layer: prune a weight matrix by its inputs' second moment, and say what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lobs_native.hessian import Hessian, Inverse, invert, second_moment
from lobs_native.patterns import pattern_of

__all__ = ["METHODS", "PrunedWeight", "Target", "prune_groups", "prune_weight"]

METHODS = ("lobs", "magnitude", "wanda")
SCOPES = ("row", "layer")
_FLOAT64_BELOW = 1e-4  # damping under which float32 kernels lose too much
_FORCED, _ZERO = -2.0, -1.0  # scores below every real one: masked out already, zero already


@dataclass(frozen=True)
class PrunedWeight:
    """What :func:`prune_weight` returns."""

    weight: Tensor  # (R, C), dtype and device of the input; removed entries are exactly zero
    bias: Tensor | None  # (R,), updated together with the weights
    mask: Tensor  # (R, C) bool, True = kept
    bias_mask: Tensor | None  # (R,) bool, only with prune_bias=True
    error: float  # tr(dW H dW^T) of the final weights in float64, with the bias, without damping
    relative_error: float  # error / tr(W H W^T)
    sparsity: float  # share of removed entries among those that could be removed
    damping: float  # the fraction that was used; 0 where the method inverts nothing
    method: str
    backend: str  # which backend made it
    status: str  # "ok", or "damping raised"
    notes: tuple[str, ...] = field(
        default=()
    )  # everything that was done differently from what was asked
    dead_columns: int = 0  # inputs whose second moment is zero
    seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """How far to go. Exactly one of the three is set."""

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None

    @classmethod
    def of(cls, sparsity: Any, threshold: Any, max_error: Any, method: str) -> Target:
        """Check the three arguments; ArgumentError names what is wrong."""
        given = {
            name: checks.real(value, name)
            for name, value in (
                ("sparsity", sparsity),
                ("threshold", threshold),
                ("max_error", max_error),
            )
            if value is not None
        }
        if len(given) != 1:
            said = ", ".join(f"{k}={v:g}" for k, v in given.items()) or "none"
            raise ArgumentError(
                f"sparsity, threshold, max_error: give exactly one of them, not {said}"
            )
        ((name, value),) = given.items()
        if name == "sparsity" and not 0 <= value <= 1:
            raise ArgumentError(
                f"sparsity: {value:g}; it is a fraction from 0 (remove nothing) to 1 (remove all)"
            )
        if value < 0:
            raise ArgumentError(f"{name}: {value:g}; it must be >= 0")
        if name == "threshold" and method != "lobs":
            raise ArgumentError(
                f"threshold: it bounds the paper's sqrt(L_q), which method {method!r} has not; "
                "use sparsity"
            )
        return cls(**given)


def check_choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """``value`` if it is one of ``choices``; an error that lists them otherwise."""
    if not isinstance(value, str):
        raise DtypeError(
            f"{name}: expected one of {', '.join(choices)}, got {type(value).__name__}"
        )
    if value not in choices:
        raise ArgumentError(f"{name}: {value!r}; expected one of {', '.join(choices)}")
    return value


def check_damping(damping: Any) -> float:
    """``damping`` as a finite fraction >= 0."""
    value = checks.real(damping, "damping")
    if not 0 <= value < math.inf:
        raise ArgumentError(
            f"damping: {value:g}; it is a fraction of the mean diagonal of H, finite and >= 0"
        )
    return value


def prune_weight(
    weight: Any,
    hessian: Any,
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    threshold: float | None = None,
    method: str = "lobs",
    pattern: Any = "unstructured",
    scope: str = "layer",
    bias: Any = None,
    prune_bias: bool = False,
    mask: Any = None,
    damping: float = 0.01,
    backend: str | None = None,
) -> PrunedWeight:
    """Remove weights from one layer and repair the rest.

    ``"lobs"`` is the paper's procedure: rank all weights once by ``w**2 / A_qq``, remove them in
    that order, and after each removal add ``-(w_q / A_qq) A[:, q]`` to its row, with ``A = (H +
    damping * mean(diag H) * I)^-1`` never downdated. ``"magnitude"`` ranks by ``abs(w)`` and
    ``"wanda"`` by ``abs(w) * sqrt(H_qq)``; neither changes the kept weights.

    Parameters
    ----------
    weight : (R, C) float64, float32, float16 or bfloat16
        One output unit per row. Not modified. Gradients are not tracked.
    hessian : Hessian, or (C, C) tensor
        Mean second moment of the layer's inputs; with ``bias``, (C + 1, C + 1), the ones column
        last. Not modified.
    sparsity : float in [0, 1]
        Share of the weights that are zero afterwards: exactly the nearest whole number of them (a
        half rounds down), zeros that were there before included.
    threshold : float >= 0
        The paper's epsilon: remove every weight with ``sqrt(L_q) <= threshold``, where ``L_q = w**2
        / (2 A_qq)`` (eq. 5-7).
    max_error : float >= 0
        Remove as many as leave the incurred ``error`` at or below this (found by bisection over the
        ranking).
    method : "lobs", "magnitude" or "wanda"
    pattern : "unstructured"
    scope : "layer" or "row"
        Compare weights over the whole layer, or give every row the same number of removals.
    bias : (R,), optional
        Updated together with the weights; never removed unless ``prune_bias``. Not modified.
    prune_bias : bool
        Rank and remove biases like weights, as the authors' code does. They then count in
        ``sparsity``.
    mask : (R, C) bool, optional
        True = may stay. Entries that are False are removed first, whatever they cost.
    damping : float >= 0
        Fraction of the mean diagonal of H that is added to the diagonal. Where Cholesky fails, 10
        and 100 times as much is tried, and ``damping``, ``status`` and ``notes`` of the result say
        so.
    backend : str, optional
        A name from ``backends()``.

    Returns
    -------
    PrunedWeight
        New tensors like the inputs, the mask, and what was incurred, used and noted.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, PatternError, BackendError
        An argument does not fit; the message names it.
    NonFiniteError
        A NaN or an infinity in weight, bias or hessian (either triangle).
    NotPositiveDefiniteError
        The second moment cannot be inverted even at the end of the ladder.

    Notes
    -----
    Ties go to the lowest row, then column. Inputs that are zero in every row ("dead") cost nothing,
    so their weights go first under ``"lobs"`` and ``"wanda"``. With a damping below 1e-4 the
    removal runs in float64 whatever the weight's type. Source: Dong, Chen & Pan 2017, algorithm 1;
    Sun et al. 2024 for "wanda".
    """
    W = checks.tensor(weight, "weight", ndim=2)
    H = hessian.matrix() if isinstance(hessian, Hessian) else second_moment(hessian, "hessian")
    notes = []
    if isinstance(hessian, Hessian) and 1 < hessian.rows < hessian.columns:
        notes.append(few_rows(hessian.rows, hessian.columns))
    b = None if bias is None else checks.tensor(bias, "bias", ndim=1)
    allowed = None if mask is None else checks.tensor(mask, "mask", ndim=2, dtypes=(torch.bool,))
    out = prune_groups(
        W[None],
        [H],
        target=Target.of(sparsity, threshold, max_error, check_choice(method, "method", METHODS)),
        method=method,
        pattern=pattern,
        scope=scope,
        bias=None if b is None else b[None],
        prune_bias=prune_bias,
        mask=None if allowed is None else allowed[None],
        damping=damping,
        backend=backend,
        notes=notes,
    )
    return _first_group(out)


def few_rows(rows: float, columns: int) -> str:
    """The note for a second moment that cannot have full rank."""
    return (
        f"fewer rows ({rows:g}) than columns ({columns}): the damping decides along the unseen "
        f"directions"
    )


def _first_group(out: PrunedWeight) -> PrunedWeight:
    def first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[0]

    changed = {name: first(getattr(out, name)) for name in ("weight", "bias", "mask", "bias_mask")}
    return PrunedWeight(**{**vars(out), **changed})


# ---- the work, over G groups that are ranked together (grouped convolutions; G = 1 otherwise) ----


def prune_groups(
    W: Tensor,
    moments: Sequence[Tensor],
    *,
    target: Target,
    method: str,
    pattern: Any = "unstructured",
    scope: str = "layer",
    bias: Tensor | None = None,
    prune_bias: bool = False,
    mask: Tensor | None = None,
    damping: float = 0.01,
    backend: str | None = None,
    notes: Sequence[str] = (),
) -> PrunedWeight:
    """:func:`prune_weight` for a layer of G groups, each with its own second moment, ranked as one
    layer.

    W (G, R, C), moments G times (C, C) or (C + 1, C + 1), bias (G, R), mask (G, R, C). Returns a
    PrunedWeight whose tensors have the leading G.
    """
    begun = time.perf_counter()
    pattern_of(pattern)
    check_choice(scope, "scope", SCOPES)
    damping = check_damping(damping)
    checks.flag(prune_bias, "prune_bias")
    _check_layer(W, moments, bias, mask, prune_bias)
    chosen = ops.select_backend(backend, W.device)
    C = W.shape[2]
    layer = _Layer.of(W, bias, moments, method, damping, chosen)
    layer.rank(method, mask, prune_bias)
    candidates = layer.before.shape[2] if prune_bias else C
    if target.max_error is not None:
        gone = _bisect(layer, scope, candidates, target.max_error)
    elif target.threshold is not None:
        gone = layer.below(target.threshold)
    else:
        assert target.sparsity is not None
        gone = _cheapest(layer, scope, candidates, target.sparsity)
    if mask is not None and not bool(gone[:, :, :C][~mask].all()):
        raise ArgumentError(
            f"mask: it already removes {int((~mask).sum())} of {mask.numel()} weights, more "
            "than was asked for: ask for more"
        )
    weight, new_bias, error = layer.without(gone)
    energy = _quadratic(layer.before, moments)
    return PrunedWeight(
        weight=weight,
        bias=new_bias,
        mask=~gone[:, :, :C],
        bias_mask=~gone[:, :, C] if prune_bias else None,
        error=error,
        relative_error=error / energy if energy > 0 else (0.0 if error == 0 else math.inf),
        sparsity=int(gone.sum()) / (W.shape[0] * W.shape[1] * candidates),
        damping=max((i.damping for i in layer.inverses), default=0.0),
        method=method,
        backend=chosen,
        status="damping raised" if any(i.raised for i in layer.inverses) else "ok",
        notes=(*notes, *layer.notes(weight, gone, damping)),
        dead_columns=sum(int(d.sum()) for d in layer.dead),
        seconds=time.perf_counter() - begun,
    )


@dataclass
class _Layer:
    """A layer while it is being pruned: G groups, R rows, D columns (a bias is the last one)."""

    before: Tensor  # (G, R, D) float64
    moments: Sequence[Tensor]  # G times (D, D) float64
    inverses: list[Inverse]  # G of them, or none for methods that only rank
    dead: list[Tensor]  # G times (C,) bool: inputs that were zero in every row
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    precise: bool  # the removal runs in float64
    backend: str
    score: Tensor  # (G, R, D) float64: cheapest first, infinite where nothing may be removed
    unit: float = 1.0  # for "lobs": w**2 / A_qq is score * unit**2

    @classmethod
    def of(
        cls,
        W: Tensor,
        bias: Tensor | None,
        moments: Sequence[Tensor],
        method: str,
        damping: float,
        backend: str,
    ) -> _Layer:
        before = W.to(torch.float64)
        if bias is not None:
            before = torch.cat([before, bias[:, :, None].to(torch.float64)], 2)
        inverses: list[Inverse] = []
        if method == "lobs":
            name = "hessian" if len(moments) == 1 else "hessian of group {}"
            inverses = [invert(H, damping, name.format(g)) for g, H in enumerate(moments)]
        double = torch.float64 in (W.dtype, None if bias is None else bias.dtype)
        little = any(i.damping < _FLOAT64_BELOW for i in inverses)
        return cls(
            before=before,
            moments=moments,
            inverses=inverses,
            dead=[H.diagonal()[: W.shape[2]] == 0 for H in moments],
            weight_dtype=W.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            precise=double or little,
            backend=backend,
            score=torch.empty_like(before),
        )

    def rank(self, method: str, mask: Tensor | None, prune_bias: bool) -> None:
        """Fill ``score`` and ``unit``.

        Powers of two are taken out of W and H, so that squares neither over- nor underflow and the
        ranking does not depend on the scale of either.
        """
        exponent = max(-1000, min(1000, math.frexp(float(self.before.abs().max()))[1]))
        scaled = self.before * math.ldexp(1.0, -exponent)
        common = max((i.scale for i in self.inverses), default=1.0)
        for g, H in enumerate(self.moments):
            if method == "magnitude":
                self.score[g] = scaled[g].abs()
            elif method == "wanda":
                self.score[g] = scaled[g].abs() * H.diagonal().sqrt()
            else:
                inverse = self.inverses[g]
                self.score[g] = scaled[g] ** 2 / inverse.A.diagonal() * (inverse.scale / common)
                self.score[g][:, : len(self.dead[g])][:, self.dead[g]] = 0.0
        root = math.sqrt(common)  # a power of two, or one times sqrt(2)
        beyond = math.frexp(root)[1] + exponent > 1023
        self.unit = math.inf if beyond else math.ldexp(root, exponent)
        self.score[self.before == 0] = _ZERO
        if self.bias_dtype is not None and not prune_bias:
            self.score[:, :, -1] = torch.inf
        if mask is not None:
            self.score[:, :, : mask.shape[2]][~mask] = _FORCED

    def below(self, threshold: float) -> Tensor:
        """Bool (G, R, D): sqrt(L_q) <= threshold. The paper's L_q has a factor 1/2."""
        root = torch.sqrt(0.5 * self.score.clamp_min(0.0)) * self.unit
        return torch.isfinite(self.score) & (root <= threshold)

    def without(self, gone: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """The weights and biases in their own types after a removal, and its incurred error."""
        zeroed = torch.where(gone, 0.0, self.before)
        after = self._compensated(gone) if self.inverses else zeroed
        C = after.shape[2] - (self.bias_dtype is not None)
        weight = after[:, :, :C].to(self.weight_dtype, copy=True).contiguous()
        bias = None
        final = weight.to(torch.float64)
        if self.bias_dtype is not None:
            bias = after[:, :, C].to(self.bias_dtype, copy=True).contiguous()
            final = torch.cat([final, bias[:, :, None].to(torch.float64)], 2)
        if not bool(torch.isfinite(final).all()):
            kind = str(self.weight_dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"weight: a kept weight outgrew {kind} when it was compensated; convert the layer "
                "to a wider type, raise the damping, or remove less"
            )
        return weight, bias, _quadratic(final - self.before, self.moments)

    def _compensated(self, gone: Tensor) -> Tensor:
        work = self.before.to(torch.float64 if self.precise else torch.float32, copy=True)
        work = work.contiguous()
        for g, inverse in enumerate(self.inverses):
            order, start = ops.rank_rows(self.score[g], gone[g], backend=self.backend)
            A = inverse.A.to(work.dtype)
            ops.static_order_prune_(work[g], A, order, start, backend=self.backend)
        return work

    def notes(self, weight: Tensor, gone: Tensor, damping: float) -> list[str]:
        """What was done differently from what was asked."""
        said = []
        used = max((i.damping for i in self.inverses), default=damping)
        if any(i.raised for i in self.inverses):
            said.append(f"Cholesky failed with damping {damping:g}; {used:g} was used")
        if self.precise and self.weight_dtype != torch.float64 and self.inverses:
            why = (
                f"the damping is below {_FLOAT64_BELOW:g}"
                if any(i.damping < _FLOAT64_BELOW for i in self.inverses)
                else "the bias is float64"
            )
            said.append(f"computed in float64 because {why}")
        C = weight.shape[2]
        lost = int(((weight == 0) & ~gone[:, :, :C] & (self.before[:, :, :C] != 0)).sum())
        if lost:
            kind = str(self.weight_dtype).removeprefix("torch.")
            said.append(f"{lost} kept weights became zero when they were rounded to {kind}")
        return said


def _check_layer(
    W: Tensor, moments: Sequence[Tensor], bias: Tensor | None, mask: Tensor | None, prune_bias: bool
) -> None:
    G, R, C = W.shape
    if W.numel() == 0:
        raise ShapeError(f"weight: shape {tuple(W.shape[1:])} is empty; leave this layer out")
    checks.check_finite(W if G > 1 else W[0], "weight")
    if prune_bias and bias is None:
        raise ArgumentError("prune_bias: True, but no bias was given; pass bias=")
    size = C
    if bias is not None:
        size += 1
        if bias.shape != (G, R):
            raise ShapeError(f"bias: shape {tuple(bias.shape[1:])}, but weight has {R} rows")
        if bias.device != W.device:
            raise ShapeError(
                f"bias is on {bias.device} but weight is on {W.device}: move one of them"
            )
        checks.check_finite(bias if G > 1 else bias[0], "bias")
    for H in moments:
        if H.shape != (size, size):
            hint = ""
            if bias is None and len(H) == C + 1:
                hint = "; it seems to have a ones column: pass bias= as well"
            elif bias is not None and len(H) == C:
                hint = "; with a bias it needs a ones column: Hessian(columns, bias=True)"
            raise ShapeError(
                f"hessian: {tuple(H.shape)}, expected ({size}, {size}) for weight ({R}, {C}){hint}"
            )
        if H.device != W.device:
            raise ShapeError(
                f"hessian is on {H.device} but weight is on {W.device}: move one of them"
            )
    if mask is not None:
        if mask.shape != W.shape:
            raise ShapeError(f"mask: shape {tuple(mask.shape[1:])}, but weight is ({R}, {C})")
        if mask.device != W.device:
            raise ShapeError(
                f"mask is on {mask.device} but weight is on {W.device}: move one of them"
            )


def _count(share: float, of: int) -> int:
    """The nearest whole number to share * of; a half rounds down, so that rounding never removes
    more than half a weight."""
    return min(of, max(0, math.ceil(share * of - 0.5)))


def _cheapest(layer: _Layer, scope: str, candidates: int, share: float) -> Tensor:
    """Bool (G, R, D): exactly the count asked for, cheapest first, ties to the lowest position."""
    G, R, D = layer.score.shape
    if scope == "row":
        rows, count = layer.score.reshape(G * R, D), _count(share, candidates)
    else:
        rows, count = layer.score.reshape(1, -1), _count(share, G * R * candidates)
    return ops.rank_lowest(rows, count, backend=layer.backend).reshape(G, R, D)


def _quadratic(dW: Tensor, moments: Sequence[Tensor]) -> float:
    """sum over groups of tr(dW H dW^T) in float64, never below zero.

    Raises NonFiniteError where that is beyond float64.
    """
    total = sum(float(((d @ H) * d).sum()) for d, H in zip(dW, moments, strict=True))
    if not math.isfinite(total):
        raise NonFiniteError(
            "weight: tr(W H W^T) is beyond float64; scale the weight or the hessian down"
        )
    return max(0.0, total)


def _bisect(layer: _Layer, scope: str, candidates: int, limit: float) -> Tensor:
    """The largest removal found whose incurred error is at or below ``limit``."""
    G, R, _ = layer.score.shape
    steps = candidates if scope == "row" else G * R * candidates
    low, high = 0, steps  # low is feasible; nothing above high is
    best = _cheapest(layer, scope, candidates, 0.0)
    while low < high:
        middle = (low + high + 1) // 2
        gone = _cheapest(layer, scope, candidates, middle / steps)
        if layer.without(gone)[2] <= limit:
            low, best = middle, gone
        else:
            high = middle - 1
    return best
