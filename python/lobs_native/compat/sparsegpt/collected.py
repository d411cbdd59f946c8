"""What the classes of SparseGPT's family have in common: a layer, the second moment of its inputs,
and the way from there to a pruned layer by the published rules."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks, ops
from lobs_native.compat.sparsegpt import sweep as host_sweep
from lobs_native.compat.sparsegpt.layout import Layout
from lobs_native.errors import ArgumentError, NonFiniteError, ShapeError

__all__ = ["Collected"]


class Collected:
    """A layer and the second moment of what it reads.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
        float32, float16, bfloat16 or float64, on any device. Its weight is replaced when it is
        pruned; nothing else is modified.

    Attributes
    ----------
    H : (C, C) float32
        ``2 / nsamples * sum(x x^T)``, as the hosts scale it. Reading it gives the tensor that is
        worked on; it may be changed or replaced. Gone after pruning; None after ``free``.
    nsamples : int
        Sequences or images seen, not tokens.
    rows, columns : int
        Of the weight as a matrix (R, C).
    layer, dev
        The layer, and its device.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layout = Layout(layer)
        self.layer = layer
        self.dev = self._layout.matrix().device
        self.rows, self.columns = self._layout.rows, self._layout.columns
        self.nsamples = 0
        # Either what the host calls H, or the lower triangle of sum(x x^T), which takes a chunk
        # without a pass over the whole matrix.
        C, kind = self.columns, torch.float32
        self._moment: Tensor | None = torch.zeros(C, C, dtype=kind, device=self.dev)
        self._is_sum = True
        self._summed = 0  # nsamples when the sum was last touched

    @property
    def H(self) -> Tensor | None:
        """See the class."""
        if not hasattr(self, "_moment"):
            raise AttributeError("H: used up by fasterprune, as in the host; collect it anew")
        if self._moment is not None and self._is_sum:
            self._moment = _mirrored_(self._moment.mul_(2 / max(1, self._summed)))
            self._is_sum = False
        return self._moment

    @H.setter
    def H(self, value: Tensor | None) -> None:
        if value is not None:
            value = checks.tensor(value, "H", ndim=2, dtypes=(torch.float32,))
            if value.shape != (self.columns, self.columns) or value.device != self.dev:
                raise ShapeError(
                    f"H: {tuple(value.shape)} on {value.device}, but the layer has {self.columns} "
                    f"inputs and is on {self.dev}"
                )
        self._moment = value
        self._is_sum = False

    @H.deleter
    def H(self) -> None:
        del self._moment

    def _taken(self) -> Tensor:
        """``H``, which must be there."""
        self._collected()
        H = self.H
        assert H is not None
        return H

    def peek(self) -> Tensor:
        """A copy of ``H``; leaves everything as it is, to the last bit."""
        held = self._collected()
        if not self._is_sum:
            return held.clone()
        return _mirrored_(held * (2 / max(1, self._summed)))

    def _collected(self) -> Tensor:
        held: Tensor | None = getattr(self, "_moment", None)
        if held is None:
            raise ArgumentError("H: used up by fasterprune or free; make a new object")
        return held

    @torch.no_grad()
    def add_batch(self, inp: Tensor, out: Any = None, blocksize: int = 1024) -> None:
        """Add a batch of the layer's inputs.

        Parameters
        ----------
        inp : (B, T, C), (T, C) or (..., C); for Conv2d (B, C_in, h, w) or (C_in, h, w)
            float16, bfloat16, float32 or float64, on the layer's device; not modified. Counts as B
            samples, or as one.
        out, blocksize
            Not used, as in the host.

        Raises
        ------
        NonFiniteError
            ``inp`` holds a NaN or an infinity; ``H`` is as it was.
        """
        held = self._collected()
        tokens = self._layout.tokens(inp.detach())
        samples = self._layout.samples(inp)
        if self._is_sum and self._summed != self.nsamples:
            self.H  # noqa: B018  (the caller has changed nsamples: H as a mean is what counts)
        if not self._is_sum:
            held = self._moment = held.contiguous()
            held.mul_(self.nsamples / 2)
            self._is_sum = True
            self._summed = self.nsamples
        ops.hessian_accumulate_(held, tokens)
        self.nsamples += samples
        self._summed = self.nsamples

    def _by_host_rules(
        self,
        choose: host_sweep.Choose | None,
        groups: tuple[int, int],
        blocksize: int,
        percdamp: float,
        *,
        step: int | None = None,
        quantizer: Any = None,
    ) -> tuple[float, float, Tensor]:
        """(seconds, the host's error, pruned weights (R, C) float32)."""
        H = self._taken()
        W = self._layout.matrix().to(torch.float32, copy=True).contiguous()
        checks.check_finite(W, "layer.weight")
        if quantizer is not None and not quantizer.ready():
            quantizer.find_params(W, weight=True)
        begun = time.time()
        U, dead = host_sweep.upper_factor(H, percdamp)
        W[:, dead] = 0.0
        if quantizer is not None:
            error = host_sweep.sweep_quantized_(
                W, U, _Rounding(quantizer), blocksize=blocksize, choose=choose, groups=groups
            )
        else:
            error = host_sweep.sweep_(
                W, U, blocksize=blocksize, choose=choose, groups=groups, step=step
            )
        return time.time() - begun, error, W

    def _finish(self, pruned: Tensor) -> None:
        """Store the new weight (R, C) in the layer's dtype; H is used up."""
        kind = self._layout.weight.dtype
        pruned = pruned.to(kind)
        if not bool(torch.isfinite(pruned).all()):
            raise NonFiniteError(
                f"layer.weight: a repaired weight outgrew {str(kind).removeprefix('torch.')}; "
                "convert the layer to a wider type, raise percdamp, or remove less"
            )
        self._layout.store(pruned)
        del self.H

    def free(self) -> None:
        """Let the second moment go."""
        self.H = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()


class _Rounding:
    """The host's quantisation of a column (R, 1): to the nearest level, within range."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, column: Tensor) -> Tensor:
        scale, zero = self.quantizer.scale, self.quantizer.zero
        level = torch.clamp((column / scale).round_().add_(zero), 0, self.quantizer.maxq)
        return scale * (level - zero)  # type: ignore[no-any-return]


def _mirrored_(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle this is, in place."""
    step = 512  # a whole transposed copy would double the peak
    for first in range(0, len(lower), step):
        rows = slice(first, first + step)
        square = lower[rows, rows].tril()
        lower[rows, rows] = square + square.tril(-1).T
        lower[rows, first + step :] = lower[first + step :, rows].T
    return lower
