"""One parameter of one module: its second moments by a hook, its pruned values, nothing written.

What the adapters of ``torch.nn.utils.prune`` and ``torch.ao.pruning`` have in common.
"""

from __future__ import annotations

import dataclasses
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
from lobs_native.calibration.run import Forward, Run, batches_of
from lobs_native.checks import check_choice
from lobs_native.errors import ArgumentError, DtypeError, LobsError, ShapeError
from lobs_native.layers import Layer, layers_for, layers_of
from lobs_native.network.layerwise import layer_report
from lobs_native.report.records import LayerReport
from lobs_native.solvers.hessian import Hessian, few_rows, second_moment
from lobs_native.solvers.patterns import check_fit, pattern_of
from lobs_native.solvers.settings import METHODS, Target
from lobs_native.solvers.weight import prune_groups

__all__ = ["How", "Pruned", "layer_of", "prune_parameter", "second_moments", "write_bias"]


def second_moments(
    model: nn.Module,
    calibration: Any,
    *,
    names: Sequence[str] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, list[Hessian]]:
    """Run a model on data and collect the second moments of what its layers read.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode without gradients; neither its weights nor its mode are changed. Pruned and
        parametrized weights count as they are now.
    calibration : iterable of batches
        Tensors, tuples or dicts, on the model's device. An iterator is gone through once.
    names : sequence of str, optional
        Modules to look at, as ``model.named_modules()`` calls them. All that can be pruned by
        default.
    forward : callable(model, batch), optional
        Where ``model(batch)`` is not right.
    seed : int
        For random numbers that the forward draws. The caller's random state is kept.

    Returns
    -------
    {module name: list of Hessian}
        One for each group of a convolution, one otherwise, with a column of ones where the module
        has a bias. The columns of a convolution are in the order (kernel position, input channel of
        the group). What ``hessian=`` of the adapters takes.

    Raises
    ------
    ArgumentError
        A name is no prunable layer, the model does not call it on this data, or it shares its
        weight with another one (``lobs_native.prune`` handles those).
    NonFiniteError
        A NaN or an infinity in a layer's input.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = _chosen(model, names)
    run = Run(model, batches_of(calibration), forward, None, seed, progress=False)
    with run.evaluating():
        found = calibrate(layers, run, "calibrate")
    for layer in layers:
        if not all(h.rows > 0 for h in found[layer.name]):
            raise ArgumentError(
                f"names: {layer.name!r} is not called by the model on this data; leave it out"
            )
    return {name: list(moments) for name, moments in found.items()}


def _chosen(model: nn.Module, names: Sequence[str] | None) -> list[Layer]:
    """The layers of these names, all of them checked."""
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
                    f"names: {name!r} is no layer that can be pruned; known: {some}"
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
                    f"names: {layer.name!r} and {other!r} share one weight, which has to be pruned "
                    "for the inputs of both: use lobs_native.prune(model, ...)"
                )
    return layers


def _masked(module: nn.Module, name: str) -> bool:
    """Whether this weight is a parameter times a mask, as torch's two pruning packages have it."""
    return f"{name}_mask" in module._buffers or parametrize.is_parametrized(module, name)


def _whole(layer: Layer) -> bool:
    """Whether the layer is a module's whole weight, and its inputs are the module's."""
    return layer.caller is layer.module and not layer.watched


def layer_of(module: Any, name: Any, called: str) -> Layer:
    """The layer whose weight is the tensor ``name`` of ``module``, for messages ``called`` so."""
    if not isinstance(module, nn.Module):
        raise DtypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise DtypeError(f"name: expected a parameter's name, got {type(name).__name__}")
    for layer in layers_for(called, module):
        if layer.module is module and layer.weight_part == name and _whole(layer):
            return layer
    raise ArgumentError(
        f"name: {name!r} of {type(module).__name__} is not the weight of a known layer type "
        "(Linear, Conv1d to 3d and their transposes, transformers' Conv1D); describe it by "
        "lobs_native.register_layer"
    )


