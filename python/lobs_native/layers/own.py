"""Weights that a forward pass multiplies without a call of a module that is made for it: functions
on parameters, subclasses with a forward of their own, recurrent layers.

What such a layer looks like is not known from its type, but from its use (see
``lobs_native.calibration.survey``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lobs_native.layers.block import Block, strided
from lobs_native.layers.conv import PATCH_BYTES, Conv, ConvCall
from lobs_native.layers.conv_transpose import ConvTranspose
from lobs_native.layers.matrix import Matrix

__all__ = [
    "MixedConv",
    "Own",
    "OwnConv",
    "OwnConvTranspose",
    "Product",
    "has_recurrent",
    "recurrent_in_products",
]


@dataclass(frozen=True)
class Own:
    """A parameter that no layer type describes; how it is used is seen when the model runs."""

    name: str  # the module's, if the parameter is called "weight"; otherwise the parameter's
    prefix: str  # the module's
    module: nn.Module
    part: str
    parameter: nn.Parameter


class Product(Matrix):
    """A parameter that is the operand of matrix products, cut into G blocks of the same form.

    Parameters
    ----------
    own : Own
        The parameter.
    bias_part : str
        The name of its bias in the module; "" for none.
    block : Block
        The form of the blocks of the contiguous parameter.
    apart : int
        How far apart they lie, in entries.
    caller : nn.Module
        The innermost module whose call includes every use.
    routed : bool
        Whether the blocks see different numbers of rows, as experts do.
    """

    def __init__(
        self,
        own: Own,
        bias_part: str,
        *,
        block: Block,
        apart: int,
        caller: nn.Module,
        routed: bool,
    ) -> None:
        self.block, self.apart = block, apart
        kind = type(own.module).__name__
        super().__init__(own.prefix, "", own.module, kind, own.part, bias_part, caller=caller)
        self.name, self.routed = own.name, routed

    def pack(self, stored: Tensor) -> Tensor:
        groups = stored.numel() // self.block.size
        sizes, steps = strided(groups, self.apart, self.block)
        return stored.contiguous().as_strided(sizes, steps).reshape(groups, *self.block.shape)

    def unpack(self, packed: Tensor) -> Tensor:
        sizes, steps = strided(self.groups, self.apart, self.block)
        whole = packed.new_empty(packed.numel())
        whole.as_strided(sizes, steps).copy_(packed.reshape(sizes))
        return whole.view(self.shape)

    def group_of(self, block: Block) -> int | None:
        """The group of which a block is the weight; None if it is of another form."""
        group, rest = divmod(block.offset, self.apart)
        alike = (block.rows, block.columns) == (self.block.rows, self.block.columns)
        return group if alike and not rest and group < self.groups else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with recurrent_in_products(self.module):
            yield


def has_recurrent(model: nn.Module) -> bool:
    """Whether there are layers that :func:`recurrent_in_products` lets run in another way."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


@contextlib.contextmanager
def recurrent_in_products(model: nn.Module) -> Iterator[None]:
    """Where ``model`` has recurrent layers, let these run as matrix products, one per time step,
    instead of in fused kernels, which hide the inputs of their weights."""
    if not has_recurrent(model):
        yield
        return
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


class OwnConv(Conv):
    """A parameter that is the filter of convolutions with the same arguments."""

    watched = True

    def __init__(self, own: Own, bias_part: str, *, call: ConvCall, caller: nn.Module) -> None:
        self.weight_part, self.bias_part = own.part, bias_part
        super().__init__(own.name, own.module, call)
        self.prefix, self.caller = own.prefix, caller


class OwnConvTranspose(OwnConv, ConvTranspose):
    """The same for transposed convolutions."""


class MixedConv(OwnConv):
    """A parameter of E sets of filters, (E, R * groups, C_in / groups, *kernel) in any shape with E
    first, from which each sample's are mixed by its routing weights: ``W(r) = sum_e r_e W_e``.

    Since ``conv(x, W(r)) = sum_e conv(r_e x, W_e)``, it is one convolution of E times as many
    channels: at each kernel position, first those for W_1, then those for W_2, and so on.

    Source: Yang, Bender, Le & Ngiam 2019 (CondConv), section 3.
    """

    def __init__(self, own: Own, *, call: ConvCall, caller: nn.Module) -> None:
        self.of_sample = call  # with the mixed filters
        self.experts = len(own.parameter)
        all_channels = dataclasses.replace(call, in_channels=self.experts * call.in_channels)
        super().__init__(own, "", call=all_channels, caller=caller)
        self.width *= self.experts

    @property
    def neighbours(self) -> int:
        return self.of_sample.in_channels // self.of_sample.groups

    @property
    def _filters(self) -> tuple[int, int, int, int, int]:
        """(E, groups, R, C_in / groups, kernel positions)"""
        positions = math.prod(self.kernel)
        return self.experts, self.groups, self.rows, self.neighbours, positions

    def pack(self, stored: Tensor) -> Tensor:
        filters = stored.reshape(self._filters).permute(1, 2, 4, 0, 3)
        return filters.reshape(self.groups, self.rows, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        E, G, R, channels, positions = self._filters
        filters = packed.reshape(G, R, positions, E, channels)
        return filters.permute(3, 0, 1, 4, 2).reshape(self.shape)

    def columns(  # type: ignore[override]
        self, inputs: Tensor, routing: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """``inputs`` are (1, B * C_in, *sizes), and ``routing`` the weights (B, E)."""
        (B, E), sizes = routing.shape, inputs.shape[2:]
        channels = inputs.reshape(B, self.groups, 1, -1, *sizes)
        weights = routing.reshape(B, 1, E, 1, *(1 for _ in sizes))
        at_once = max(1, PATCH_BYTES // (E * channels[0].numel() * inputs.element_size()))
        for x, r in zip(channels.split(at_once), weights.split(at_once), strict=True):
            yield from super().columns((x * r).flatten(1, 3))
