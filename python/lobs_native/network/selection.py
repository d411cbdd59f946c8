"""Selection of the layers to prune, each with its settings, resolved and checked before anything
runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.layers import Layer, layers_of
from lobs_native.network.settings import NetworkSettings, globs_of
from lobs_native.report.records import Skipped
from lobs_native.solvers.extent import Extent
from lobs_native.solvers.settings import LayerSettings

__all__ = ["LayerJob", "job_of", "jobs_of", "tie"]


@dataclass(frozen=True)
class LayerJob:
    """One layer and how it is to be pruned."""

    layer: Layer
    settings: LayerSettings
    shared: bool = False  # whether its sparsity comes from a budget for the whole model

    @property
    def scope(self) -> str:
        """Among which weights those to remove are chosen: "row", "layer" or "model"."""
        return "model" if self.shared else self.settings.scope

    @property
    def order(self) -> int:
        """D, the order of its second moment: inputs, and the column of ones if it has a bias."""
        return self.layer.width + (self.layer.bias() is not None)

    @property
    def moment_bytes(self) -> int:
        """Bytes of the second moments of its groups."""
        return self.layer.groups * self.order**2 * 8

    @property
    def extent(self) -> Extent:
        """What methods plan with."""
        layer, target = self.layer, self.settings.target
        return Extent(
            groups=layer.groups,
            rows=layer.rows,
            order=self.order,
            share=1.0 if target.sparsity is None else target.sparsity,
            dtype=layer.weight().dtype,
            searched=target.max_error is not None,
            shared=self.shared,
        )

    @property
    def weights(self) -> int:
        """How many weights of the layer may be removed."""
        layer = self.layer
        return layer.groups * layer.rows * (layer.width + self.settings.prune_bias)

    def with_sparsity(self, share: float) -> LayerJob:
        """The same with another sparsity."""
        settings = dataclasses.replace(self.settings, sparsity=share)
        return dataclasses.replace(self, settings=settings)


def jobs_of(model: Any, settings: NetworkSettings) -> tuple[list[LayerJob], list[Skipped]]:
    """The layers to prune with their settings, in module order, everything checked; and those that
    cannot be pruned."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise DtypeError(
            f"model: a {type(model).__name__} (TorchScript), whose steps cannot be observed; prune "
            "the nn.Module from which it was made, and script or trace that afterwards"
        )
    known = layers_of(model)
    names = [layer.name for layer in known]
    wanted = set(names)
    if settings.include is not None:
        wanted = _matching(globs_of(settings.include, "include"), names, "include")
    if settings.exclude is not None:
        wanted -= _matching(globs_of(settings.exclude, "exclude"), names, "exclude")
    layers = [layer for layer in known if layer.name in wanted]
    for layer in layers:
        layer.check()
    layers, skipped = tie(model, layers, explicit=settings.include is not None)
    skipped += _scripted(model)
    if not layers:
        raise ArgumentError(
            "model: no layer is left to prune (see include, exclude); linear and convolution "
            "layers, attention and experts can be pruned"
            + "".join(f"; {s.name!r} cannot: {s.reason}" for s in skipped)
        )
    for glob in settings.overrides or {}:
        _matching([glob], names, "overrides")
    return [job_of(layer, *settings.for_layer(layer.name)) for layer in layers], skipped


def _scripted(model: nn.Module) -> list[Skipped]:
    """The parts of a model that are TorchScript and have weights."""
    parts = {n: m for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    outer = (n for n in parts if not any(n.startswith(f"{other}.") for other in parts))
    return [
        Skipped(name, "TorchScript, whose steps cannot be observed")
        for name in outer
        if any(p.ndim > 1 for p in parts[name].parameters())
    ]


def _matching(globs: Sequence[str], names: Sequence[str], argument: str) -> set[str]:
    matching: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatchcase(name, glob)}
        if not hits:
            some = ", ".join(repr(n) for n in names[:8]) + (", ..." if len(names) > 8 else "")
            raise ArgumentError(
                f"{argument}: {glob!r} matches no prunable layer; there are {some or 'none'}"
            )
        matching |= hits
    return matching


def job_of(layer: Layer, settings: LayerSettings, shared: bool = False) -> LayerJob:
    """A layer with its settings. Errors name the layer that they do not fit, or that cannot be
    pruned."""
    settings.check_target()
    try:
        settings.resolved_pattern.check_fit(layer.neighbours, None, prune_bias=False)
    except PatternError as error:
        where = "" if layer.neighbours == layer.width else " (input channels at a kernel position)"
        raise PatternError(f"layer {layer.name!r}: {error}{where}") from error
    for name, parameter in layer.parameters.items():
        value = checks.tensor(parameter, name)
        if value.numel() == 0:
            raise ArgumentError(
                f"layer {layer.name!r}: {name} has shape {tuple(value.shape)} and is empty; "
                "exclude it"
            )
        checks.apart_in_memory(value, name)
        checks.check_finite(value, name)
    if layer.bias() is None:
        settings = dataclasses.replace(settings, prune_bias=False)
    order = layer.width + (layer.bias() is not None)
    return LayerJob(layer, settings.for_order(order), shared)


def tie(
    model: nn.Module, layers: Sequence[Layer], explicit: bool
) -> tuple[list[Layer], list[Skipped]]:
    """Merge layers that use one weight in the same way. A weight that something else uses too, for
    example an embedding, must not change unnoticed: its layer is skipped, or refused if it is
    ``explicit``."""
    sharing = _overlapping(model)
    by_module = {layer.module: layer for layer in layers if not layer.watched}
    kept: list[Layer] = []
    skipped: list[Skipped] = []
    merged: set[str] = set()
    for layer in layers:
        if layer.name in merged:
            continue
        own = set(layer.module.modules())
        partners: dict[str, Layer] = {}
        others: dict[str, str] = {}
        for name, parameter in layer.parameters.items():
            for module, other in sharing.get(id(parameter), ()):
                if module in own:
                    continue
                partner = by_module.get(module)
                if partner is not None and layer.can_share(partner):
                    partners[partner.name] = partner
                else:
                    others[other] = name
        if others:
            reason = (
                f"{next(iter(others.values()))} is tied to {', '.join(others)}, which is not "
                "pruned with it; pruning it would change both"
            )
            if explicit:
                raise ArgumentError(
                    f"layer {layer.name!r}: {reason}. Leave it out, or give each its own copy"
                )
            skipped.append(Skipped(layer.name, reason))
            continue
        for partner in partners.values():
            layer.share(partner)
            merged.add(partner.name)
        kept.append(layer)
    return kept, skipped


def _overlapping(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter -> all (module, full name) that hold it, or one that lies in the same
    memory."""
    spans = []
    for prefix, module in model.named_modules():
        for part, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if not p.is_meta and p.numel():
                start = p.data_ptr()
                reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
                end = start + (reach + 1) * p.element_size()
                spans.append((start, end, p, module, f"{prefix}.{part}" if prefix else part))
    sharing: dict[int, list[tuple[nn.Module, str]]] = {}
    cluster: list[tuple[nn.Module, str]] = []
    reached = 0
    for start, end, parameter, module, name in sorted(spans, key=lambda span: span[:2]):
        if start >= reached:
            cluster = []
        reached = max(reached, end)
        cluster.append((module, name))
        sharing[id(parameter)] = cluster
    return sharing
