"""Which rows of llm-compressor's calibration batches are padding.

Its pipelines hand a batch's ``loss_mask`` to modifiers where ``use_loss_mask`` is set, but never
its ``attention_mask``. That one is taken from the data here, and used for a batch only after its
token ids have been seen to be the ones expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import LobsError

__all__ = ["Padding"]


class Padding:
    """``ids`` and ``masks`` of every batch, in the order in which the pipeline will bring them."""

    def __init__(self, ids: list[Tensor], masks: list[Tensor]) -> None:
        self.ids = ids
        self.masks = masks
        self._seen: set[int] = set()

    @classmethod
    def of(cls, loader: Iterable[Any] | None) -> Padding | None:
        """Go through the data once; None if nothing in it is padding.

        The pipeline starts its own pass right after this one, so with the state of torch's random
        numbers put back, a sampler that shuffles gives the same order to both.
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
        """A forward pre-hook, with keyword arguments, for the layer that embeds the token ids;
        ``number()`` is the running batch's."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(iter((*args, *kwargs.values())), None)
            batch = number()
            if not isinstance(given, Tensor) or not 0 <= batch < len(self.ids):
                return
            if not torch.equal(given.cpu(), self.ids[batch]):
                raise LobsError(
                    f"dataset: batch {batch} came with other token ids than before, so its "
                    "attention_mask is not known and padding would be counted; pass "
                    "shuffle_calibration_samples=False to oneshot, a data loader that always gives "
                    "the same order, or a loss_mask column with use_loss_mask=True"
                )
            self._seen.add(batch)

        return hook

    def mask(self, batch: int) -> Tensor | None:
        """(B, T) bool, True = a token; None if it is not known."""
        return self.masks[batch] if batch in self._seen else None
