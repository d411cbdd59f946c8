"""The common base of SparseGPT's classes: a layer, the second moment of its inputs, and pruning by
the published rules."""

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
    """A layer and the second moment of its inputs.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
        float32, float16, bfloat16 or float64, on any device. Pruning replaces its weight; nothing
        else is modified.

    Attributes
    ----------
    H : (C, C) float32
        ``2 / nsamples * sum(x x^T)``, scaled as in the hosts. It is the tensor in use, which may be
        changed or replaced. Deleted by pruning; None after ``free``.
    nsamples : int
        The number of sequences or images seen, not tokens.
    rows, columns : int
        The shape of the weight as a matrix (R, C).
    layer, dev
        The layer, and its device.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layout = Layout(layer)
        self.layer = layer
        self.dev = self._layout.matrix().device
        self.rows, self.columns = self._layout.rows, self._layout.columns
        self.nsamples = 0
        # Either the host's H, or the lower triangle of sum(x x^T), to which a batch can be added
        # without another pass over the whole matrix.
        C, kind = self.columns, torch.float32
        self._moment: Tensor | None = torch.zeros(C, C, dtype=kind, device=self.dev)
        self._is_sum = True
        self._summed = 0  # nsamples when the sum was last updated

    @property
    def H(self) -> Tensor | None:
        """See the class."""
        if not hasattr(self, "_moment"):
            raise AttributeError("H: consumed by fasterprune, as in the host; collect it again")
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

    def _existing_H(self) -> Tensor:
        """``H``; ArgumentError if it is gone."""
        self._existing_moment()
        H = self.H
        assert H is not None
        return H

    def peek(self) -> Tensor:
        """A copy of ``H``, without changing anything."""
        moment = self._existing_moment()
        if not self._is_sum:
            return moment.clone()
        return _mirrored_(moment * (2 / max(1, self._summed)))

    def _existing_moment(self) -> Tensor:
        moment: Tensor | None = getattr(self, "_moment", None)
        if moment is None:
            raise ArgumentError("H: consumed by fasterprune or free; make a new object")
        return moment

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
            ``inp`` has a NaN or an infinity; ``H`` is unchanged.
        """
        moment = self._existing_moment()
        tokens = self._layout.tokens(inp.detach())
        samples = self._layout.samples(inp)
        if self._is_sum and self._summed != self.nsamples:
            self.H  # noqa: B018  (the caller changed nsamples, so the mean H is what must be kept)
        if not self._is_sum:
            moment = self._moment = moment.contiguous()
            moment.mul_(self.nsamples / 2)
            self._is_sum = True
            self._summed = self.nsamples
        ops.hessian_accumulate_(moment, tokens)
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
        """Prune by the published rules: (seconds, the host's error, weights (R, C) float32)."""
        H = self._existing_H()
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
        """Store the new weight (R, C) in the layer's dtype, and delete H."""
        kind = self._layout.weight.dtype
        pruned = pruned.to(kind)
        if not bool(torch.isfinite(pruned).all()):
            raise NonFiniteError(
                f"layer.weight: a repaired weight overflowed {str(kind).removeprefix('torch.')}; "
                "convert the layer to a wider type, raise percdamp, or remove less"
            )
        self._layout.store(pruned)
        del self.H

    def free(self) -> None:
        """Release the second moment."""
        self.H = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()


class _Rounding:
    """The host's quantisation of a column (R, 1): to the nearest level in range."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, column: Tensor) -> Tensor:
        scale, zero = self.quantizer.scale, self.quantizer.zero
        level = torch.clamp((column / scale).round_().add_(zero), 0, self.quantizer.maxq)
        return scale * (level - zero)  # type: ignore[no-any-return]


def _mirrored_(lower: Tensor) -> Tensor:
    """Complete a symmetric matrix from its lower triangle, in place."""
    step = 512  # a transposed copy of the whole matrix would double the peak memory
    for first in range(0, len(lower), step):
        rows = slice(first, first + step)
        square = lower[rows, rows].tril()
        lower[rows, rows] = square + square.tril(-1).T
        lower[rows, first + step :] = lower[first + step :, rows].T
    return lower
