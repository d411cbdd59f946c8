"""The layer types that can be pruned. To add one: a file with a subclass of Layer, and a line in
LAYERS."""

from __future__ import annotations

from torch import nn

from lobs_native.layers.base import Layer
from lobs_native.layers.conv import Conv2d
from lobs_native.layers.linear import Linear

__all__ = ["LAYERS", "Layer", "layer_for"]

LAYERS: tuple[type[Layer], ...] = (Linear, Conv2d)


def layer_for(name: str, module: nn.Module) -> Layer | None:
    """The Layer for a module, or None for a type that is not prunable.

    A subclass counts as its base unless it has a forward of its own: then nobody knows what its
    weight is used for.
    """
    for layer in LAYERS:
        if (
            isinstance(module, layer.module_type)
            and type(module).forward is layer.module_type.forward
        ):
            return layer(name, module)
    return None
