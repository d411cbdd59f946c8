"""Prune a network: find its layers, calibrate, prune each, and report. Orchestrates; computes
nothing."""

from __future__ import annotations

import contextlib
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
from lobs_native.blocks import Stack, find_stacks, readers
from lobs_native.calibration import (
    Forward,
    Moments,
    Run,
    Source,
    batches_of,
    calibrate,
    hooked,
    measure_change,
)
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
)
from lobs_native.greedy import Greedy, cut_together
from lobs_native.layers import Layer, Linear, layers_of
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
    prune_groups,
)

__all__ = ["INPUTS", "OVERRIDABLE", "plan_layers", "prune"]

INPUTS = ("pruned", "dense", "corrected")

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
    spread: float = 0.1,
    damping: float = 0.01,
    prune_bias: bool = False,
    refine: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    inputs: str = "pruned",
    blocks: str | None = "auto",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    backend: str | None = None,
    progress: bool = True,
    seed: int = 0,
    token_mask: str | None = "auto",
) -> Report:
    """Prune the linear and convolution layers, attention and experts of a network in place, one
    after another, without retraining.

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
    method, pattern, damping, prune_bias, refine, backend
        As in :func:`lobs_native.prune_weight`.
    scope : "layer", "row" or "model"
        As in :func:`lobs_native.prune_weight`; "model" compares weights over all layers, by their
        exact cost over the square root of the layer's ``tr(W H W^T)`` on the original network's
        inputs, and removes the share ``sparsity`` of all of them. It needs method "exact", single
        weights, one more pass over the data, and the second moments of all layers in memory at
        once.
    spread : float
        With scope "model", how far a layer's sparsity may be from the one asked for; 1 sets no
        bound. What a layer's error means to the network is not known, so without a bound the result
        can be worse than with scope "layer": on a sentence encoder at half, the mean cosine of its
        embeddings with the original ones is 0.962 with this bound, 0.938 without one, and 0.958
        with scope "layer" (``python bench/budget.py``).
    include, exclude : glob or list of globs on module names
        Default: every layer of a known type: nn.Linear, nn.Conv1d to 3d and their transposes,
        nn.MultiheadAttention (``<name>.q_proj``, ``k_proj``, ``v_proj``, ``out_proj``), Conv1D and
        experts as transformers stores them (``<name>.gate_up_proj``, ``down_proj``), and those of
        :func:`lobs_native.register_layer`. A glob that matches no layer is an error.
    overrides : {glob: {argument: value}}
        Other arguments for some layers, for example ``{"classifier": {"sparsity": 0.3}}``; later
        ones win. A target (sparsity, threshold, max_error) or an N:M pattern replaces the target
        from before.
    inputs : "pruned" or "dense"
        Whether a layer is calibrated on what the already pruned network feeds it, or on the
        original network's activations (the paper, and Theorem 3.2 as printed; one pass over the
        data for all layers).
    blocks : "auto" or None
        With inputs "pruned", run a stack of blocks (a transformer's) block by block on what each
        receives, instead of the whole model for every layer; the results are the same. "auto" does
        so where modules of a list are called one after another on what the one before returned, and
        a replay of the first batch gives what the model gives; ``report.settings`` says which
        ("blocks") and why others are not ("no blocks").
    forward : callable(model, batch), optional
        How to run the model on a batch when none of the above is right.
    memory : int, optional
        Bytes. The scratch of "exact" keeps to it as in :func:`lobs_native.prune_weight`; second
        moments that would take more than half of it together are accumulated in several passes
        (inputs "dense"), and hidden states beyond a quarter of it go to a temporary folder on disk
        (blocks).
    device : optional
        Move the model (it stays there) and each batch to this device first.
    progress : bool
        Progress bars on a terminal.
    seed : int
        Set before every pass over the data, so that a stochastic forward repeats; the caller's
        generators are kept.
    token_mask : "auto" or None
        With batches that are mappings and hold an ``attention_mask`` (B, T) of zeros and ones,
        "auto" leaves the rows at zeros out wherever a linear layer's input is (B, T, C); each
        layer's notes say how many, or that it could not. Not for encoder-decoder models, where
        it would not be known whose mask it is. None counts padding like everything else.

    Returns
    -------
    Report
        Each layer's incurred error, absolute and relative, the damping used, seconds, sparsity
        asked and reached; what was skipped and why; the bound of Theorem 3.2 where it holds, beside
        the measured output error; the masks.

    Raises
    ------
    ArgumentError, DtypeError, PatternError, BackendError
        An argument does not fit, nothing matches, or a layer cannot be pruned rightly: it has a
        forward of its own, its weight is computed, offloaded, or used in ways that are not seen;
        nothing has been changed.
    NonFiniteError, NotPositiveDefiniteError
        With the layer's name; the model is as it was.

    Notes
    -----
    A weight that several layers use is pruned once, for the inputs of all of them, when the first
    is reached; their biases are updated only if they are one as well. One that something else uses
    too (an embedding, an excluded layer) is skipped, or refused if ``include`` asks for it. N:M
    patterns of a convolution group neighbouring input channels at one kernel position. Experts are
    measured each on the rows that it was sent, and count the same; one that saw none is pruned by
    magnitude, and its notes say so, as they do where there were fewer rows than columns. Source:
    Dong, Chen & Pan 2017.
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
        "spread": spread,
        "inputs": inputs,
        "blocks": blocks,
        "device": None if device is None else str(device),
        "backend": backend,
        "memory": memory,
        "seed": seed,
        "token_mask": token_mask,
        "threads": ops.threads(),
    }
    plans, tied = plan_layers(model, defaults, include, exclude, overrides)
    memory = None if memory is None else checks.positive_int(memory, "memory")
    check_choice(inputs, "inputs", INPUTS)
    spread = checks.real(spread, "spread")
    if not 0 <= spread <= 1:
        raise ArgumentError(f"spread: {spread:g}; it is a difference of sparsities, from 0 to 1")
    if blocks is not None:
        check_choice(blocks, "blocks", ("auto",))
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
    if token_mask is not None:
        check_choice(token_mask, "token_mask", ("auto",))
    run = Run(model, batches, forward, device, seed, progress, token_mask == "auto")
    originals = {
        name: parameter.detach().clone()
        for plan in plans
        for name, parameter in plan.layer.parameters.items()
    }
    try:
        with run.evaluating():
            order, uncalled = _order(plans, run, explicit=include is not None)
            order = _allocate(order, run, spread, memory, backend)
            done, calibrated = _prune_layers(order, run, inputs, memory, backend, blocks)
            error_bound = _bound(model, run, order, done, originals, inputs)
    except BaseException:
        _restore(model, originals)
        raise
    layers = tuple(report for report, _ in done.values())
    removed = sum(int((~out.mask).sum()) for _, out in done.values())
    weights = sum(out.mask.numel() for _, out in done.values())
    return Report(
        layers=layers,
        skipped=(*tied, *uncalled),
        error_bound=error_bound,
        sparsity=removed / weights,
        removed=removed,
        weights=weights,
        seconds=time.perf_counter() - begun,
        settings={**settings, "batches": len(batches), **calibrated},
        versions=_versions(),
        masks={p.layer.name: p.layer.unpack(done[p.layer.name][1].mask) for p in order},
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
    layers, skipped = _tie(model, layers, explicit=include is not None)
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
            if not fnmatchcase(layer.name, glob):
                continue
            unknown = set(changes) - set(OVERRIDABLE)
            if unknown:
                raise ArgumentError(
                    f"overrides[{glob!r}]: {sorted(unknown)} unknown; known: "
                    f"{', '.join(OVERRIDABLE)}"
                )
            grouped = "pattern" in changes and isinstance(pattern_of(changes["pattern"]), GroupsOf)
            if grouped or any(key in changes for key in _TARGETS):
                settings.update(dict.fromkeys(_TARGETS))
            settings.update(changes)
        plans.append(_plan_layer(layer, settings))
    return plans, skipped


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
        check_fit(pattern, layer.neighbours, None, prune_bias=False)
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


def _tie(
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


def _order(plans: Sequence[Plan], run: Run, explicit: bool) -> tuple[list[Plan], list[Skipped]]:
    """The plans in the order in which the model calls their layers; those it never calls are
    skipped or refused."""
    called: dict[str, None] = {}
    with hooked([p.layer for p in plans], lambda layer, *_: called.setdefault(layer.name)):
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
    order: Sequence[Plan], run: Run, spread: float, memory: int | None, backend: str | None
) -> list[Plan]:
    """Plans with scope "model" get the sparsity that their common budget leaves them, at most
    ``spread`` away from what was asked for.

    Cut at that sparsity, a layer loses exactly the weights that the common cut takes from it.
    """
    together = [plan for plan in order if plan.scope == "model"]
    if not together:
        return list(order)
    moments = calibrate([p.layer for p in together], run, "calibrate all layers")
    parts, unit, asked = [], [], []
    for plan in together:
        layer = plan.layer
        try:
            problem = Problem.of(
                layer.weight(),
                layer.bias(),
                moments.pop(layer.name).matrices(),
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
        unit.append(greedy.unit_cost() / energy**0.5 if energy > 0 else 1.0)
        assert plan.target.sparsity is not None
        asked.append(plan.target.sparsity)
    sizes = [plan.weights for plan in together]
    changed = {}
    for plan, count in zip(together, _shares(parts, unit, asked, sizes, spread), strict=True):
        target = Target(sparsity=count / plan.weights)
        changed[plan.layer.name] = dataclasses.replace(plan, target=target)
    return [changed.get(plan.layer.name, plan) for plan in order]


def _shares(
    parts: Sequence[Greedy],
    unit: Sequence[float],
    asked: Sequence[float],
    sizes: Sequence[int],
    spread: float,
) -> list[int]:
    """How many weights each part loses: its share of a common cut, within ``spread`` of what was
    asked of it.

    Costs rise along a part's order, so the best shares within bounds come from cutting again
    without those that the side of the larger excess holds at their bounds.
    """
    total = sum(nearest_count(s, n) for s, n in zip(asked, sizes, strict=True))
    least = [nearest_count(max(0.0, s - spread), n) for s, n in zip(asked, sizes, strict=True)]
    most = [nearest_count(min(1.0, s + spread), n) for s, n in zip(asked, sizes, strict=True)]
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(parts)) if i not in fixed]
        left = total - sum(fixed.values())
        gone = cut_together([parts[i] for i in free], [unit[i] for i in free], left) if free else []
        counts = {i: int(g.sum()) for i, g in zip(free, gone, strict=True)}
        over = {i: most[i] for i, count in counts.items() if count > most[i]}
        under = {i: least[i] for i, count in counts.items() if count < least[i]}
        if not over and not under:
            counts |= fixed
            return [counts[i] for i in range(len(parts))]
        surplus = sum(counts[i] - most[i] for i in over)
        fixed |= over if surplus >= sum(least[i] - counts[i] for i in under) else under


# ---- the layers, one after another ---------------------------------------------------------------

_Done = dict[str, tuple[LayerReport, PrunedWeight]]


def _prune_layers(
    order: Sequence[Plan],
    run: Run,
    inputs: str,
    memory: int | None,
    backend: str | None,
    blocks: str | None,
) -> tuple[_Done, dict[str, Any]]:
    """Prune every layer. The results by name, and how the calibration went about it."""
    done: _Done = {}
    bar = tqdm(
        total=len(order), desc="layers", unit="layer", disable=None if run.progress else True
    )

    def prune_these(
        plans: Sequence[Plan], moments: Mapping[str, Moments], calibrating: float
    ) -> None:
        for plan in plans:
            mine = moments[plan.layer.name if len(moments) > 1 else next(iter(moments))]
            each = calibrating / len(plans)
            done[plan.layer.name] = _prune_layer(plan, mine, memory, backend, each)
            bar.update()

    def write(plans: Sequence[Plan]) -> None:
        for plan in plans:
            out = done[plan.layer.name][1]
            run.originals |= {n: p.detach().clone() for n, p in plan.layer.parameters.items()}
            plan.layer.write_back(out.weight, out.bias)

    with bar:
        if inputs == "dense":  # every pass must see the original network
            for piece in _passes(order, memory):
                begun = time.perf_counter()
                layers = [p.layer for p in piece]
                moments = calibrate(layers, run, f"calibrate {len(layers)} layers")
                prune_these(piece, moments, time.perf_counter() - begun)
            write(order)
            return done, {}
        modules = {plan.layer.name: plan.layer.caller for plan in order}
        stacks, reasons = find_stacks(run, modules) if blocks == "auto" else ([], [])
        stacks = [s for s in stacks if _contiguous(s, order) and _closed(s, order, run.model)]
        shared, once = readers(run, modules)
        for stack, plans in _segments(order, stacks):
            with contextlib.ExitStack() as scope:
                replay = None
                if stack is not None:
                    limit = None if memory is None else memory // 4
                    replay = scope.enter_context(
                        stack.replay(run, limit, corrected=inputs == "corrected")
                    )
                source: Source = run if replay is None else replay
                for group in _together(plans, shared, stack):
                    leader = group[0].layer
                    if stack is not None and replay is not None:
                        while replay.block < (stack.block_of(leader.name) or 0):
                            replay.advance()
                    early = leader.name in once and len(leader.sites) == 1
                    begun = time.perf_counter()
                    moments = calibrate(
                        [leader],
                        source,
                        f"calibrate {leader.name}",
                        until=leader.caller if early else None,
                        corrected={leader.name: [p.layer for p in group]}
                        if inputs == "corrected"
                        else None,
                    )
                    prune_these(group, moments, time.perf_counter() - begun)
                    write(group)
                if replay is not None:
                    replay.finish()
    return done, {"blocks": [stack.name for stack in stacks], "no blocks": reasons}


def _contiguous(stack: Stack, order: Sequence[Plan]) -> bool:
    """Whether its layers come one after another, block after block."""
    inside = [plan.layer.name in stack for plan in order]
    first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
    numbers = [stack.block_of(plan.layer.name) or 0 for plan in order[first : last + 1]]
    return all(inside[first : last + 1]) and numbers == sorted(numbers)


def _closed(stack: Stack, order: Sequence[Plan], model: nn.Module) -> bool:
    """Whether every weight of its layers is used in one block only."""
    block = {
        site.module: stack.block_of(plan.layer.name)
        for plan in order
        for site in plan.layer.sites
        if plan.layer.name in stack
    }
    names = model.named_modules(remove_duplicate=False)
    return all(stack.block_of(name) == block[m] for name, m in names if m in block)


def _segments(
    order: Sequence[Plan], stacks: Sequence[Stack]
) -> list[tuple[Stack | None, list[Plan]]]:
    """The plans in order, cut into those of one stack and those outside."""
    out: list[tuple[Stack | None, list[Plan]]] = []
    for plan in order:
        stack = next((s for s in stacks if plan.layer.name in s), None)
        if out and out[-1][0] is stack:
            out[-1][1].append(plan)
        else:
            out.append((stack, [plan]))
    return out


def _together(
    plans: Sequence[Plan], shared: Sequence[Sequence[str]], stack: Stack | None
) -> list[list[Plan]]:
    """Neighbours that read the same tensor in the same way need one second moment."""

    def reads(plan: Plan) -> tuple[Any, ...]:
        layer = plan.layer
        place = next((i for i, names in enumerate(shared) if layer.name in names), -1)
        block = None if stack is None else stack.block_of(layer.name)
        return place, block, layer.width, layer.bias() is not None

    groups: list[list[Plan]] = []
    for plan in plans:
        alike = groups and all(isinstance(p.layer, Linear) for p in (plan, groups[-1][0]))
        if alike and reads(plan) == reads(groups[-1][0]) and reads(plan)[0] >= 0:
            groups[-1].append(plan)
        else:
            groups.append([plan])
    return groups


def _passes(order: Sequence[Plan], memory: int | None) -> list[list[Plan]]:
    """Layers whose second moments fit together in HESSIAN_BYTES, or in half of ``memory``."""
    most = HESSIAN_BYTES if memory is None else min(HESSIAN_BYTES, memory // 2)
    pieces: list[list[Plan]] = []
    held = 0
    for plan in order:
        size = plan.layer.groups * (plan.layer.width + 1) ** 2 * 8
        if not pieces or held + size > most:
            pieces.append([])
            held = 0
        pieces[-1].append(plan)
        held += size
    return pieces


def _prune_layer(
    plan: Plan,
    moments: Moments,
    memory: int | None,
    backend: str | None,
    calibrating: float,
) -> tuple[LayerReport, PrunedWeight]:
    layer = plan.layer
    notes = [*layer.notes, *moments.notes(layer)]
    drift, mask = moments.drift(layer), None
    if drift is not None and bool((zeros := layer.weight() == 0).any()):
        if _within(zeros, plan):
            mask = ~zeros
        else:
            drift = None
            notes.append(
                "not corrected, only calibrated on pruned inputs: its weights have zeros already, "
                "which would be filled"
            )
    try:
        out = prune_groups(
            layer.weight(),
            moments.matrices(),
            target=plan.target,
            method=plan.method,
            pattern=plan.pattern,
            scope="layer" if plan.scope == "model" else plan.scope,
            bias=layer.bias(),
            prune_bias=plan.prune_bias,
            damping=plan.damping,
            refine=plan.refine,
            mask=mask,
            memory=memory,
            backend=backend,
            notes=notes,
            drift=drift,
        )
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    report = LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
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
        rows=moments.rows,
        columns=layer.width,
        dead_columns=out.dead_columns,
        backend=out.backend,
        status=out.status,
        notes=out.notes,
        seconds_calibrating=calibrating,
        seconds_pruning=out.seconds,
        inherited=None if drift is None else drift.inherited,
    )
    return report, out


def _within(zeros: Tensor, plan: Plan) -> bool:
    """Whether what is asked for removes all of these weights (G, R, C) and no pattern is against
    it."""
    share = plan.target.sparsity
    if share is None or not isinstance(plan.pattern, Unstructured):
        return False
    if plan.scope == "row":
        return int(zeros.sum(2).max()) <= nearest_count(share, zeros.shape[2])
    return int(zeros.sum()) <= nearest_count(share, plan.weights)


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
    measured = measure_change(run)
    root = None if measured is None else (measured[0] / measured[2]) ** 0.5
    norm = None if measured is None else (measured[1] / measured[2]) ** 0.5
    try:
        if run.forward is not None:
            raise bound.NotAChainError("the model is run by a function of yours (forward=)")
        if run.padded:
            raise bound.NotAChainError("padding was left out, of which the output also has rows")
        if measured is None:
            raise bound.NotAChainError("the output is not one floating-point tensor")
        chain = bound.chain_of(model)
        strange = [plan.layer.name for plan in order if plan.layer.name not in chain]
        if strange:
            raise bound.NotAChainError(f"layer {strange[0]} is not part of the chain")
        last = max(done, key=chain.index)
        if inputs == "corrected" and done[last][0].inherited is None:
            raise bound.NotAChainError(f"layer {last}, the last one pruned, was not corrected")
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
    rule = "Theorem 3.2"
    if inputs == "pruned":
        rule = "Theorem 3.2 for pruned inputs: norms of the original later layers"
    elif inputs == "corrected":  # its error has those of all layers before it in it
        errors = {last: errors[last]}
        rule = f"the measured error of {last}, times the norms of the layers after it"
    frobenius, spectral = bound.theorem_bound(chain, weights, errors, measured[2])
    return ErrorBound(True, rule, frobenius, spectral, root, norm)
