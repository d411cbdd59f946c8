"""Which layers of a network are pruned, and how each: everything resolved and checked before
anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lobs_native import checks
from lobs_native.checks import check_choice
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.layers import Layer, layers_of
from lobs_native.report.records import Skipped
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.patterns import GroupsOf, Unstructured, pattern_of
from lobs_native.solvers.settings import METHODS, SCOPES, Target, check_damping, check_refine

__all__ = ["OVERRIDABLE", "Plan", "overridden", "plan_layer", "plan_layers", "tie"]


@dataclass(frozen=True)
class Plan:
    """How one layer is to be pruned, all defaults and overrides resolved and checked."""

    layer: Layer
    target: Target
    method: str
    pattern: Any
    scope: str
    damping: float
    prune_bias: bool
    refine: str | None

    @property
    def asked(self) -> str:
        """The target as people write it."""
        return next(f"{k} {v:g}" for k, v in vars(self.target).items() if v is not None)

    @property
    def columns(self) -> int:
        """Of the second moment: inputs, and the column of ones."""
        return self.layer.width + (self.layer.bias() is not None)

    @property
    def moment_bytes(self) -> int:
        """What the second moments of its groups take."""
        return self.layer.groups * self.columns**2 * 8

    @property
    def weights(self) -> int:
        """Weights of the layer that may be removed."""
        layer = self.layer
        return layer.groups * layer.rows * (layer.width + self.prune_bias)


OVERRIDABLE = (
    "sparsity",
    "threshold",
    "max_error",
    "method",
    "pattern",
    "scope",
    "damping",
    "prune_bias",
    "refine",
)
_TARGETS = ("sparsity", "threshold", "max_error")


def _globs(value: Any, name: str) -> list[str] | None:
    if value is None:
        return None
    globs = (
        [value]
        if isinstance(value, str)
        else list(value)
        if isinstance(value, (list, tuple, set))
        else None
    )
    if globs is None or not all(isinstance(g, str) for g in globs):
        raise DtypeError(
            f"{name}: expected a glob or a list of globs on module names, got {value!r}"
        )
    return globs


def _matching(globs: Sequence[str], names: Sequence[str], argument: str) -> set[str]:
    found: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatchcase(name, glob)}
        if not hits:
            some = ", ".join(repr(n) for n in names[:8]) + (", ..." if len(names) > 8 else "")
            raise ArgumentError(
                f"{argument}: {glob!r} matches no prunable layer; there are {some or 'none'}"
            )
        found |= hits
    return found


def plan_layers(
    model: Any,
    defaults: Mapping[str, Any],
    include: Any,
    exclude: Any,
    overrides: Any,
) -> tuple[list[Plan], list[Skipped]]:
    """The layers to prune with their settings, in module order, everything checked; and those that
    cannot be pruned."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if overrides is not None and not (
        isinstance(overrides, Mapping)
        and all(isinstance(k, str) and isinstance(v, Mapping) for k, v in overrides.items())
    ):
        raise DtypeError(f"overrides: expected {{glob: {{argument: value}}}}, got {overrides!r}")
    found = layers_of(model)
    names = [layer.name for layer in found]
    wanted = set(names)
    if (globs := _globs(include, "include")) is not None:
        wanted = _matching(globs, names, "include")
    if (globs := _globs(exclude, "exclude")) is not None:
        wanted -= _matching(globs, names, "exclude")
    layers = [layer for layer in found if layer.name in wanted]
    for layer in layers:
        layer.check()
    layers, skipped = tie(model, layers, explicit=include is not None)
    if not layers:
        raise ArgumentError(
            "model: no layer is left to prune (see include, exclude); linear and convolution "
            "layers, attention and experts can be pruned"
            + "".join(f"; {s.name!r} cannot: {s.reason}" for s in skipped)
        )
    plans = []
    for glob in overrides or {}:
        _matching([glob], names, "overrides")
    for layer in layers:
        settings = dict(defaults)
        for glob, changes in (overrides or {}).items():
            if fnmatchcase(layer.name, glob):
                settings = overridden(settings, changes, glob)
        plans.append(plan_layer(layer, settings))
    return plans, skipped


