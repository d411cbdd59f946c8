"""One layer as a quadratic problem: its weights, second moments and inverses.

Shapes: G groups (grouped convolutions; 1 otherwise), R outputs, C inputs, and D = C, or C + 1 with
a bias, whose column of ones is the last. ``repair`` finds the best weights for a mask,
``measurement`` the error of given weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NonFiniteError, ShapeError
from lobs_native.solvers.drift import Drift, trusted_share
from lobs_native.solvers.factor import factor
from lobs_native.solvers.inversion import Inverse, invert
from lobs_native.solvers.low_rank import few_samples
from lobs_native.solvers.workspace import Workspace

__all__ = ["Problem", "in_errors", "nearest_count", "scaled_", "spectral_norm"]

_FLOAT64_BELOW = 1e-4  # damping under which float32 kernels lose too much
_WIDE = 512  # columns from which on a factor in float32 saves more than a millisecond
_CONDITION = 1.5e5  # up to which it has three digits
_FEW = 0.5  # share of a correction below which a note says so
_NORM_STEPS = 12  # of the power iteration; second moments have a dominant direction
_NORM_GAIN = 1e-3  # of a step, below which it ends
_SMALL = 32  # columns up to which the eigenvalues of a group cost less than its power iteration


@dataclass
class Problem:
    """A layer while it is being pruned; its tensors are never written to."""

    before: Tensor  # (G, R, D) float32, or float64 where weight or bias is: what is pruned
    original: Tensor  # (G, R, D): before, unless that makes up for a drift
    moments: Sequence[Tensor]  # G times (D, D) float64
    inverses: list[Inverse]  # G of them, or none for methods that need none
    dead: list[Tensor]  # G times (C,) bool: inputs that were zero in every sample
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    prune_bias: bool
    mask: Tensor | None  # (G, R, C) bool, True = may stay
    precise: bool  # kernels run in float64
    workspace: Workspace
    drift: Drift | None = None  # that of ``desired`` which is made up for
    desired: Drift | None = None  # by which errors are measured
    trusted: float = 1.0  # the share of ``desired`` in ``drift``
    samples: Sequence[float] = ()  # of each second moment, as far as known
    # By group and what was removed from all its rows: with how many times the damping the kept
    # weights were solved for. A search for an error tries several removals and returns to one.
    _factors: dict[tuple[int, bytes], float] = field(default_factory=dict, repr=False)
    _norms: dict[int, float] = field(default_factory=dict, repr=False)  # see norm()

    @classmethod
    def of(
        cls,
        W: Tensor,
        bias: Tensor | None,
        moments: Sequence[Tensor],
        *,
        damping: float,
        inverted: bool,
        factor_alone: bool = False,
        narrow: bool = False,
        samples: Sequence[float] = (),
        prune_bias: bool,
        mask: Tensor | None,
        workspace: Workspace,
        drift: Drift | None = None,
    ) -> Problem:
        """Check that the parts fit together, and invert the second moments where ``inverted`` or a
        drift requires it. ``factor_alone``: a factor will do, by a low rank if the second moments
        have few ``samples``, as far as known; ``narrow``: and in float32 where that suffices."""
        _check_layer(W, moments, bias, mask, prune_bias)
        double = torch.float64 in (W.dtype, None if bias is None else bias.dtype)
        before = W.to(torch.float64 if double else torch.float32)
        if bias is not None:
            before = torch.cat([before, bias[:, :, None].to(before.dtype)], 2)
        original = before
        inverses: list[Inverse] = []
        norms: dict[int, float] = {}
        if inverted or drift is not None:
            name = "hessian" if len(moments) == 1 else "hessian of group {}"
            rough = factor_alone and not double and damping >= _FLOAT64_BELOW
            for g, H in enumerate(moments):
                inverse: Inverse | None = None
                dtype = torch.float64
                if rough and len(H) >= _WIDE:
                    inverse = few_samples(H, damping, samples[g]) if samples else None
                    if inverse is None and narrow and drift is None:
                        norms[g] = spectral_norm(H)
                        if norms[g] <= _CONDITION * damping * float(H.diagonal().mean()):
                            dtype = torch.float32
                if inverse is None and factor_alone:
                    inverse = factor(H, damping, name.format(g), dtype=dtype)
                inverses.append(inverse or invert(H, damping, name.format(g)))
        desired, trusted = drift, 1.0
        if drift is not None:
            corrections = [
                inverse.times(pull).div_(inverse.scale)
                for inverse, pull in zip(inverses, drift.pull, strict=True)
            ]
            trusted = trusted_share(drift, corrections, inverses, moments)
            drift = drift.shrunk(trusted)
            before = original.clone()
            for w, correction in zip(before, corrections, strict=True):
                w += correction.mul_(trusted).T
            checks.check_finite(before, "weight, corrected for what came before it")
        little = any(i.damping < _FLOAT64_BELOW for i in inverses)
        problem = cls(
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
            workspace=workspace,
            drift=drift,
            desired=desired,
            trusted=trusted,
            samples=samples,
            _norms=norms,
        )
        if trusted < _FEW:
            workspace.note(
                f"{trusted:.0%} of the correction was made: the rest would follow the noise of few "
                "rows; more calibration data would help"
            )
        if problem.damping_raised:
            workspace.note(
                f"Cholesky failed with damping {damping:g}; {problem.damping:g} was used"
            )
        if problem.precise and W.dtype != torch.float64 and inverses:
            why = f"the damping is below {_FLOAT64_BELOW:g}" if little else "the bias is float64"
            workspace.note(f"computed in float64 because {why}")
        return problem

    # ---- sizes and types -------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """D: columns of the second moment, the column of ones included."""
        return self.before.shape[2]

    @property
    def in_features(self) -> int:
        """C: inputs, without the column of ones."""
        return self.order - (self.bias_dtype is not None)

    @property
    def candidates(self) -> int:
        """Weights of a row that may be removed."""
        return self.order if self.prune_bias else self.in_features

    @property
    def total(self) -> int:
        """Weights of the layer that may be removed."""
        return self.before.shape[0] * self.before.shape[1] * self.candidates

    @property
    def bias_stays(self) -> bool:
        """Whether there is a bias that may not be removed."""
        return self.bias_dtype is not None and not self.prune_bias

    @property
    def dtype(self) -> torch.dtype:
        """What the kernels compute in."""
        return torch.float64 if self.precise else torch.float32

    # ---- the mask --------------------------------------------------------------------------------

    def masked(self) -> Tensor:
        """Bool (G, R, D): the weights that the user's mask removes."""
        removed = torch.zeros_like(self.before, dtype=torch.bool)
        if self.mask is not None:
            removed[:, :, : self.in_features] = ~self.mask
        return removed

    def check_mask(self, removed: Tensor) -> None:
        """Raise ArgumentError if something that the user's mask removes is still there."""
        if self.mask is not None and not bool(removed[:, :, : self.in_features][~self.mask].all()):
            raise self.over_masked()

    def over_masked(self) -> ArgumentError:
        """The error for a mask that removes more than the target."""
        assert self.mask is not None
        return ArgumentError(
            f"mask: it already removes {int((~self.mask).sum())} of {self.mask.numel()} "
            "weights, more than the target: raise the target"
        )

    # ---- second moments --------------------------------------------------------------------------

    @property
    def damping(self) -> float:
        """The largest fraction that was used; 0 where nothing was inverted."""
        return max((i.damping for i in self.inverses), default=0.0)

    @property
    def damping_raised(self) -> bool:
        """Whether some group needed more damping than requested."""
        return any(i.raised for i in self.inverses)

    def shift(self, g: int) -> float:
        """What damping adds to the diagonal of group g's second moment; 0 where nothing was
        inverted."""
        mean = float(self.moments[g].diagonal().mean())
        if not self.inverses:
            return 0.0
        return self.inverses[g].damping * mean if mean > 0 else 1.0

    def rows(self, g: int) -> float:
        """How many samples group g's second moment is of, or tells as much as; infinite if that is
        not known."""
        known = self.samples[g] if self.samples else math.inf
        return known if self.desired is None else min(known, self.desired.rows)

    def solved_with(self, g: int, removed: Tensor, factor: float) -> None:
        """Note with how many times the damping the kept weights of group g were solved for, where
        all its rows lose ``removed`` (D,)."""
        self._factors[g, _bits(removed)] = factor

    def repair_factor(self, g: int, removed: Tensor) -> float:
        """How many times the damping the kept weights of group g were solved for with, where
        ``removed`` (R, D) is; 1 if it was not more."""
        factor = self._factors.get((g, _bits(removed[0])), 1.0) if self._factors else 1.0
        return factor if factor == 1.0 or bool((removed == removed[0]).all()) else 1.0

    def damped(self, g: int, rows: slice = slice(None)) -> Tensor:
        """(D, D) float64, or some rows of it: the second moment of group g over its inverse's
        scale, with damping. Its inverse is ``inverses[g].A``."""
        H = self.moments[g][rows].clone()
        H.diagonal(rows.start or 0).add_(self.shift(g))
        return H.div_(self.inverses[g].scale)

    def norm(self, g: int) -> float:
        """The spectral norm of group g's second moment; see :func:`spectral_norm`."""
        if self.extremes is not None:
            return self.extremes[g][1]
        if g not in self._norms:
            self._norms[g] = spectral_norm(self.moments[g])
        return self._norms[g]

    @cached_property
    def extremes(self) -> list[tuple[float, float]] | None:
        """The least and the largest eigenvalue of every group's second moment, where there are many
        small ones (depthwise convolutions): all together, since each costs next to nothing."""
        if len(self.moments) == 1 or self.order > _SMALL:
            return None
        values = torch.linalg.eigvalsh(torch.stack(list(self.moments)))
        return [(max(0.0, low), high) for low, high in values[:, [0, -1]].tolist()]

    # ---- the weights in the kernels' units -------------------------------------------------------

    @cached_property
    def exponent(self) -> int:
        """A power of two that brings the weights near one, so that their squares keep in range."""
        largest = max(float(self.before.max()), -float(self.before.min()))
        return max(-1000, min(1000, math.frexp(largest)[1]))

    def working(
        self, g: int, dtype: torch.dtype | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """(R, D) contiguous copy of group g's weights (or some rows of them), near one in size,
        zero on dead inputs."""
        before = self.before[g] if rows is None else self.before[g][rows.to(self.before.device)]
        w = scaled_(before.to(dtype or self.dtype, copy=True), -self.exponent)
        if bool(self.dead[g].any()):
            w[:, : len(self.dead[g])][:, self.dead[g]] = 0.0
        return w.contiguous()

    def restored(self, after: Tensor, removed: Tensor, *, zeroed: bool = False) -> Tensor:
        """Working weights (G, R, D) after a removal, brought back to the original unit in place.
        ``zeroed``: they are zero where they are removed."""
        out = scaled_(after, self.exponent)
        for g, dead in enumerate(self.dead):  # a kept weight of a dead input keeps its value
            if bool(dead.any()):
                columns = dead.nonzero()[:, 0]
                kept = self.before[g][:, columns].to(out.dtype)
                out[g][:, columns] = kept.masked_fill_(removed[g][:, columns], 0.0)
        return out if zeroed else out.masked_fill_(removed, 0.0)

    def rounded(self, after: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (G, R, C) and biases (G, R) in their own types."""
        C = self.in_features
        weight = after[:, :, :C].to(self.weight_dtype, copy=True).contiguous()
        bias = None
        if self.bias_dtype is not None:
            bias = after[:, :, C].to(self.bias_dtype, copy=True).contiguous()
        if not all(checks.is_finite(x) for x in (weight, bias) if x is not None):
            kind = str(self.weight_dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"weight: a kept weight outgrew {kind} when it was compensated; convert the layer "
                "to a wider type, raise the damping, or remove less"
            )
        return weight, bias


def _bits(removed: Tensor) -> bytes:
    return bytes(removed.tolist())


def nearest_count(share: float, of: int) -> int:
    """The nearest whole number to share * of; a half rounds down, so that rounding never removes
    more than half a weight."""
    return min(of, max(0, math.ceil(share * of - 0.5)))


def scaled_(x: Tensor, exponent: int) -> Tensor:
    """x times a power of two, in place; a large one in two steps that both fit into x's type."""
    if abs(exponent) <= 100:
        return x if exponent == 0 else x.mul_(math.ldexp(1.0, exponent))
    half = exponent // 2
    return x.mul_(math.ldexp(1.0, half)).mul_(math.ldexp(1.0, exponent - half))


def in_errors(cost: float, exponent: int) -> float:
    """A cost of weights that a power of two was taken out of, in tr(dW H dW^T); infinite where that
    is beyond float64."""
    try:
        return math.ldexp(math.ldexp(cost, exponent), exponent)
    except OverflowError:
        return math.inf


def spectral_norm(H: Tensor) -> float:
    """The spectral norm of a second moment, from below, low by a fifth at most in tests."""
    scale = float(H.diagonal().max())
    if scale == 0:
        return 0.0
    v = (H.diagonal() / scale).sqrt()
    norm = 0.0
    for _ in range(_NORM_STEPS):
        before = norm
        v = H @ (v / v.norm()) / scale
        norm = float(v.norm())
        if norm <= before * (1 + _NORM_GAIN):
            break
    return norm * scale


def _check_layer(
    W: Tensor, moments: Sequence[Tensor], bias: Tensor | None, mask: Tensor | None, prune_bias: bool
) -> None:
    G, R, C = W.shape
    if W.numel() == 0:
        raise ShapeError(f"weight: shape {tuple(W.shape[1:])} is empty; leave this layer out")
    checks.check_finite(W if G > 1 else W[0], "weight")
    if prune_bias and bias is None:
        raise ArgumentError("prune_bias: True without a bias; pass bias=")
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
