"""The layer types that can be pruned.

To add one, write a subclass of Layer in a file of its own and add it to LAYERS. Users add theirs
with :func:`register_layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers.attention import Attention
from lobs_native.layers.base import Layer, overwrite
from lobs_native.layers.conv import Conv
from lobs_native.layers.conv1d_of_transformers import TransformersConv1D
from lobs_native.layers.conv_transpose import ConvTranspose
from lobs_native.layers.experts import Experts
from lobs_native.layers.linear import Linear
from lobs_native.layers.matrix import Matrix

__all__ = [
    "LAYERS",
    "Attention",
    "Layer",
    "Linear",
    "Matrix",
    "layers_for",
    "layers_of",
    "overwrite",
    "register_layer",
    "stored_weights",
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
    """The prunable weights of one module: none if its type is unknown, or hidden by TorchScript.

    ``Layer.check`` tells whether a weight may be pruned.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    for kind in reversed(LAYERS):  # later types are more specific
        if kind.base_of(module) is not None:
            return kind.of(name, module)
    return []


def layers_of(model: nn.Module) -> list[Layer]:
    """All prunable weights of a model, in module order."""
    layers: list[Layer] = []
    described: set[nn.Module] = set()  # by themselves or by a module that contains them
    for name, module in model.named_modules():
        if module not in described:
            of_module = layers_for(name, module)
            described.update(layer.module for layer in of_module)
            layers += of_module
    return layers


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as stored, detached, by all names that a report may have for them: those of
    layers, of modules with a weight, and of parameters."""
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for part, parameter in module._parameters.items():
            if parameter is not None:
                weights[f"{name}.{part}" if name else part] = parameter.detach()
                if part == "weight":
                    weights[name] = parameter.detach()
    for layer in layers_of(model):  # these may own part of a parameter, or compute it
        weights[layer.name] = layer.stored(layer.weight_part)
    return weights


def register_layer(layer: type[Layer]) -> type[Layer]:
    """Make your own layer type prunable.

    Parameters
    ----------
    layer : subclass of ``lobs_native.Layer``
        It sets ``module_type`` (the nn.Module class) and, for each module, ``groups``, ``rows``
        and ``width``. It implements ``columns(inputs)``, and ``pack`` and ``unpack`` if the weight
        is not stored as (groups * rows, width). Types registered later take precedence, so a
        subclass of a known module can get a description of its own.

    Returns
    -------
    type
        The same class, so that this function can be used as a decorator.

    Raises
    ------
    DtypeError
        ``layer`` is not a subclass of Layer.
    ArgumentError
        It has no ``module_type``, or that type has a description already.

    Notes
    -----
    ``docs/developers/recipes.md`` has an example, and the test that every layer type should pass.
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
                f"layer: {other.__name__} already describes {both.pop().__name__}; subclass the "
                "module to give it another description"
            )
    LAYERS.append(layer)
    return layer


def _kinds(layer: type[Layer]) -> tuple[type[nn.Module], ...]:
    kinds = getattr(layer, "module_type", ())
    return kinds if isinstance(kinds, tuple) else (kinds,)
