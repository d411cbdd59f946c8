"""Selection of the layers to prune, each with its settings, resolved and checked before anything
runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lobs_native import checks
from lobs_native.errors import ArgumentError, DtypeError, LobsError, PatternError
from lobs_native.layers import Layer, layers_of
from lobs_native.layers.own import Own
from lobs_native.network.conventions import TABLE, Conventions
from lobs_native.network.coverage import nothing_left
from lobs_native.network.settings import NetworkSettings, globs_of
from lobs_native.report.records import Skipped
from lobs_native.solvers.extent import Extent
from lobs_native.solvers.settings import LayerSettings

__all__ = [
    "Candidates",
    "LayerJob",
    "candidates_of",
    "job_of",
    "reason_of",
    "tie",
    "weights_of",
]


_SCRIPTED = "it belongs to a TorchScript module; prune the module before it is scripted or traced"


@dataclass(frozen=True)
class LayerJob:
    """One layer and how it is to be pruned."""

    layer: Layer
    settings: LayerSettings
    shared: bool = False  # whether its sparsity comes from a budget for the whole model
    mask: Tensor | None = None  # (G, R, C) bool: what may stay

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
            inverted=self.settings.refine is not None,
        )

    @property
    def weights(self) -> int:
        """How many weights of the layer may be removed."""
        layer = self.layer
        return layer.groups * layer.rows * (layer.width + self.settings.prune_bias)

    def with_mask(self, mask: Tensor | None) -> LayerJob:
        """The same, to lose what a mask (G, R, C) removes, if there is one, and nothing else."""
        if mask is None:
            return self
        settings = dataclasses.replace(self.settings, sparsity=None)
        return dataclasses.replace(self, settings=settings, mask=mask)

    def with_sparsity(self, share: float) -> LayerJob:
        """The same with another sparsity."""
        settings = dataclasses.replace(self.settings, sparsity=share)
        return dataclasses.replace(self, settings=settings)


@dataclass(frozen=True)
class Candidates:
    """What of a model may be pruned, before it has run."""

    layers: list[Layer]
    own: list[Own]
    skipped: list[Skipped]
    errors: list[LobsError]  # of layers that cannot be pruned
    named: set[str]  # layers that ``include`` asks for by name: to leave one out is an error


def weights_of(layer: Layer) -> int:
    """The number of weights of a layer."""
    return layer.groups * layer.rows * layer.width


def candidates_of(model: Any, settings: NetworkSettings) -> Candidates:
    """The layers of known types and all other parameters of two or more dimensions, each in module
    order, divided into those that may be pruned and those that are left alone, with the reasons.

    A layer that cannot be pruned is an error with ``strict``, or if ``include`` names it.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise DtypeError(
            f"model: a {type(model).__name__} (TorchScript), whose steps cannot be observed; prune "
            "the nn.Module from which it was made, and script or trace that afterwards"
        )
    known = layers_of(model)
    own = _own(model, known)
    prefixes = {layer.name: layer.prefix for layer in known} | {x.name: x.prefix for x in own}
    wanted, named, why = set(prefixes), set[str](), "not in include"
    if settings.include is not None:
        wanted, named = _matching(globs_of(settings.include, "include"), prefixes, "include")
    if settings.exclude is not None:
        excluded, _ = _matching(globs_of(settings.exclude, "exclude"), prefixes, "exclude")
        wanted -= excluded
        why = "excluded" if settings.include is None else "excluded, or not in include"
    for glob in settings.overrides or {}:
        _matching([glob], prefixes, "overrides")
    for name in wanted:
        settings.for_layer(name)[0].check_target()
    conventions = Conventions(model)
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    errors: list[LobsError] = []
    for layer in known:
        reason = "" if layer.name in wanted else why
        if not reason and layer.name not in named:
            reason = conventions.of(layer.name, layer.prefix, layer.rows)
        if reason:
            skipped.append(Skipped(layer.name, reason, weights_of(layer), on_purpose=True))
            continue
        if any(isinstance(p, UninitializedParameter) for p in layer.parameters.values()):
            layer.check_weight()  # raises: running the model would give it a shape
        try:
            for name, parameter in layer.parameters.items():
                if parameter.is_meta and not hasattr(layer.module, "_hf_hook"):
                    checks.tensor(parameter, name)  # raises
            layer.check_weight()
        except (ArgumentError, DtypeError) as error:
            if settings.strict or layer.name in named:
                raise
            skipped.append(Skipped(layer.name, reason_of(layer, error), weights_of(layer)))
            errors.append(error)
            continue
        if conventions.under_adapter(layer.prefix):
            layer.notes.append(
                "an adapter is added to its output; merging that would fill the zeros"
            )
        layers.append(layer)
    layers, tied = tie(model, layers, refuse=named)
    chosen = []
    for x in own:
        reason = "" if x.name in wanted else why
        rows = x.parameter.shape[0]
        if x.name not in named or conventions.of(x.name, x.prefix, rows) == TABLE:
            reason = reason or conventions.of(x.name, x.prefix, rows)
        if not reason and isinstance(x.module, torch.jit.ScriptModule):
            skipped.append(Skipped(x.name, _SCRIPTED, x.parameter.numel()))
            errors.append(ArgumentError(f"layer {x.name!r}: {_SCRIPTED}"))
            continue
        if reason and x.name in named:
            raise ArgumentError(f"include: {x.name!r} cannot be pruned: {reason}")
        if reason:
            skipped.append(Skipped(x.name, reason, x.parameter.numel(), on_purpose=True))
        else:
            chosen.append(x)
    skipped += tied
    if not layers and not chosen:
        raise errors[0] if errors else ArgumentError(nothing_left(skipped))
    return Candidates(layers, chosen, skipped, errors, named)


