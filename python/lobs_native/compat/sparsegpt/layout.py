"""The layout of a layer in SparseGPT and its copies: weight (R, C), inputs (N, C).

Columns are in the order of the stored weight, ``weight.flatten(1)``, as in the hosts;
``lobs_native.layers`` orders those of a convolution differently.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lobs_native.errors import DtypeError, ShapeError
from lobs_native.layers.conv1d_of_transformers import TransformersConv1D

__all__ = ["Layout"]


class Layout:
    """A Linear, a Conv2d without groups, or the Conv1D of transformers."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.conv = isinstance(layer, nn.Conv2d)
        self.transposed = TransformersConv1D.base_of(layer) is not None
        if not (self.conv or self.transposed or isinstance(layer, nn.Linear)):
            raise DtypeError(
                f"layer: a {type(layer).__name__}; this class takes Linear, Conv2d and the Conv1D "
                "of transformers, as its host does; lobs_native.prune takes more types"
            )
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ShapeError(
                f"layer: a Conv2d with {layer.groups} groups has as many second moments, but this "
                "class has one; use lobs_native.prune"
            )
        self.rows, self.columns = self.matrix().shape

    @property
    def weight(self) -> Tensor:
        """The layer's weight as stored, a parameter."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def matrix(self) -> Tensor:
        """The weight (R, C), as a view in its own dtype."""
        stored = self.weight.data
        return stored.T if self.transposed else stored.flatten(1)

    def store(self, W: Tensor) -> None:
        """Replace the layer's weight by W (R, C), in the dtype and shape of the old one. The old
        tensor is not changed, as in the hosts."""
        weight = self.weight
        stored = W.T if self.transposed else W
        weight.data = stored.reshape(weight.shape).to(weight.dtype).contiguous()

    def samples(self, inputs: Tensor) -> int:
        """The hosts' count of samples: the first dimension, or 1 for a single sample without it."""
        return inputs.shape[0] if inputs.ndim > (3 if self.conv else 2) else 1

    def tokens(self, inputs: Tensor) -> Tensor:
        """The inputs as (N, C): the rows that the weight is multiplied by."""
        if not isinstance(self.layer, nn.Conv2d):
            if inputs.ndim == 0 or inputs.shape[-1] != self.columns:
                raise ShapeError(
                    f"inp: shape {tuple(inputs.shape)}, but the layer has {self.columns} inputs"
                )
            return inputs.reshape(-1, self.columns)
        conv = self.layer
        images = inputs if inputs.ndim == 4 else inputs[None]
        if images.ndim != 4 or images.shape[1] != conv.in_channels:
            raise ShapeError(
                f"inp: shape {tuple(inputs.shape)}, expected (B, {conv.in_channels}, h, w)"
            )
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(images, conv._reversed_padding_repeated_twice, mode)
        patches = functional.unfold(  # (B, C, patches), C as weight.flatten(1)
            padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride
        )
        return patches.transpose(1, 2).reshape(-1, self.columns)
