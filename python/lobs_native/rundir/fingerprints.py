"""Fingerprints of a model and its data, by which a resumed run recognises them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["fingerprints", "name_of"]


def fingerprints(
    model: nn.Module,
    batches: Iterable[Any],
    masks: Mapping[str, Tensor],
    read: Callable[[Tensor], object] = lambda value: None,
    original: nn.Module | None = None,
) -> dict[str, Any]:
    """sha256 of the model's parameters and buffers (even those that are not saved, because the
    output may depend on them), of the calibration data, and of masks and another original network
    if there are any; and the number of batches. ``read`` is called with each tensor of the model
    after it was read."""
    of_model = _state(model, read)
    data, count = hashlib.sha256(), 0
    for batch in batches:
        count += 1
        for path, value in _leaves("", batch):
            if isinstance(value, Tensor):
                _add(data, path, value)
            else:
                plain = isinstance(value, (bool, int, float, str))
                label = value if plain else type(value).__name__
                data.update(f"{path} {label!r}\n".encode())
    found = {"model": of_model, "calibration": data.hexdigest(), "batches": count}
    if original is not None:
        found["original"] = _state(original)
    if masks:
        of_masks = hashlib.sha256()
        for name, mask in sorted(masks.items()):
            _add(of_masks, name, mask)
        found["masks"] = of_masks.hexdigest()
    return found


def _state(model: nn.Module, read: Callable[[Tensor], object] = lambda value: None) -> str:
    """sha256 of all parameters and buffers, by all their names."""
    state = hashlib.sha256()
    parameters = model.named_parameters(remove_duplicate=False)
    for name, value in (*parameters, *model.named_buffers(remove_duplicate=False)):
        _add(state, name, value)
        read(value)
    return state.hexdigest()


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    if value.is_meta:  # it has no values
        return
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}", part)
    else:
        for i, part in enumerate(tree_leaves(value)):
            yield f"{path}.{i}", part


def name_of(function: Callable[..., Any] | None) -> str | None:
    """The qualified name of a function, to compare with the one in another process."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
