"""Pruning one parameter of one module, and the second moments for it.

The common part of the adapters for ``torch.nn.utils.prune`` and ``torch.ao.pruning``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lobs_native import checks
from lobs_native.calibration.moments import calibrate
from lobs_native.calibration.session import Forward, Session, batches_of
from lobs_native.errors import ArgumentError, DtypeError, LobsError, ShapeError
from lobs_native.layers import Layer, layers_for, layers_of
from lobs_native.network.layer_report import layer_report
from lobs_native.network.selection import LayerJob
from lobs_native.report.records import LayerReport
from lobs_native.solvers.hessian import Hessian, few_rows, second_moment
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

__all__ = ["Pruned", "layer_of", "prune_parameter", "second_moments", "write_bias"]


def second_moments(
    model: nn.Module,
    calibration: Any,
    *,
    names: Sequence[str] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, list[Hessian]]:
    """Run a model on data and collect the second moments of its layers' inputs.

    Parameters
    ----------
    model : nn.Module
        It runs in eval mode without gradients; its weights and mode are unchanged. Masks and
        parametrizations of weights are applied.
    calibration : iterable of batches
        Tensors, tuples or dicts, on the model's device. An iterator is consumed once.
    names : sequence of str, optional
        The modules to observe, named as in ``model.named_modules()``. By default, all that can be
        pruned.
    forward : callable(model, batch), optional
        Replaces ``model(batch)``.
    seed : int
        For random numbers in the forward. The caller's random state is restored.

    Returns
    -------
    {module name: list of Hessian}
        One for each group of a convolution, otherwise one, with a column of ones if the module has
        a bias. The columns of a convolution are ordered by kernel position, then input channel of
        the group. The lists are accepted by ``hessian=`` of the adapters.

    Raises
    ------
    ArgumentError
        A name is not a prunable layer, the model does not call it on this data, or it shares its
        weight with another layer (``lobs_native.prune`` handles those).
    NonFiniteError
        A layer's input has a NaN or an infinity.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = _selected(model, names)
    session = Session(model, batches_of(calibration), forward, None, seed, progress=False)
    with session.evaluating():
        by_name = calibrate(layers, session, "calibrate")
    for layer in layers:
        if not all(h.rows > 0 for h in by_name[layer.name]):
            raise ArgumentError(
                f"names: {layer.name!r} is not called by the model on this data; leave it out"
            )
    return {name: list(moments) for name, moments in by_name.items()}


def _selected(model: nn.Module, names: Sequence[str] | None) -> list[Layer]:
    """The layers of these names, checked."""
    known = {layer.name: layer for layer in layers_of(model) if _whole(layer)}
    if names is None:
        layers = list(known.values())
    elif isinstance(names, str):
        raise DtypeError(f"names: expected a list of module names, got the string {names!r}")
    else:
        layers = []
        for name in names:
            if name not in known:
                some = ", ".join(map(repr, list(known)[:8])) or "none"
                raise ArgumentError(
                    f"names: {name!r} is not a layer that can be pruned; known: {some}"
                )
            layers.append(known[name])
    owner: dict[int, str] = {}
    for layer in layers:
        if not _masked(layer.module, layer.weight_part):
            layer.check()
        for parameter in list(layer.parameters.values())[:1]:
            other = owner.setdefault(id(parameter), layer.name)
            if other != layer.name:
                raise ArgumentError(
                    f"names: {layer.name!r} and {other!r} share one weight, which must be pruned "
                    "for the inputs of both: use lobs_native.prune(model, ...)"
                )
    return layers


def _masked(module: nn.Module, name: str) -> bool:
    """Whether a weight is a parameter times a mask, as in torch's two pruning packages."""
    return f"{name}_mask" in module._buffers or parametrize.is_parametrized(module, name)


def _whole(layer: Layer) -> bool:
    """Whether a layer is the whole weight of a module, and has the module's inputs."""
    return layer.caller is layer.module and not layer.watched


def layer_of(module: Any, name: Any, label: str) -> Layer:
    """The layer whose weight is the tensor ``name`` of ``module``. Messages call it ``label``."""
    if not isinstance(module, nn.Module):
        raise DtypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise DtypeError(f"name: expected a parameter's name, got {type(name).__name__}")
    for layer in layers_for(label, module):
        if layer.module is module and layer.weight_part == name and _whole(layer):
            return layer
    raise ArgumentError(
        f"name: {name!r} of {type(module).__name__} is not the weight of a known layer type "
        "(Linear, Conv1d to 3d and their transposes, transformers' Conv1D); describe it with "
        "lobs_native.register_layer"
    )


