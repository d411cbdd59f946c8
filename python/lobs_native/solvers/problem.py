"""One layer as a quadratic problem: weights, second moments, inverses, and what a change costs.

Shared by every method. G groups (grouped convolutions; 1 otherwise), R rows, D columns: the C
inputs and, with a bias, the column of ones last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from lobs_native.solvers.inversion import Inverse, invert

__all__ = ["OPTIMAL", "PIECE", "Drift", "Problem", "in_errors", "nearest_count"]

_FLOAT64_BELOW = 1e-4  # damping under which float32 kernels lose too much
OPTIMAL = 30.0  # optimality ratio (LAPACK's threshold for its own) above which exact is redone
PIECE = 1 << 19  # elements of a float64 temporary
_NORM_STEPS = 12  # of the power iteration; second moments have a dominant direction


@dataclass(frozen=True)
class Drift:
    """How far a layer with its original weights is, on its inputs x, from outputs y that it should
    have; means over the rows, of all groups together.

    The best weights are then not the original ones but, with damping, ``W + (A pull)^T``: the
    minimum of ``|y - x W'^T|^2`` plus the damping times ``|W' - W|^2``.
    """

    pull: Sequence[Tensor]  # G times (D, R) float64: x^T (y - x W^T)
    inherited: float  # |y - x W^T|^2
    energy: float  # what errors are relative to


@dataclass
class Problem:
    """A layer while it is being pruned."""

    before: Tensor  # (G, R, D) float32, or float64 where weight or bias is; never written
    original: Tensor  # (G, R, D), the same unless a drift has been made up for
    moments: Sequence[Tensor]  # G times (D, D) float64
    inverses: list[Inverse]  # G of them, or none for methods that need none
    dead: list[Tensor]  # G times (C,) bool: inputs that were zero in every row
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    prune_bias: bool
    mask: Tensor | None  # (G, R, C) bool, True = may stay
    precise: bool  # kernels run in float64
    backend: str
    memory: int | None = None  # bytes of kernel scratch
    drift: Drift | None = None
    said: list[str] = field(default_factory=list)  # what was done differently from what was asked
    widened: set[int] = field(default_factory=set)  # rows that float32 was too narrow for
    norms: dict[int, float] = field(default_factory=dict)  # of second moments, once asked for

    @classmethod
    def of(
        cls,
        W: Tensor,
        bias: Tensor | None,
        moments: Sequence[Tensor],
        *,
        damping: float,
        inverted: bool,
        prune_bias: bool,
        mask: Tensor | None,
        backend: str,
        memory: int | None = None,
        drift: Drift | None = None,
    ) -> Problem:
        """Check that the parts fit together, and invert the second moments if asked."""
        _check_layer(W, moments, bias, mask, prune_bias)
        double = torch.float64 in (W.dtype, None if bias is None else bias.dtype)
        before = W.to(torch.float64 if double else torch.float32)
        if bias is not None:
            before = torch.cat([before, bias[:, :, None].to(before.dtype)], 2)
        original = before
        inverses: list[Inverse] = []
        if inverted or drift is not None:
            name = "hessian" if len(moments) == 1 else "hessian of group {}"
            inverses = [invert(H, damping, name.format(g)) for g, H in enumerate(moments)]
        if drift is not None:
            before = original.clone()
            for w, inverse, pull in zip(before, inverses, drift.pull, strict=True):
                w += inverse.times(pull).div_(inverse.scale).T
            checks.check_finite(before, "weight, corrected for what came before it")
        little = any(i.damping < _FLOAT64_BELOW for i in inverses)
        made = cls(
            before=before,
            original=original,
            moments=moments,
            inverses=inverses,
            dead=[H.diagonal()[: W.shape[2]] == 0 for H in moments],
            weight_dtype=W.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            prune_bias=prune_bias,
            mask=mask,
            precise=double or little,
            backend=backend,
            memory=memory,
            drift=drift,
        )
        if any(i.raised for i in inverses):
            made.said.append(f"Cholesky failed with damping {damping:g}; {made.damping:g} was used")
        if made.precise and W.dtype != torch.float64 and inverses:
            why = f"the damping is below {_FLOAT64_BELOW:g}" if little else "the bias is float64"
            made.said.append(f"computed in float64 because {why}")
        return made

    @property
    def columns(self) -> int:
        """C: inputs, without the column of ones."""
        return self.before.shape[2] - (self.bias_dtype is not None)

    @property
    def candidates(self) -> int:
        """Weights per row that may be removed."""
        return self.before.shape[2] if self.prune_bias else self.columns

    @property
    def total(self) -> int:
        """Weights of the layer that may be removed."""
        return self.before.shape[0] * self.before.shape[1] * self.candidates

    @property
    def damping(self) -> float:
        """The largest fraction that was used; 0 where nothing was inverted."""
        return max((i.damping for i in self.inverses), default=0.0)

    @property
    def dtype(self) -> torch.dtype:
        """What the kernels compute in."""
        return torch.float64 if self.precise else torch.float32

    @property
    def exponent(self) -> int:
        """A power of two that brings the weights near one, so that their squares keep in range."""
        largest = max(float(self.before.max()), -float(self.before.min()))
        return max(-1000, min(1000, math.frexp(largest)[1]))

    def damped(self, g: int) -> Tensor:
        """(D, D) float64: the second moment of group g over its inverse's scale, with damping.

        It is what ``inverses[g].A`` is the inverse of.
        """
        H = self.moments[g].clone()
        H.diagonal().add_(self._shift(g))
        return H.div_(self.inverses[g].scale)

    def _shift(self, g: int) -> float:
        """What damping adds to the diagonal of group g's second moment; 0 where nothing was
        inverted."""
        mean = float(self.moments[g].diagonal().mean())
        if not self.inverses:
            return 0.0
        return self.inverses[g].damping * mean if mean > 0 else 1.0

    def working(
        self, g: int, dtype: torch.dtype | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """(R, D) contiguous copy of group g's weights (or some rows of them), near one in size,
        zero on dead inputs."""
        given = self.before[g] if rows is None else self.before[g][rows.to(self.before.device)]
        w = scaled_(given.to(dtype or self.dtype, copy=True), -self.exponent)
        w[:, : len(self.dead[g])][:, self.dead[g]] = 0.0
        return w.contiguous()

    def restored(self, after: Tensor, gone: Tensor) -> Tensor:
        """Working weights (G, R, D) after a removal, brought back to the original unit in place."""
        out = scaled_(after, self.exponent)
        for g, dead in enumerate(self.dead):  # a kept weight of a dead input keeps its value
            if bool(dead.any()):
                columns = dead.nonzero()[:, 0]
                out[g][:, columns] = self.before[g][:, columns].to(out.dtype)
        return out.masked_fill_(gone, 0.0)

    def repaired(
        self, gone: Tensor, *, precise: bool | None = None, from_kept: bool = False
    ) -> Tensor:
        """(G, R, D): the best weights that are zero in ``gone`` (G, R, D).

        Solves for the multipliers of the removed weights or for the change of the kept ones,
        whichever are fewer: ``w - A[:, P] A[P, P]^-1 w[P]``, or ``w[S] + H[S, S]^-1 H[S, P] w[P]``.
        ``from_kept`` takes the second, whose error does not grow with the condition of H.
        """
        precise = self.precise if precise is None else precise
        dtype = torch.float64 if precise else torch.float32
        parts = []
        for g, inverse in enumerate(self.inverses):
            w, P = self.working(g, dtype), gone[g].contiguous()
            count = P.sum(1, dtype=torch.float64)
            removed = torch.where(P, w, 0.0)
            fewer = float((count**3).sum()) <= float(((P.shape[1] - count) ** 3).sum())
            if fewer and not from_kept:
                A = inverse.A.to(dtype)
                ops.support_solve_(removed, A, P, backend=self.backend)
                parts.append(w.addmm_(removed, A, alpha=-1))
            else:
                H = self.damped(g).to(dtype)
                change = removed @ H
                ops.support_solve_(change, H, ~P, backend=self.backend)
                parts.append(w.add_(change))
        after = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        return self.restored(after, gone)

    def best(self, gone: Tensor) -> Tensor:
        """:meth:`repaired`; in float64, with a note, where float32 is not enough."""
        if not self.precise:
            try:
                return self.repaired(gone)
            except NotPositiveDefiniteError:
                self.said.append(
                    "the kept weights were solved for in float64: float32 was too narrow"
                )
        return self.repaired(gone, precise=True)

    def rounded(self, after: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (G, R, C) and biases (G, R) in their own types."""
        C = self.columns
        weight = after[:, :, :C].to(self.weight_dtype, copy=True).contiguous()
        bias = None
        if self.bias_dtype is not None:
            bias = after[:, :, C].to(self.bias_dtype, copy=True).contiguous()
        if not all(bool(torch.isfinite(x).all()) for x in (weight, bias) if x is not None):
            kind = str(self.weight_dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"weight: a kept weight outgrew {kind} when it was compensated; convert the layer "
                "to a wider type, raise the damping, or remove less"
            )
        return weight, bias

    def energy(self) -> float:
        """tr(W H W^T) of the original weights; with a drift, of the outputs they should have."""
        if self.drift is not None:
            return _finite(self.drift.energy)
        total = 0.0
        for g, H in enumerate(self.moments):
            for rows in self._pieces():
                total += _error(self.before[g, rows].to(torch.float64), H)[0]
        return _finite(total)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """tr(dW H dW^T) of final weights (G, R, C) and biases (G, R), without damping; with a
        drift, how far their outputs are from those they should have."""
        total = 0.0 if self.drift is None else self.drift.inherited
        for g, H in enumerate(self.moments):
            for rows in self._pieces():
                dW = self._change(weight, bias, g, rows)
                total += _error(dW, H)[0] - self._pulled(dW, g, rows)
        return _finite(total)

    def _pulled(self, dW: Tensor, g: int, rows: slice) -> float:
        """What a change of the original weights gains by following the drift."""
        if self.drift is None:
            return 0.0
        return 2.0 * float((self.drift.pull[g][:, rows].T * dW).sum())

    def measured(self, weight: Tensor, bias: Tensor | None, gone: Tensor) -> tuple[float, float]:
        """:meth:`error`, and the optimality ratio of the kept weights.

        The ratio is the worst row's ``||(dw H) on kept|| / (D eps ||dw|| ||H||)`` with the damped
        H and the eps of the weight's type: below about 30 the kept weights are the best there are
        for their mask as far as this type can tell.
        """
        total = 0.0 if self.drift is None else self.drift.inherited
        worst = 0.0
        eps = torch.finfo(self.weight_dtype).eps
        for g, H in enumerate(self.moments):
            shift = self._shift(g)
            norm = self._norm(g) + shift or 1.0
            for rows in self._pieces():
                dW = self._change(weight, bias, g, rows)
                error, G = _error(dW, H)
                total += error - self._pulled(dW, g, rows)
                if self.drift is not None:
                    dW -= (self.before - self.original)[g, rows]
                    G = dW @ H
                G.add_(dW, alpha=shift).masked_fill_(gone[g, rows], 0.0)
                # Taken out of both, so that squares keep in range.
                largest = dW.abs().amax(1, keepdim=True)
                moved = largest > 0
                residual = torch.where(moved, G / norm / largest, 0.0).norm(dim=1)
                size = torch.where(moved, dW / largest, 1.0).norm(dim=1) * (eps * H.shape[0])
                worst = max(worst, float((residual / size).max()))
        return _finite(total), worst

    def least(self) -> float:
        """What the damped objective is with nothing removed: removals add their costs to it. 0
        without a drift."""
        if self.drift is None:
            return 0.0
        moved = self.before - self.original
        gained = sum(float((p.T * d).sum()) for p, d in zip(self.drift.pull, moved, strict=True))
        return self.drift.inherited - gained

    def condition(self) -> float | None:
        """An estimate of the largest 2-norm condition number of the damped second moments: the
        product of the norms of H and of its inverse, each by a few steps of the power method, so
        from below, by less than a factor of two in tests. None where nothing was inverted.

        It takes a few products of a matrix and a vector: nothing beside the factorisation.
        """
        found = []
        for g, inverse in enumerate(self.inverses):
            found.append((self._norm(g) + self._shift(g)) / inverse.scale * inverse.norm())
        return max(found, default=None)

    def _norm(self, g: int) -> float:
        if g not in self.norms:
            self.norms[g] = _norm(self.moments[g])
        return self.norms[g]

    def _pieces(self) -> Iterator[slice]:
        """Rows a few at a time, so that float64 temporaries stay small."""
        _, R, D = self.before.shape
        step = max(1, PIECE // D)
        for first in range(0, R, step):
            yield slice(first, first + step)

    def _change(self, weight: Tensor, bias: Tensor | None, g: int, rows: slice) -> Tensor:
        after = weight[g, rows].to(torch.float64)
        if bias is not None:
            after = torch.cat([after, bias[g, rows, None].to(torch.float64)], 1)
        return after - self.original[g, rows]

    def check_mask(self, gone: Tensor) -> None:
        """ArgumentError if something that the user's mask removes is still there."""
        if self.mask is not None and not bool(gone[:, :, : self.columns][~self.mask].all()):
            raise self.over_masked()

    def over_masked(self) -> ArgumentError:
        """The error for a mask that removes more than was asked for."""
        assert self.mask is not None
        return ArgumentError(
            f"mask: it already removes {int((~self.mask).sum())} of {self.mask.numel()} "
            "weights, more than was asked for: ask for more"
        )

    def notes(self, weight: Tensor, gone: Tensor) -> list[str]:
        """Everything that was done differently from what was asked."""
        widened = len(self.widened)
        redone = f"{widened} rows were redone in float64: float32 was too narrow"
        return [*self.said, *([redone] if widened else []), *self._lost_in_rounding(weight, gone)]

    def _lost_in_rounding(self, weight: Tensor, gone: Tensor) -> list[str]:
        C = self.columns
        lost = int(((weight == 0) & ~gone[:, :, :C] & (self.before[:, :, :C] != 0)).sum())
        kind = str(self.weight_dtype).removeprefix("torch.")
        return [f"{lost} kept weights became zero when they were rounded to {kind}"] if lost else []


def nearest_count(share: float, of: int) -> int:
    """The nearest whole number to share * of; a half rounds down, so that rounding never removes
    more than half a weight."""
    return min(of, max(0, math.ceil(share * of - 0.5)))


def scaled_(x: Tensor, exponent: int) -> Tensor:
    """x times a power of two, in place, in two steps that both fit into x's type."""
    half = exponent // 2
    return x.mul_(math.ldexp(1.0, half)).mul_(math.ldexp(1.0, exponent - half))


def in_errors(cost: float, exponent: int) -> float:
    """A cost of weights that a power of two was taken out of, in tr(dW H dW^T); infinite where that
    is beyond float64."""
    try:
        return math.ldexp(math.ldexp(cost, exponent), exponent)
    except OverflowError:
        return math.inf


def _error(dW: Tensor, H: Tensor) -> tuple[float, Tensor]:
    """tr(dW H dW^T) in float64, and dW H (R, D)."""
    G = dW @ H
    return float(torch.linalg.vecdot(G, dW).sum()), G


def _finite(total: float) -> float:
    """``total``, never below zero; NonFiniteError where it is beyond float64."""
    if not math.isfinite(total):
        raise NonFiniteError(
            "weight: tr(W H W^T) is beyond float64; scale the weight or the hessian down"
        )
    return max(0.0, total)


def _norm(H: Tensor) -> float:
    """The spectral norm of a second moment, from below, low by a fifth at most in tests."""
    scale = float(H.diagonal().max())
    if scale == 0:
        return 0.0
    v = (H.diagonal() / scale).sqrt()
    norm = 0.0
    for _ in range(_NORM_STEPS):
        v = H @ (v / v.norm()) / scale
        norm = float(v.norm())
    return norm * scale


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
