"""Whether a network that was written is, read back, the one that was in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import CheckpointError
from lobs_native.huggingface.library import some_of
from lobs_native.layers import stored_weights

__all__ = ["check_zeros", "compare", "digests"]


def digests(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, str]:
    """For every tensor, a digest of its shape, dtype and bytes, after rounding to its ``stored``
    dtype."""
    digests, tied = {}, dict[Any, str]()
    for name, value in model.state_dict().items():
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype, stored.get(name))
        if value.data_ptr() and same in tied:  # an embedding and an output layer, as a rule
            digests[name] = tied[same]
            continue
        kept = value.detach().cpu()
        if stored.get(name) not in (None, value.dtype):
            kept = kept.to(stored[name]).to(value.dtype)
        flat = kept.contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(flat.numpy().data).hexdigest()
        digests[name] = tied[same] = f"{tuple(value.shape)} {value.dtype} {digest}"
    return digests


def compare(expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Refuse a network read back whose tensors are not the expected ones."""
    if list(expected) != list(actual):
        different = sorted(set(expected) ^ set(actual)) or ["another order"]
        raise CheckpointError(f"MODEL: read back, the written weights differ: {some_of(different)}")
    for name, digest in expected.items():
        if digest != actual[name]:
            raise CheckpointError(f"MODEL: read back, {name} differs from what was written")


def check_zeros(
    model: nn.Module, masks: Mapping[str, Tensor], after: Callable[[], object] = lambda: None
) -> None:
    """Refuse a network whose weights are not zero where its masks are False. ``after`` is called
    after each layer."""
    weights = stored_weights(model)
    for name, mask in masks.items():
        weight = weights[name]
        nonzero = int(((weight != 0) & ~mask.to(weight.device)).sum())
        if nonzero:
            raise CheckpointError(
                f"MODEL: layer {name!r} would be written with {nonzero} weights that were removed"
            )
        after()
