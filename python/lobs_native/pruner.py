"""Prune a network: find its layers, calibrate, prune each, and report. Orchestrates; computes
nothing."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native import bound, checks, ops
from lobs_native.calibration import Forward, Run, batches_of, calibrate, hooked, measure_change
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
)
from lobs_native.greedy import Greedy, cut_together
from lobs_native.hessian import Hessian
from lobs_native.layers import LAYERS, Layer, layer_for
from lobs_native.patterns import GroupsOf, Unstructured, check_fit, pattern_of
from lobs_native.problem import Problem, nearest_count
from lobs_native.report import ErrorBound, LayerReport, Report, Skipped
from lobs_native.weight import (
    METHODS,
    SCOPES,
    PrunedWeight,
    Target,
    check_choice,
    check_damping,
    check_refine,
    few_rows,
    prune_groups,
)

__all__ = ["prune"]

HESSIAN_BYTES = 4 << 30  # second moments that are accumulated in one pass over the data, at most


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
    def weights(self) -> int:
        """Weights of the layer that may be removed."""
        layer = self.layer
        return layer.groups * layer.rows * (layer.width + self.prune_bias)


_OVERRIDABLE = (
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


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    max_error: float | None = None,
    method: str = "exact",
    pattern: Any = "unstructured",
    scope: str = "layer",
    damping: float = 0.01,
    prune_bias: bool = False,
    refine: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    inputs: str = "pruned",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    backend: str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Report:
    """Prune the linear and convolution layers of a network in place, one after another, without
    retraining.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode for calibration (restored afterwards). Its weights and biases are changed
        in place, keeping dtype, device and zeros; on any error, and on Ctrl-C, all of them get
        their old values back.
    calibration : iterable of batches
        A batch is a tensor (``model(batch)``), a tuple or list (``model(*batch)``) or a dict
        (``model(**batch)``). No labels are needed; a few hundred to a few thousand samples are
        usual. An iterator that can be read only once is kept in memory, since the data is needed
        more than once.
    sparsity, threshold, max_error
        Exactly one, for every layer: see :func:`lobs_native.prune_weight`. With an N:M pattern,
        none.
    method, pattern, damping, prune_bias, refine, memory, backend
        As in :func:`lobs_native.prune_weight`.
    scope : "layer", "row" or "model"
        As in :func:`lobs_native.prune_weight`; "model" compares weights over all layers, by their
        exact cost relative to the layer's ``tr(W H W^T)`` on the original network's inputs, and
        removes the share ``sparsity`` of all of them. It needs method "exact", single weights, one
        more pass over the data, and the second moments of all layers in memory at once.
    include, exclude : glob or list of globs on module names
        Default: every nn.Linear and nn.Conv2d. A glob that matches no layer is an error.
    overrides : {glob: {argument: value}}
        Other arguments for some layers, for example ``{"classifier": {"sparsity": 0.3}}``; later
        ones win. A target (sparsity, threshold, max_error) or an N:M pattern replaces the target
        from before.
    inputs : "pruned" or "dense"
        Whether a layer is calibrated on what the already pruned network feeds it, or on the
        original network's activations (the paper, and Theorem 3.2 as printed; one pass over the
        data for all layers).
    forward : callable(model, batch), optional
        How to run the model on a batch when none of the above is right.
    device : optional
        Move the model (it stays there) and each batch to this device first.
    progress : bool
        Progress bars on a terminal.
    seed : int
        Set before every pass over the data, so that a stochastic forward repeats; the caller's
        generators are kept.

    Returns
    -------
    Report
        Each layer's incurred error, absolute and relative, the damping used, seconds, sparsity
        asked and reached; what was skipped and why; the bound of Theorem 3.2 where it holds, beside
        the measured output error; the masks.

    Raises
    ------
    ArgumentError, DtypeError, PatternError, BackendError
        An argument does not fit, nothing matches, a layer is tied or parametrized; nothing has been
        changed.
    NonFiniteError, NotPositiveDefiniteError
        With the layer's name; the model is as it was.

    Notes
    -----
    Source: Dong, Chen & Pan 2017.
    """
    begun = time.perf_counter()
    defaults: dict[str, Any] = {
        "sparsity": sparsity,
        "threshold": threshold,
        "max_error": max_error,
        "method": method,
        "pattern": pattern,
        "scope": scope,
        "damping": damping,
        "prune_bias": prune_bias,
        "refine": refine,
    }
    settings = {
        **{
            k: v if isinstance(v, (int, float, str, type(None))) else repr(v)
            for k, v in defaults.items()
        },
        "include": include,
        "exclude": exclude,
        "overrides": copy.deepcopy(overrides),
        "inputs": inputs,
        "device": None if device is None else str(device),
        "backend": backend,
        "memory": memory,
        "seed": seed,
        "threads": ops.threads(),
    }
    plans = _plan(model, defaults, include, exclude, overrides)
    memory = None if memory is None else checks.positive_int(memory, "memory")
    check_choice(inputs, "inputs", ("pruned", "dense"))
    if forward is not None and not callable(forward):
        raise DtypeError(f"forward: expected callable(model, batch), got {type(forward).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DtypeError(f"seed: expected an int, got {type(seed).__name__}")
    batches = batches_of(calibration)
    if device is not None:
        checks.zeros((1,), torch.float32, device, "device")  # refuses what cannot be used, by name
        model.to(device)
    for plan in plans:
        ops.select_backend(backend, plan.layer.weight().device)
    run = Run(model, batches, forward, device, seed, progress)
    originals = {
        name: parameter.detach().clone()
        for plan in plans
        for name, parameter in plan.layer.parameters.items()
    }
    try:
        with run.evaluating():
            order, skipped = _order(plans, run, explicit=include is not None)
            order = _allocate(order, run, memory, backend)
            done = _prune_layers(order, run, inputs, memory, backend)
            error_bound = _bound(model, run, order, done, originals, inputs)
    except BaseException:
        _restore(model, originals)
        raise
    layers = tuple(report for report, _ in done.values())
    removed = sum(int((~out.mask).sum()) for _, out in done.values())
    weights = sum(out.mask.numel() for _, out in done.values())
    return Report(
        layers=layers,
        skipped=tuple(skipped),
        error_bound=error_bound,
        sparsity=removed / weights,
        removed=removed,
        weights=weights,
        seconds=time.perf_counter() - begun,
        settings={**settings, "batches": len(batches)},
        versions=_versions(),
        masks={name: out.mask.reshape(report.shape) for name, (report, out) in done.items()},
    )


def _versions() -> dict[str, str]:
    from lobs_native import __version__

    return {
        "lobs_native": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# ---- what to prune -------------------------------------------------------------------------------


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


def _plan(
    model: Any,
    defaults: Mapping[str, Any],
    include: Any,
    exclude: Any,
    overrides: Any,
) -> list[Plan]:
    """The layers to prune with their settings, in module order; everything checked."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if overrides is not None and not (
        isinstance(overrides, Mapping)
        and all(isinstance(k, str) and isinstance(v, Mapping) for k, v in overrides.items())
    ):
        raise DtypeError(f"overrides: expected {{glob: {{argument: value}}}}, got {overrides!r}")
    modules = dict(model.named_modules())
    names = [
        name
        for name, module in modules.items()
        if any(isinstance(module, kind.module_type) for kind in LAYERS)
    ]
    wanted = set(names)
    if (globs := _globs(include, "include")) is not None:
        wanted = _matching(globs, names, "include")
    if (globs := _globs(exclude, "exclude")) is not None:
        wanted -= _matching(globs, names, "exclude")
    layers = []
    for name in names:
        if name in wanted:
            layer = layer_for(name, modules[name])
            if layer is None:
                raise ArgumentError(
                    f"layer {name!r}: {type(modules[name]).__name__} has a forward of its own, "
                    "so what its weight is used "
                    f"for is not known; exclude it"
                )
            layers.append(layer)
    if not layers:
        raise ArgumentError(
            "model: no layer is left to prune; nn.Linear and nn.Conv2d can be pruned (see "
            "include, exclude)"
        )
    _refuse_tied(model, layers)
    plans = []
    for glob in overrides or {}:
        _matching([glob], names, "overrides")
    for layer in layers:
        settings = dict(defaults)
        for glob, changes in (overrides or {}).items():
            if not fnmatchcase(layer.name, glob):
                continue
            unknown = set(changes) - set(_OVERRIDABLE)
            if unknown:
                raise ArgumentError(
                    f"overrides[{glob!r}]: {sorted(unknown)} unknown; known: "
                    f"{', '.join(_OVERRIDABLE)}"
                )
            grouped = "pattern" in changes and isinstance(pattern_of(changes["pattern"]), GroupsOf)
            if grouped or any(key in changes for key in _TARGETS):
                settings.update(dict.fromkeys(_TARGETS))
            settings.update(changes)
        plans.append(_plan_layer(layer, settings))
    return plans


