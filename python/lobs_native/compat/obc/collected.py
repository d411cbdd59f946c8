"""A layer and the second moment of its inputs, in the layout of OBC's ``TrueOBS``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.compat.obc.problem import layout_of
from lobs_native.errors import LobsError, ShapeError
from lobs_native.layers.conv import Conv
from lobs_native.layers.linear import Linear
from lobs_native.solvers.hessian import Hessian

__all__ = ["Collected"]


class Collected:
    """A layer and the second moment of its inputs; the attributes are described in ``TrueOBS``."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._layout = layout_of(layer)
        weight = self._layout.weight()  # (G, R, C)
        self.dev = weight.device
        self._groups, R, self.columns = weight.shape
        self.rows = self._groups * R
        # OBC orders columns by input channel, then kernel position; the layout by kernel position,
        # then input channel. Column c of OBC is column _to_layout[c] of the layout, and the other
        # way round.
        places = torch.arange(self.columns, device=self.dev)
        channels = self._layout.neighbours
        self._to_layout = places.reshape(-1, channels).T.reshape(-1)
        self._to_original = places.reshape(channels, -1).T.reshape(-1)
        self._H: Tensor | None = checks.zeros(self._shape_of_H(), torch.float64, self.dev, "layer")
        self.nsamples = 0
        self._pending: list[Hessian] = []  # inputs that are not in H yet
        self._pending_samples = 0
        self._assigned = False  # whether the caller has set H

    def _shape_of_H(self) -> tuple[int, ...]:
        shape = (self.columns, self.columns)
        return shape if self._groups == 1 else (self._groups, *shape)

    def add_batch(self, inp: Any, out: Any = None) -> None:
        """Add a batch of the layer's inputs.

        Parameters
        ----------
        inp : (B, ..., C) for a Linear, (B, C_in, ...) for a convolution; any float dtype
            On the layer's device. Not modified.
        out : ignored

        Raises
        ------
        ShapeError, DtypeError
            The input does not fit.
        NonFiniteError
            The input has a NaN or an infinity; nothing was added.
        """
        self._check_not_freed()
        x = checks.tensor(inp, "inp")
        checks.same_device(x, "inp", self._layout.weight(), "the layer")
        if isinstance(self._layout, Linear) and (x.ndim < 2 or x.shape[-1] != self.columns):
            raise ShapeError(f"inp: {tuple(x.shape)}, expected (B, ..., {self.columns})")
        checks.check_finite(x, "inp")
        convolution = isinstance(self._layout, Conv)
        batched = not convolution or x.ndim == len(self._layout.shape)
        samples = x.shape[0] if batched else 1
        if not self._pending:
            self._pending = [Hessian(self.columns, device=self.dev) for _ in range(self._groups)]
        if x.numel():
            for g, columns in self._layout.columns(x):
                self._pending[g].update(columns)
        self.nsamples += samples
        self._pending_samples += samples

    @property
    def H(self) -> Tensor | None:
        """See ``TrueOBS``; None after ``free``."""
        if self._H is not None and self._pending:
            before = self.nsamples - self._pending_samples
            self._H *= before / max(1, self.nsamples)
            groups = self._H.view(-1, *self._H.shape[-2:])
            for H, pending in zip(groups, self._pending, strict=True):
                if pending.rows:
                    total = pending.matrix().mul_(pending.rows * 2 / self.nsamples)
                    H += total[self._to_layout][:, self._to_layout]
            self._pending, self._pending_samples = [], 0
        return self._H

    @H.setter
    def H(self, value: Any) -> None:
        shape = self._shape_of_H()
        H = checks.tensor(value, "H")
        if H.shape != shape or H.device != self.dev:
            raise ShapeError(f"H: {tuple(H.shape)} on {H.device}, expected {shape} on {self.dev}")
        self._pending, self._pending_samples = [], 0
        self._H = H.to(torch.float64)
        self._assigned = True

    def _check_not_freed(self) -> None:
        if self._H is None:
            raise LobsError("H: free() was called; make a new TrueOBS for this layer")

    def _existing_H(self) -> Tensor:
        """``H``; LobsError after ``free``, or before any inputs."""
        self._check_not_freed()
        H = self.H
        assert H is not None
        if self.nsamples == 0 and not self._assigned and not bool(H.any()):
            raise LobsError("H: it has seen no inputs; call add_batch first")
        return H