def overridden(
    settings: Mapping[str, Any], changes: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Settings with the changes of ``overrides[where]``. A target, or a pattern that says it
    itself, takes the place of whatever target there was."""
    unknown = set(changes) - set(OVERRIDABLE)
    if unknown:
        raise ArgumentError(
            f"overrides[{where!r}]: {sorted(unknown)} unknown; known: {', '.join(OVERRIDABLE)}"
        )
    made = dict(settings)
    grouped = "pattern" in changes and isinstance(pattern_of(changes["pattern"]), GroupsOf)
    if grouped or any(key in changes for key in _TARGETS):
        made.update(dict.fromkeys(_TARGETS))
    made.update(changes)
    return made


def plan_layer(layer: Layer, settings: Mapping[str, Any]) -> Plan:
    """How one layer is to be pruned; ``settings`` has a value for each of OVERRIDABLE. Errors name
    the setting, or the layer that does not fit."""
    method = check_choice(settings["method"], "method", METHODS)
    pattern = pattern_of(settings["pattern"])
    target = Target.of(
        settings["sparsity"], settings["threshold"], settings["max_error"], method, pattern
    )
    scope = check_choice(settings["scope"], "scope", (*SCOPES, "model"))
    refine = check_refine(settings["refine"], pattern)
    if scope == "model" and not (
        TABLE[method].compares_layers
        and isinstance(pattern, Unstructured)
        and target.sparsity is not None
    ):
        raise ArgumentError(
            "scope: 'model' needs method 'exact', pattern 'unstructured' and a sparsity; use "
            "'layer'"
        )
    try:
        pattern.check_fit(layer.neighbours, None, prune_bias=False)
    except PatternError as error:
        where = "" if layer.neighbours == layer.width else " (input channels at a kernel position)"
        raise PatternError(f"layer {layer.name!r}: {error}{where}") from error
    prune_bias = checks.flag(settings["prune_bias"], "prune_bias")
    for name, parameter in layer.parameters.items():
        value = checks.tensor(parameter, name)
        if value.numel() == 0:
            raise ArgumentError(
                f"layer {layer.name!r}: {name} has shape {tuple(value.shape)} and is empty; "
                "exclude it"
            )
        checks.check_finite(value, name)
    return Plan(
        layer,
        target,
        method,
        pattern,
        scope,
        check_damping(settings["damping"]),
        prune_bias and layer.bias() is not None,
        refine,
    )


def tie(
    model: nn.Module, layers: Sequence[Layer], explicit: bool
) -> tuple[list[Layer], list[Skipped]]:
    """Layers that use one weight in the same way become one. A weight that something else uses
    too, an embedding for example, would change behind its back: it is skipped, or refused where it
    was asked for."""
    sharing = _overlapping(model)
    by_module = {layer.module: layer for layer in layers if not layer.watched}
    kept: list[Layer] = []
    skipped: list[Skipped] = []
    done: set[str] = set()
    for layer in layers:
        if layer.name in done:
            continue
        own = set(layer.module.modules())
        partners: dict[str, Layer] = {}
        strange: dict[str, str] = {}
        for name, parameter in layer.parameters.items():
            for module, other in sharing.get(id(parameter), ()):
                if module in own:
                    continue
                partner = by_module.get(module)
                if partner is not None and layer.can_share(partner):
                    partners[partner.name] = partner
                else:
                    strange[other] = name
        if strange:
            reason = (
                f"{next(iter(strange.values()))} is tied to {', '.join(strange)}, which is not "
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
            done.add(partner.name)
        kept.append(layer)
    return kept, skipped


def _overlapping(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter -> all (module, full name) that hold it, or one that lies in the same
    memory."""
    spans = []
    for prefix, module in model.named_modules():
        for part, p in module._parameters.items():
            if p is not None and not p.is_meta and p.numel():
                start = p.data_ptr()
                reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
                end = start + (reach + 1) * p.element_size()
                spans.append((start, end, p, module, f"{prefix}.{part}" if prefix else part))
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    cluster: list[tuple[nn.Module, str]] = []
    reached = 0
    for start, end, parameter, module, name in sorted(spans, key=lambda span: span[:2]):
        if start >= reached:
            cluster = []
        reached = max(reached, end)
        cluster.append((module, name))
        found[id(parameter)] = cluster
    return found