def _plan_layer(layer: Layer, settings: Mapping[str, Any]) -> Plan:
    method = check_choice(settings["method"], "method", METHODS)
    pattern = pattern_of(settings["pattern"])
    target = Target.of(
        settings["sparsity"], settings["threshold"], settings["max_error"], method, pattern
    )
    scope = check_choice(settings["scope"], "scope", (*SCOPES, "model"))
    refine = check_refine(settings["refine"], pattern)
    if scope == "model" and not (
        method == "exact" and isinstance(pattern, Unstructured) and target.sparsity is not None
    ):
        raise ArgumentError(
            "scope: 'model' needs method 'exact', pattern 'unstructured' and a sparsity; use "
            "'layer'"
        )
    try:
        check_fit(pattern, layer.width, None, prune_bias=False)
    except PatternError as error:
        raise PatternError(f"layer {layer.name!r}: {error}") from error
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


def _refuse_tied(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Pruning a shared weight would change another layer behind its back: say so instead."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                key = parameter.untyped_storage().data_ptr()
                owners.setdefault(key, []).append((module, f"{prefix}.{part}" if prefix else part))
    for layer in layers:
        for name, parameter in layer.parameters.items():
            if parameter.device.type == "meta":
                continue
            sharing = owners.get(parameter.untyped_storage().data_ptr(), [])
            others = [other for module, other in sharing if module is not layer.module]
            if others:
                raise ArgumentError(
                    f"layer {layer.name!r}: {name} is tied to {', '.join(others)}; pruning it "
                    "would change both. "
                    f"Exclude it, or give each its own copy"
                )


def _order(plans: Sequence[Plan], run: Run, explicit: bool) -> tuple[list[Plan], list[Skipped]]:
    """The plans in the order in which the model calls their layers; those it never calls are
    skipped or refused."""
    called: dict[str, None] = {}
    with hooked([p.layer for p in plans], lambda layer, _: called.setdefault(layer.name)):
        for batch in run.each("order"):
            run.call(run.model, batch)
            if len(called) == len(plans):
                break
    by_name = {p.layer.name: p for p in plans}
    missing = [name for name in by_name if name not in called]
    if missing and (explicit or not called):
        raise ArgumentError(
            f"include: the model never calls {', '.join(map(repr, missing))} on the "
            "calibration data; leave it out"
        )
    skipped = [Skipped(name, "never called on the calibration data") for name in missing]
    if missing:
        warnings.warn(
            "lobs_native.prune: not pruned, because the model never calls them: "
            f"{', '.join(missing)}",
            stacklevel=3,
        )
    return [by_name[name] for name in called], skipped


# ---- one budget for several layers ---------------------------------------------------------------


def _allocate(
    order: Sequence[Plan], run: Run, memory: int | None, backend: str | None
) -> list[Plan]:
    """Plans with scope "model" get the sparsity that their common budget leaves them.

    Cut at that sparsity, a layer loses exactly the weights that the common cut takes from it.
    """
    together = [plan for plan in order if plan.scope == "model"]
    if not together:
        return list(order)
    moments = calibrate([p.layer for p in together], run, "calibrate all layers")
    parts, unit, budget = [], [], 0
    for plan in together:
        layer = plan.layer
        try:
            problem = Problem.of(
                layer.weight(),
                layer.bias(),
                [h.matrix() for h in moments.pop(layer.name)],
                damping=plan.damping,
                inverted=True,
                prune_bias=plan.prune_bias,
                mask=None,
                backend=ops.select_backend(backend, layer.weight().device),
                memory=memory,
            )
        except (NonFiniteError, NotPositiveDefiniteError) as error:
            raise type(error)(f"layer {layer.name!r}: {error}") from error
        greedy = Greedy(problem, plan.pattern)
        energy = problem.energy()
        parts.append(greedy)
        unit.append(greedy.unit_cost() / energy if energy > 0 else 1.0)
        assert plan.target.sparsity is not None
        budget += nearest_count(plan.target.sparsity, plan.weights)
    gone = cut_together(parts, unit, budget)
    changed = {}
    for plan, g in zip(together, gone, strict=True):
        target = Target(sparsity=int(g.sum()) / plan.weights)
        changed[plan.layer.name] = dataclasses.replace(plan, target=target)
    return [changed.get(plan.layer.name, plan) for plan in order]


# ---- the layers, one after another ---------------------------------------------------------------

_Done = dict[str, tuple[LayerReport, PrunedWeight]]


def _prune_layers(
    order: Sequence[Plan], run: Run, inputs: str, memory: int | None, backend: str | None
) -> _Done:
    done: _Done = {}
    bar = tqdm(
        total=len(order), desc="layers", unit="layer", disable=None if run.progress else True
    )
    with bar:
        pieces = _passes(order) if inputs == "dense" else [[plan] for plan in order]
        finished: list[tuple[Plan, PrunedWeight]] = []
        for piece in pieces:
            begun = time.perf_counter()
            names = piece[0].layer.name if len(piece) == 1 else f"{len(piece)} layers"
            moments = calibrate([p.layer for p in piece], run, f"calibrate {names}")
            calibrating = (time.perf_counter() - begun) / len(piece)
            for plan in piece:
                mine = moments.pop(plan.layer.name)
                report, out = _prune_layer(plan, mine, memory, backend, calibrating)
                done[plan.layer.name] = (report, out)
                if inputs == "pruned":
                    plan.layer.write_back(out.weight, out.bias)
                else:  # later passes must still see the original network
                    finished.append((plan, out))
                bar.update()
        for plan, out in finished:
            plan.layer.write_back(out.weight, out.bias)
    return done


def _passes(order: Sequence[Plan]) -> list[list[Plan]]:
    """Layers whose second moments fit together in HESSIAN_BYTES."""
    pieces: list[list[Plan]] = []
    held = 0
    for plan in order:
        size = plan.layer.groups * (plan.layer.width + 1) ** 2 * 8
        if not pieces or held + size > HESSIAN_BYTES:
            pieces.append([])
            held = 0
        pieces[-1].append(plan)
        held += size
    return pieces


def _prune_layer(
    plan: Plan,
    moments: Sequence[Hessian],
    memory: int | None,
    backend: str | None,
    calibrating: float,
) -> tuple[LayerReport, PrunedWeight]:
    layer = plan.layer
    rows = moments[0].rows
    notes = [few_rows(rows, layer.width)] if rows < layer.width else []
    try:
        out = prune_groups(
            layer.weight(),
            [h.matrix() for h in moments],
            target=plan.target,
            method=plan.method,
            pattern=plan.pattern,
            scope="layer" if plan.scope == "model" else plan.scope,
            bias=layer.bias(),
            prune_bias=plan.prune_bias,
            damping=plan.damping,
            refine=plan.refine,
            memory=memory,
            backend=backend,
            notes=notes,
        )
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    report = LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=tuple(next(iter(layer.parameters.values())).shape),
        method=plan.method,
        scope=plan.scope,
        asked=plan.asked,
        sparsity=out.sparsity,
        error=out.error,
        relative_error=out.relative_error,
        damping=out.damping,
        damping_asked=plan.damping,
        optimality=out.optimality,
        swaps=out.swaps,
        rows=rows,
        columns=layer.width,
        dead_columns=out.dead_columns,
        backend=out.backend,
        status=out.status,
        notes=out.notes,
        seconds_calibrating=calibrating,
        seconds_pruning=out.seconds,
    )
    return report, out


