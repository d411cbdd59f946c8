"""The Conv1D of transformers (GPT-2): a linear layer whose weight is stored as (inputs, outputs).

It is recognised by the name and module of its class, so that transformers need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lobs_native.layers.base import Layer

__all__ = ["TransformersConv1D"]


class TransformersConv1D(Layer):
    """Weight (C, R); inputs (..., C)."""

    token_rows = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.groups, (self.width, self.rows) = 1, self.shape

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        for kind in type(module).__mro__:
            if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
                return kind if module._parameters["weight"] is not None else None
        return None

    def pack(self, stored: Tensor) -> Tensor:
        return stored.T[None]

    def unpack(self, packed: Tensor) -> Tensor:
        return packed[0].T

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, self._tokens(inputs)