@dataclass(frozen=True)
class How:
    """How far and in which way, as :func:`lobs_native.prune_weight` explains it."""

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None
    method: str = "exact"
    pattern: Any = "unstructured"
    scope: str = "layer"
    damping: float = 0.01
    refine: str | None = None
    update_bias: bool = True
    backend: str | None = None

    def target(self, masked: bool) -> Target:
        method = check_choice(self.method, "method", METHODS)
        pattern = pattern_of(self.pattern)
        return Target.of(
            self.sparsity, self.threshold, self.max_error, method, pattern, masked=masked
        )


@dataclass(frozen=True)
class Pruned:
    """What a parameter is to become; all tensors as the module stores them."""

    weight: Tensor  # removed entries are exactly zero
    mask: Tensor  # bool, True = kept
    bias: Tensor | None  # None where it stays as it is
    report: LayerReport


def prune_parameter(
    layer: Layer, value: Tensor, mask: Tensor | None, hessian: Any, how: How
) -> Pruned:
    """Prune ``value``, the layer's weight as it is stored; entries where ``mask`` is False are gone
    already. Nothing is written."""
    pattern = pattern_of(how.pattern)
    check_fit(pattern, layer.neighbours, None, False)
    target = how.target(masked=mask is not None)
    moments, rows, notes = _moments(hessian, layer)
    bias = _bias(layer, moments, checks.flag(how.update_bias, "update_bias"))
    if bias is None:
        moments = [H[: layer.width, : layer.width] for H in moments]
    kept = None if mask is None else layer.pack(mask).contiguous()
    try:
        out = prune_groups(
            layer.pack(value),
            moments,
            target=target,
            method=how.method,
            pattern=pattern,
            scope=how.scope,
            bias=bias,
            mask=kept,
            damping=how.damping,
            refine=how.refine,
            backend=how.backend,
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
        report=layer_report(
            layer,
            out,
            method=how.method,
            pattern=pattern,
            scope=how.scope,
            asked=_asked(target),
            damping=how.damping,
            rows=rows,
        ),
    )


def _moments(hessian: Any, layer: Layer) -> tuple[list[Tensor], float, list[str]]:
    """The second moments of the groups, the rows they are the mean of (nan where a matrix does not
    tell), and what is to be noted."""
    if hessian is None:
        raise ArgumentError(
            f"hessian: there is none for layer {layer.name!r}; collect it with "
            "second_moments(model, batches), or pass a lobs_native.Hessian or a matrix"
        )
    given = list(hessian) if isinstance(hessian, (list, tuple)) else [hessian]
    if len(given) != layer.groups:
        raise ShapeError(
            f"hessian: {len(given)} of them for layer {layer.name!r}, which has {layer.groups} "
            "groups: give one for each"
        )
    made = [h.matrix() if isinstance(h, Hessian) else second_moment(h, "hessian") for h in given]
    C = layer.width
    for H in made:
        if len(H) not in (C, C + 1) or len(H) != len(made[0]):
            raise ShapeError(
                f"hessian: {tuple(H.shape)}, but layer {layer.name!r} reads {C} columns: it must "
                f"be ({C}, {C}), or ({C + 1}, {C + 1}) with a last column of ones"
            )
    if not all(isinstance(h, Hessian) for h in given):
        return made, math.nan, []
    rows = min(h.rows for h in given)
    return made, rows, [few_rows(rows, C)] if 1 < rows < C else []


def _bias(layer: Layer, moments: Sequence[Tensor], wanted: bool) -> Tensor | None:
    """The bias (G, R) that is updated together with the weights: where there is one, the second
    moments know of it, and it is wanted."""
    ones = len(moments[0]) == layer.width + 1
    part = layer.bias_part
    if not (ones and wanted) or not part or getattr(layer.module, part, None) is None:
        return None
    if layer.module._parameters.get(part) is None:
        raise ArgumentError(
            f"layer {layer.name!r}: its {part} is computed from other parameters (pruned or "
            "parametrized) and cannot be updated with the weights; pass update_bias=False"
        )
    return layer.bias()


def _asked(target: Target) -> str:
    given = (f"{k} {v:g}" for k, v in dataclasses.asdict(target).items() if v is not None)
    return next(given, "mask")


@torch.no_grad()
def write_bias(layer: Layer, bias: Tensor | None) -> None:
    """Copy what :func:`prune_parameter` made of the bias into the module's own."""
    if bias is not None:
        own = layer.stored(layer.bias_part)
        own.copy_(bias.reshape(own.shape))