@torch.no_grad()
def _restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in originals.items():
        parameters[name].copy_(value)


# ---- the theorem ---------------------------------------------------------------------------------


def _bound(
    model: nn.Module,
    run: Run,
    order: Sequence[Plan],
    done: _Done,
    originals: Mapping[str, Tensor],
    inputs: str,
) -> ErrorBound:
    measured = measure_change(run, originals)
    root = None if measured is None else (measured[0] / measured[2]) ** 0.5
    norm = None if measured is None else (measured[1] / measured[2]) ** 0.5
    try:
        if run.forward is not None:
            raise bound.NotAChainError("the model is run by a function of yours (forward=)")
        if measured is None:
            raise bound.NotAChainError("the output is not one floating-point tensor")
        chain = bound.chain_of(model)
        strange = [plan.layer.name for plan in order if plan.layer.name not in chain]
        if strange:
            raise bound.NotAChainError(f"layer {strange[0]} is not part of the chain")
    except bound.NotAChainError as why:
        return ErrorBound(covered=False, reason=str(why), measured=root, output_norm=norm)
    modules = dict(model.named_modules())
    dense = inputs == "dense"
    weights = {}
    for name in chain:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weights[name] = (
            weight.detach()
            if dense
            else originals.get(f"{name}.weight" if name else "weight", weight.detach())
        )
    errors = {name: (report.error, report.rows) for name, (report, _) in done.items()}
    frobenius, spectral = bound.theorem_bound(chain, weights, errors, measured[2])
    rule = (
        "Theorem 3.2"
        if dense
        else "Theorem 3.2 for pruned inputs: norms of the original later layers"
    )
    return ErrorBound(True, rule, frobenius, spectral, root, norm)
