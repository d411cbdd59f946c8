"""How far an output is from the original network's, piece by piece, with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PIECE", "Distance"]

PIECE = 1 << 18  # entries that are compared at a time


@dataclass
class Distance:
    """A sum over the rows that count: of Kullback-Leibler divergences, in nats, if rows are
    ``logits``; of squared differences otherwise.

    ``size`` is what it is relative to: the number of the rows, or the sum of the original squares.
    Rows are converted to ``least`` if they are narrower.
    """

    logits: bool
    least: torch.dtype = torch.float32
    difference: float = 0.0
    size: float = 0.0
    entries: int = 0  # that were compared

    def add(
        self,
        x: Tensor,
        original: Iterable[Tensor],
        counts: Tensor | None,
        width: int,
        gradient: Tensor | None = None,
    ) -> None:
        """Add the rows of an output.

        Parameters
        ----------
        x : (n * width,) floating-point
            The output, flat.
        original : iterable of (m * width,)
            Pieces of the original output, in order.
        counts : (n,) bool, optional
            The rows that count; None for all.
        width : int
            Entries of a row.
        gradient : like x, optional
            Overwritten by the gradient of the sum with respect to ``x``: ``softmax(x) -
            softmax(original)``, or twice the difference; 0 for rows that do not count.
        """
        wide = torch.promote_types(x.dtype, self.least)
        begin = 0
        for piece in original:
            end = begin + piece.numel()
            a, b = x[begin:end].view(-1, width), piece.view(-1, width)
            if counts is not None:
                counted = counts[begin // width : end // width]
                a, b = a[counted], b[counted]
            slope = self._rows(a.to(wide), b.to(wide), sloped=gradient is not None)
            if gradient is not None and slope is not None:
                out = gradient[begin:end].view(-1, width)
                if counts is None:
                    out.copy_(slope)
                else:
                    out.zero_()
                    out[counted] = slope.to(out.dtype)
            begin = end

    def _rows(self, a: Tensor, b: Tensor, *, sloped: bool) -> Tensor | None:
        """Add rows (n, width) of an output and of the original one. Returns the gradient for the
        former if ``sloped``."""
        self.entries += a.numel()
        if self.logits:
            q, p = a.log_softmax(1), b.log_softmax(1)
            gap = p - q
            p = p.exp_()
            each = gap.mul_(p)
            found = float(each.sum(dtype=torch.float64))
            if math.isnan(found):  # an entry of probability 0 adds nothing: its logit was -inf
                found = float(each.masked_fill_(p == 0, 0).sum(dtype=torch.float64))
            self.difference += found
            self.size += a.shape[0]
            return q.exp_().sub_(p) if sloped else None
        gap = a - b
        self.difference += float(gap.square().sum(dtype=torch.float64))
        self.size += float(b.square().sum(dtype=torch.float64))
        return gap.mul_(2) if sloped else None

    @property
    def relative(self) -> float:
        """The mean divergence of a row; or the root of the squared difference over the squared
        size."""
        mean = self.difference / (self.size or 1.0)
        return mean if self.logits else mean**0.5

    @property
    def scale(self) -> float:
        """A factor that makes the difference of several networks alike: what it is for each entry,
        in units of the mean square of the original entries. Divergences have no unit."""
        return 1.0 if self.logits else self.entries / (self.size or 1.0)

    def differentiable(
        self, x: Tensor, original: Iterable[Tensor], counts: Tensor | None, width: int
    ) -> Tensor:
        """The sum that :meth:`add` adds, as a tensor of no dimensions with a gradient."""
        out: Tensor = _Sum.apply(x, self, original, counts, width)  # type: ignore[no-untyped-call]
        return out


class _Sum(torch.autograd.Function):
    """The difference of an output of any shape, whose gradient is made along with the value: one
    tensor of the output's size, where autograd would keep several."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        distance: Distance,
        original: Iterable[Tensor],
        counts: Tensor | None,
        width: int,
    ) -> Tensor:
        before = distance.difference
        gradient = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        distance.add(x.detach().reshape(-1), original, counts, width, gradient)
        ctx.gradient = gradient.view(x.shape)
        return torch.tensor(distance.difference - before, dtype=torch.float64, device=x.device)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.gradient.mul_(outer.to(ctx.gradient.dtype)), None, None, None, None
