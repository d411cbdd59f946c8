"""Batches that nothing is calibrated on: what was fitted to the others is measured on them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.session import Source
from lobs_native.errors import ArgumentError
from lobs_native.layers import Layer

__all__ = ["HeldBack", "divided", "in_between"]


def divided(batches: Sequence[Any], share: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """The batches to calibrate on, and those held back: ``share`` of them, evenly spaced, one at
    least. With a share, all are kept in memory, since they may come in another order each time.

    Raises ArgumentError if none would be left.
    """
    if not share:
        return batches, ()
    every = list(batches)
    count = max(1, round(share * len(every)))
    if count >= len(every):
        raise ArgumentError(
            f"held_back: {share:g} of {len(every)} batches leaves none to calibrate on; pass more, "
            "or smaller, batches"
        )
    chosen = in_between(count, len(every))
    return (
        [batch for i, batch in enumerate(every) if i not in chosen],
        [every[i] for i in sorted(chosen)],
    )


def in_between(count: int, total: int) -> set[int]:
    """``count`` of ``total`` numbers from 0, evenly spaced, with as many before the first as after
    the last."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}


@dataclass(frozen=True)
class HeldBack:
    """A source with the batches that are held back in place of the others."""

    source: Source
    held_back: Sequence[Any]

    @property
    def model(self) -> nn.Module:
        """What is run."""
        return self.source.model

    @property
    def batches(self) -> Sequence[Any]:
        """Those held back."""
        return self.held_back

    @property
    def ranks(self) -> Ranks:
        """The source's."""
        return self.source.ranks

    def each(
        self, label: str, start: int = 0, among: Container[int] | None = None
    ) -> Iterator[Any]:
        """Those held back; ``start`` is 0, since such passes are short and not saved."""
        return self.source.each_held_back(label, among)

    def each_held_back(self, label: str, among: Container[int] | None = None) -> Iterator[Any]:
        """The same."""
        return self.source.each_held_back(label, among)

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run the source on a batch."""
        return self.source.call(model, batch)

    def call_original(self, batch: Any) -> Any:
        """Run the source, as it was before pruning, on a batch."""
        return self.source.call_original(batch)

    def mask(self, batch: Any) -> Tensor | None:
        """The source's mask."""
        return self.source.mask(batch)

    @property
    def told_by(self) -> str:
        """The kind of mask."""
        return self.source.told_by

    def tokens(self, layer: Layer) -> Tensor | None:
        """The source's rows of tokens."""
        return self.source.tokens(layer)

    def token_weights(self, layers: Sequence[Layer], call: int) -> None:
        """None: their rows count the same."""
