"""Padding as torch's own attention is told of it: the key padding masks of transformer layers and
of nn.MultiheadAttention, observed where these modules are called.

A model often makes the mask itself, from lengths for example, so that its batches do not name it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import DtypeError
from lobs_native.layers import Attention, Layer

__all__ = ["Padding", "attended", "tokens_of"]


def tokens_of(padding: Any) -> Tensor | None:
    """A key padding mask (True, or -inf, at padding) as True at tokens; None if nothing is padding
    or it is no such mask."""
    if not isinstance(padding, Tensor) or padding.is_nested:
        return None
    tokens = padding > -torch.inf if padding.is_floating_point() else padding == 0
    return None if bool(tokens.all()) else tokens


def attended(attention_mask: Any) -> Tensor | None:
    """An attention mask (B, T) of zeros and ones as bool; None if it is another kind of mask, or
    has no zeros."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    mask = attention_mask != 0
    if bool(mask.all()) or bool((mask & (attention_mask != 1)).any()):
        return None
    return mask


class Padding:
    """While active, knows for every linear layer of torch's transformer layers, and for every
    projection of attention, which rows of the call in progress are tokens.

    Raises DtypeError if attention is called on a nested tensor, which only its fused form takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rows: dict[nn.Module, Tensor | None] = {}  # shaped as the rows of a linear layer
        self._queries: dict[nn.Module, Tensor | None] = {}  # (L * B,), of attention's queries
        self._keys: dict[nn.Module, Tensor | None] = {}  # (S * B,)
        self._ahead: dict[nn.Module, Tensor | None] = {}  # queries of an attention called next
        self._handles: list[Any] = []

    def __enter__(self) -> Padding:
        for name, module in self.model.named_modules():
            enter: Callable[[Any, Mapping[str, Any]], None]
            if isinstance(module, nn.TransformerEncoderLayer):
                enter = self._encoder
            elif isinstance(module, nn.TransformerDecoderLayer):
                enter = self._decoder
            elif isinstance(module, nn.MultiheadAttention):
                enter = self._attention
            else:
                continue
            hook = _entering(name, enter, inspect.signature(type(module).forward))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for known in (self._rows, self._queries, self._keys, self._ahead):
            known.clear()
        self._handles.clear()

    def tokens(self, layer: Layer) -> Tensor | None:
        """Bool, True at tokens, shaped as the leading dimensions of the layer's input; None if all
        are, or nothing is known."""
        if isinstance(layer, Attention):
            return (self._keys if layer.reads_keys else self._queries).get(layer.caller)
        return self._rows.get(layer.caller)

    def _encoder(self, module: nn.TransformerEncoderLayer, given: Mapping[str, Any]) -> None:
        self._feed_forward(module, given.get("src_key_padding_mask"))

    def _decoder(self, module: nn.TransformerDecoderLayer, given: Mapping[str, Any]) -> None:
        padding = given.get("tgt_key_padding_mask")
        self._feed_forward(module, padding)
        self._ahead[module.multihead_attn] = _flat(tokens_of(padding))

    def _feed_forward(self, module: Any, padding: Any) -> None:
        tokens = tokens_of(padding)
        if tokens is not None and tokens.ndim == 2 and not module.self_attn.batch_first:
            tokens = tokens.T
        self._rows[module.linear1] = self._rows[module.linear2] = tokens

    def _attention(self, module: nn.MultiheadAttention, given: Mapping[str, Any]) -> None:
        keys = _flat(tokens_of(given.get("key_padding_mask")))
        self._keys[module] = keys
        itself = given.get("query") is given.get("key")
        self._queries[module] = keys if itself else self._ahead.pop(module, None)


def _flat(tokens: Tensor | None) -> Tensor | None:
    """(B, T) in the order of attention's rows, which is that of (T, B)."""
    return tokens if tokens is None else tokens.T.reshape(-1)


def _entering(
    name: str, enter: Callable[[Any, Mapping[str, Any]], None], signature: inspect.Signature
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        if any(isinstance(x, Tensor) and x.is_nested for x in given.values()):
            raise DtypeError(
                f"calibration: {type(module).__name__} {name!r} is called on a nested tensor, "
                "which only fused attention takes; pass padded tensors and a key padding mask"
            )
        enter(module, given)

    return hook