def _own(model: nn.Module, layers: Sequence[Layer]) -> list[Own]:
    """The parameters of two or more dimensions that belong to none of these layers."""
    taken = {id(p) for layer in layers for p in layer.parameters.values()}
    own = []
    for prefix, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if (
                parameter is None
                or id(parameter) in taken
                or isinstance(parameter, UninitializedParameter)
            ):
                continue
            taken.add(id(parameter))
            if parameter.ndim >= 2:
                full = f"{prefix}.{part}" if prefix else part
                name = prefix if part == "weight" and prefix else full
                own.append(Own(name, prefix, module, part, parameter))
    return own


def _matching(
    globs: Sequence[str], prefixes: Mapping[str, str], argument: str
) -> tuple[set[str], set[str]]:
    """The names that some glob matches, or whose module it matches; and those among them that a
    glob asks for by name, which does not end in a star."""
    matching, named = set[str](), set[str]()
    for glob in globs:
        hits = {n for n, p in prefixes.items() if fnmatchcase(n, glob) or fnmatchcase(p, glob)}
        if not hits:
            names = list(prefixes)
            some = ", ".join(repr(n) for n in names[:8]) + (", ..." if len(names) > 8 else "")
            raise ArgumentError(
                f"{argument}: {glob!r} matches no prunable layer; there are {some or 'none'}"
            )
        matching |= hits
        named |= hits if not glob.endswith("*") else set()
    return matching, named


def reason_of(layer: Layer, error: Exception) -> str:
    """The message of an error about a layer, without the layer's name."""
    return str(error).removeprefix(f"layer {layer.name!r}: ")


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
    model: nn.Module, layers: Sequence[Layer], refuse: Container[str] = ()
) -> tuple[list[Layer], list[Skipped]]:
    """Merge layers that use one weight in the same way. A weight that something else uses too, for
    example an embedding, must not change unnoticed: its layer is skipped, which is an error for the
    names in ``refuse``."""
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
            if layer.name in refuse:
                raise ArgumentError(
                    f"layer {layer.name!r}: {reason}. Leave it out, or give each its own copy"
                )
            skipped.append(Skipped(layer.name, reason, weights_of(layer), on_purpose=True))
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
