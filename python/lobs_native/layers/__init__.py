"""The layer types that can be pruned. To add one: a file with a subclass of Layer, and a line in
LAYERS; from outside, :func:`register_layer`."""

from __future__ import annotations

from torch import nn

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers.attention import Attention
from lobs_native.layers.base import Layer
from lobs_native.layers.conv import Conv
from lobs_native.layers.conv1d_of_transformers import TransformersConv1D
from lobs_native.layers.conv_transpose import ConvTranspose
from lobs_native.layers.experts import Experts
from lobs_native.layers.linear import Linear
from lobs_native.layers.matrix import Matrix

__all__ = [
    "LAYERS",
    "Layer",
    "Linear",
    "Matrix",
    "layers_for",
    "layers_of",
    "register_layer",
]

LAYERS: list[type[Layer]] = [
    Linear,
    Conv,
    ConvTranspose,
    TransformersConv1D,
    Attention,
    Experts,
]


def layers_for(name: str, module: nn.Module) -> list[Layer]:
    """The prunable weights of one module, none if its type is not known. ``Layer.check`` says
    whether they may be touched."""
    for kind in reversed(LAYERS):  # later ones are more special
        if kind.base_of(module) is not None:
            return kind.of(name, module)
    return []


def layers_of(model: nn.Module) -> list[Layer]:
    """All prunable weights of a model, in module order."""
    found: list[Layer] = []
    taken: set[nn.Module] = set()  # parts of a module that has described them itself
    for name, module in model.named_modules():
        if module not in taken:
            layers = layers_for(name, module)
            taken.update(layer.module for layer in layers)
            found += layers
    return found


def register_layer(layer: type[Layer]) -> type[Layer]:
    """Make a layer type of your own prunable.

    Parameters
    ----------
    layer : subclass of ``lobs_native.Layer``
        Sets ``module_type`` (the nn.Module class), and for a module ``groups``, ``rows`` and
        ``width``; yields ``columns(inputs)``; for a weight that is not stored as (groups * rows,
        width), also ``pack`` and ``unpack``. Types that were registered later come first, so a
        subclass of a known module with a forward of its own gets its own description.

    Returns
    -------
    type
        The same class, so that it can stand as a decorator.

    Raises
    ------
    DtypeError
        It is not a subclass of Layer.
    ArgumentError
        It has no ``module_type``, or there is a layer type for that already.

    Notes
    -----
    ``docs/extending.md`` has an example, and the test that every layer type should pass.
    """
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise DtypeError(f"layer: expected a subclass of lobs_native.Layer, got {layer!r}")
    kinds = _kinds(layer)
    if not kinds or not all(isinstance(k, type) and issubclass(k, nn.Module) for k in kinds):
        raise ArgumentError(
            f"layer: {layer.__name__}.module_type must be the nn.Module class that it describes"
        )
    for other in LAYERS:
        if both := set(kinds) & set(_kinds(other)):
            raise ArgumentError(
                f"layer: {other.__name__} describes {both.pop().__name__} already; subclass the "
                "module to give it another description"
            )
    LAYERS.append(layer)
    return layer


def _kinds(layer: type[Layer]) -> tuple[type[nn.Module], ...]:
    kinds = getattr(layer, "module_type", ())
    return kinds if isinstance(kinds, tuple) else (kinds,)
