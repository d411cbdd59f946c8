"""Weights that a module multiplies by itself, so that their inputs are not the inputs of a module.

Their inputs are observed in the matrix products of the forward pass
(``lobs_native.calibration.watch``), where a weight is recognised by its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lobs_native.errors import ArgumentError
from lobs_native.layers.base import Layer

__all__ = ["Matrix"]


class Matrix(Layer):
    """Rows of a parameter (R, C), or a whole parameter (G, R, C), or (G, C, R) if ``transposed``.
    Each group sees its own inputs.

    Parameters
    ----------
    prefix, short : str
        The module's name in the model, and the layer's name within the module ("" if it has none).
    kind : str
        The layer's type, for reports.
    part, bias_part : str
        Names of the parameters in ``module``; "" for no bias.
    take : {part: slice}
        The rows of a two-dimensional weight, and the entries of its bias, that this layer owns.
    caller : nn.Module
        The module whose forward computes the product, if not ``module``.
    """

    watched = True

    def __init__(
        self,
        prefix: str,
        short: str,
        module: nn.Module,
        kind: str,
        part: str = "weight",
        bias_part: str = "bias",
        *,
        take: Mapping[str, slice] | None = None,
        transposed: bool = False,
        caller: nn.Module | None = None,
    ) -> None:
        super().__init__(f"{prefix}.{short}" if prefix and short else prefix or short, module)
        self.prefix, self._kind, self.transposed = prefix, kind, transposed
        self.weight_part, self.bias_part, self._take = part, bias_part, take or {}
        self.caller = caller or module
        self.groups, self.rows, self.width = self.matrices().shape

    @property
    def kind(self) -> str:
        return self._kind

    def _check_computed(self, part: str) -> None:
        raise ArgumentError(
            f"layer {self.name!r}: {part} of the {self.kind} is computed from other parameters; "
            "make it permanent first (remove_parametrizations, prune.remove) or exclude it"
        )

    def stored(self, part: str) -> Tensor:
        whole = super().stored(part)
        return whole[self._take[part]] if part in self._take else whole

    def pack(self, stored: Tensor) -> Tensor:
        matrices = stored if stored.ndim == 3 else stored[None]
        return matrices.transpose(1, 2) if self.transposed else matrices

    def unpack(self, packed: Tensor) -> Tensor:
        return (packed.transpose(1, 2) if self.transposed else packed).reshape(self.shape)

    def matrices(self) -> Tensor:
        """(G, R, C) as a view of the parameter itself."""
        return self.pack(self.stored(self.weight_part))

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError(f"{self.name}: inputs are observed in products, not in calls")