@dataclass(frozen=True)
class Pruned:
    """The new values of a parameter, in the shapes in which the module stores them."""

    weight: Tensor  # removed entries are exactly zero
    mask: Tensor  # bool, True = kept
    bias: Tensor | None  # None if it does not change
    report: LayerReport


def prune_parameter(
    layer: Layer,
    value: Tensor,
    mask: Tensor | None,
    hessian: Any,
    settings: LayerSettings,
    *,
    update_bias: bool,
    backend: str | None,
) -> Pruned:
    """Prune ``value``, the layer's weight as stored, without writing anything. Entries where
    ``mask`` is False are already removed."""
    settings.resolved_pattern.check_fit(layer.neighbours, None, prune_bias=False)
    settings.check_target(masked=mask is not None)
    moments, rows, notes = _moments(hessian, layer)
    bias = _bias(layer, moments, checks.flag(update_bias, "update_bias"))
    if bias is None:
        moments = [H[: layer.width, : layer.width] for H in moments]
    kept = None if mask is None else layer.pack(mask).contiguous()
    try:
        out = prune_groups(
            layer.pack(value),
            moments,
            settings,
            bias=bias,
            mask=kept,
            backend=backend,
            notes=notes,
        )
    except LobsError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    if out.status != "ok":
        warnings.warn(
            f"lobs_native: layer {layer.name!r}: {'; '.join(out.notes)}",
            RuntimeWarning,
            stacklevel=3,
        )
    return Pruned(
        weight=layer.unpack(out.weight),
        mask=layer.unpack(out.mask),
        bias=None if out.bias is None else out.bias.reshape(-1),
        report=layer_report(LayerJob(layer, settings), out, rows=rows),
    )


def _moments(hessian: Any, layer: Layer) -> tuple[list[Tensor], float, list[str]]:
    """The second moments of the groups, the number of their rows (nan for matrices), and notes."""
    if hessian is None:
        raise ArgumentError(
            f"hessian: there is none for layer {layer.name!r}; collect it with "
            "second_moments(model, batches), or pass a lobs_native.Hessian or a matrix"
        )
    hessians = list(hessian) if isinstance(hessian, (list, tuple)) else [hessian]
    if len(hessians) != layer.groups:
        raise ShapeError(
            f"hessian: {len(hessians)} for layer {layer.name!r}, which has {layer.groups} groups: "
            "pass one for each group"
        )
    moments = [
        h.matrix() if isinstance(h, Hessian) else second_moment(h, "hessian") for h in hessians
    ]
    C = layer.width
    for H in moments:
        if len(H) not in (C, C + 1) or len(H) != len(moments[0]):
            raise ShapeError(
                f"hessian: {tuple(H.shape)}, but layer {layer.name!r} has {C} inputs: it must be "
                f"({C}, {C}), or ({C + 1}, {C + 1}) with a last column of ones"
            )
    if not all(isinstance(h, Hessian) for h in hessians):
        return moments, math.nan, []
    rows = min(h.rows for h in hessians)
    return moments, rows, [few_rows(rows, C)] if 1 < rows < C else []


def _bias(layer: Layer, moments: Sequence[Tensor], update_bias: bool) -> Tensor | None:
    """The bias (G, R) that is updated together with the weights: None if there is none, if the
    second moments do not include it, or without ``update_bias``."""
    ones = len(moments[0]) == layer.width + 1
    part = layer.bias_part
    if not (ones and update_bias) or not part or getattr(layer.module, part, None) is None:
        return None
    if layer.module._parameters.get(part) is None:
        raise ArgumentError(
            f"layer {layer.name!r}: its {part} is computed from other parameters (pruned or "
            "parametrized) and cannot be updated with the weights; pass update_bias=False"
        )
    return layer.bias()


@torch.no_grad()
def write_bias(layer: Layer, bias: Tensor | None) -> None:
    """Copy the bias from :func:`prune_parameter` into the module's own."""
    if bias is not None:
        own = layer.stored(layer.bias_part)
        own.copy_(bias.reshape(own.shape))
