"""The padding in llm-compressor's calibration batches.

Its pipelines pass a batch's ``loss_mask`` to modifiers if ``use_loss_mask`` is set, but not its
``attention_mask``. That is read from the data here, and used for a batch only once its token ids
turn out to be the expected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import LobsError

__all__ = ["Padding"]


class Padding:
    """The token ids and masks of all batches, in the order of the pipeline."""

    def __init__(self, ids: list[Tensor], masks: list[Tensor]) -> None:
        self.ids = ids
        self.masks = masks
        self._seen: set[int] = set()

    @classmethod
    def of(cls, loader: Iterable[Any] | None) -> Padding | None:
        """Read the data once; None if it contains no padding.

        The pipeline's own pass starts right after this one. Since torch's random state is restored,
        a shuffling sampler yields the same order in both passes.
        """
        ids, masks = [], []
        with torch.random.fork_rng(devices=[]):
            for batch in loader or ():
                if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask"} <= set(
                    batch
                ):
                    return None
                ids.append(torch.as_tensor(batch["input_ids"]).cpu())
                masks.append(torch.as_tensor(batch["attention_mask"]).cpu() != 0)
        return None if all(bool(mask.all()) for mask in masks) else cls(ids, masks)

    def watching(self, number: Callable[[], int]) -> Callable[..., None]:
        """A forward pre-hook (with keyword arguments) for the layer that embeds the token ids.
        ``number()`` returns the number of the current batch."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = next(iter((*args, *kwargs.values())), None)
            batch = number()
            if not isinstance(ids, Tensor) or not 0 <= batch < len(self.ids):
                return
            if not torch.equal(ids.cpu(), self.ids[batch]):
                raise LobsError(
                    f"dataset: batch {batch} has other token ids than in the first pass, so its "
                    "attention_mask is unknown and padding would be counted; pass "
                    "shuffle_calibration_samples=False to oneshot, a data loader with a fixed "
                    "order, or a loss_mask column with use_loss_mask=True"
                )
            self._seen.add(batch)

        return hook

    def mask(self, batch: int) -> Tensor | None:
        """(B, T) bool, True = a token; None if unknown."""
        return self.masks[batch] if batch in self._seen else None
