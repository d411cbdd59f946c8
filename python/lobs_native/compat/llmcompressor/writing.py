"""Writing pruned weights through llm-compressor's offloading, and undoing that."""

from __future__ import annotations

import torch
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils import update_offload_parameter
from torch import Tensor, nn

from lobs_native.layers import Layer
from lobs_native.solvers.weight import PrunedWeight

__all__ = ["Originals", "write"]


def write(layer: Layer, out: PrunedWeight) -> None:
    """Write a pruned weight, and its bias if it was updated, into the layer's module."""
    if not _offloaded(layer.module):
        layer.write_back(out.weight, out.bias)
        return
    update_offload_parameter(layer.module, layer.weight_part, layer.unpack(out.weight))
    if out.bias is not None:
        shape = layer.stored(layer.bias_part).shape
        update_offload_parameter(layer.module, layer.bias_part, out.bias.reshape(shape))


class Originals:
    """Copies of layers' tensors from before pruning, on the CPU."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Layer, dict[str, Tensor]]] = {}

    def keep(self, layer: Layer, *, biases: bool) -> None:
        """Copy a layer's weight, and its bias with ``biases``."""
        parts = [layer.weight_part] + ([layer.bias_part] if biases else [])
        copies = {part: layer.stored(part).to("cpu", copy=True) for part in parts}
        self._kept[layer.name] = (layer, copies)

    @torch.no_grad()
    def restore(self) -> None:
        """Write all copies back, and drop them."""
        for layer, copies in self._kept.values():
            for part, value in copies.items():
                if _offloaded(layer.module):
                    update_offload_parameter(layer.module, part, value)
                elif part == layer.weight_part:
                    layer.write_back(layer.pack(value), None)
                else:
                    layer.stored(part).copy_(value)
        self.clear()

    def clear(self) -> None:
        """Drop all copies."""
        self._kept.clear()


def _offloaded(module: nn.Module) -> bool:
    return isinstance(module._parameters, OffloadCache)
