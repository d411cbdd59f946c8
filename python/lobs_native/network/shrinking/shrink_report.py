"""What :func:`lobs_native.shrink` returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lobs_native.network.shrinking.comparison import ShrinkTimes
from lobs_native.report.records import plain
from lobs_native.report.report import Report

__all__ = ["ShrinkReport", "Shrunk"]


@dataclass(frozen=True)
class Shrunk:
    """What was removed of one family of units."""

    # "neurons", "heads" (groups that share keys and values), "channels", "experts" or "blocks"
    kind: str
    # The layers that read them, and were repaired; of experts none; of blocks those that were
    # repaired, in the block before each gap.
    readers: tuple[str, ...]
    # The layers that lost outputs, the module that lost experts, or the list that lost blocks.
    producers: tuple[str, ...]
    units: int  # before
    kept: tuple[int, ...]  # indices of those that stay, rising
    # Of experts: ||change||^2 / ||what they add up to||^2. Of blocks, before the repair: the same
    # of the network's output, or, of logits over its vocabulary, the mean Kullback-Leibler
    # divergence; of several lists, what each added to it. On a sample of the calibration data.
    error: float | None = None


@dataclass(frozen=True)
class ShrinkReport:
    """What :func:`shrink` did."""

    layers: tuple[Shrunk, ...]
    parameters: tuple[int, int]  # of the whole model, before and after
    bytes: tuple[int, int]  # of its parameters and buffers
    # Of the layers concerned, before and after: for one row of inputs of the layer that has fewest.
    multiplications: tuple[int, int]
    # Peak bytes of a forward pass of the first batch above what was in use before it (parameters
    # and buffers are in ``bytes``), before and after. None: the system does not say.
    memory: tuple[int, int] | None
    # ||output - original|| / ||original|| on some 512 rows of output: of the calibration data, and
    # of the batches held back. None: no such batches, or no tensors in the output.
    change: float | None
    held_back_change: float | None
    times: ShrinkTimes | None  # None: pairs=0, or the model cannot be copied
    batch_norm: int  # layers of batch normalisation whose statistics were re-estimated
    configured: bool  # whether the model's own class, with its configuration, has the new sizes
    notes: tuple[str, ...]
    # Errors of the repaired layers, masks of their weights; None if nothing was repaired.
    pruning: Report | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks as plain JSON values."""
        fields = {name: value for name, value in vars(self).items() if name != "pruning"}
        fields["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        fields["times"] = None if self.times is None else dataclasses.asdict(self.times)
        fields = plain(fields)
        return {**fields, "pruning": None if self.pruning is None else self.pruning.to_dict()}

    def __str__(self) -> str:
        (p, q), (a, b), (m, n) = self.parameters, self.bytes, self.multiplications
        lines = [
            f"families of units that shrank: {len(self.layers)}; "
            f"{p:,} -> {q:,} parameters ({q / p:.1%}), {a / 1e6:,.1f} -> {b / 1e6:,.1f} MB",
        ]
        if m:  # experts alone save none
            lines.append(
                f"multiplications for a row in the layers concerned: {m:,} -> {n:,} ({n / m:.1%})"
            )
        if self.memory is not None:
            took, takes = (x / 1e6 for x in self.memory)
            lines.append(
                f"forward pass of the first batch: {took:,.1f} -> {takes:,.1f} MB at its peak, "
                "besides parameters and buffers"
            )
        if (t := self.times) is not None:
            (slow, fast), (low, high) = t.seconds, t.interval
            lines.append(
                f"forward pass of the first batch: {slow:.4g} -> {fast:.4g} s, {t.ratio:.2f} times "
                f"as fast [{low:.2f}, {high:.2f}] (medians of {t.pairs} pairs, 95 % interval; "
                f"{t.machine['threads']} threads)"
            )
        if self.change is not None:
            more = self.held_back_change
            lines.append(
                f"the output moved by {self.change:.4g} of its size on calibration data"
                + ("" if more is None else f", by {more:.4g} on batches held back")
            )
        return "\n".join(lines)
