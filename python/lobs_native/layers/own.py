"""Weights that a forward pass multiplies without a call of a module that is made for it: functions
on parameters, subclasses with a forward of their own, recurrent layers.

What such a layer looks like is not known from its type, but from its use (see
``lobs_native.calibration.survey``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lobs_native.layers.conv import Conv, ConvCall
from lobs_native.layers.conv_transpose import ConvTranspose
from lobs_native.layers.matrix import Matrix

__all__ = ["OwnConv", "OwnConvTranspose", "Product", "recurrent_in_products"]


class Product(Matrix):
    """A parameter that is the operand of matrix products, cut into G blocks of equal size.

    Parameters
    ----------
    name : str
        The layer's name.
    prefix, part, bias_part : str
        The module's name, and the names of its parameters; "" for no bias.
    blocks : (G, R, C), or (G, C, R) if ``transposed``
        The contiguous parameter as blocks.
    caller : nn.Module
        The innermost module whose call includes every use.
    routed : bool
        Whether the blocks see different numbers of rows, as experts do.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        module: nn.Module,
        part: str,
        bias_part: str,
        *,
        blocks: tuple[int, int, int],
        transposed: bool,
        caller: nn.Module,
        routed: bool,
    ) -> None:
        self._blocks = blocks
        super().__init__(
            prefix,
            "",
            module,
            type(module).__name__,
            part,
            bias_part,
            transposed=transposed,
            caller=caller,
        )
        self.name, self.routed = name, routed

    def pack(self, stored: Tensor) -> Tensor:
        return super().pack(stored.reshape(self._blocks))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with recurrent_in_products(self.module):
            yield


@contextlib.contextmanager
def recurrent_in_products(model: nn.Module) -> Iterator[None]:
    """Where ``model`` has recurrent layers, let these run as matrix products, one per time step,
    instead of in fused kernels, which hide the inputs of their weights."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
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

    def __init__(
        self,
        name: str,
        prefix: str,
        module: nn.Module,
        part: str,
        bias_part: str,
        *,
        call: ConvCall,
        caller: nn.Module,
    ) -> None:
        self.weight_part, self.bias_part = part, bias_part
        super().__init__(name, module, call)
        self.prefix, self.caller = prefix, caller


class OwnConvTranspose(OwnConv, ConvTranspose):
    """The same for transposed convolutions."""
