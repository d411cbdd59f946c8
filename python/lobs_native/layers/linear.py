"""nn.Linear: the weight is the matrix, and the input's leading dimensions count the rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lobs_native.layers.base import Layer

__all__ = ["Linear"]


class Linear(Layer):
    """Weight (R, C) as stored; inputs (..., C)."""

    module_type = nn.Linear
    token_rows = True

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        # Models make them from tensors and NumPy's integers too.
        self.groups, self.rows, self.width = 1, int(module.out_features), int(module.in_features)

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, self._tokens(inputs)
