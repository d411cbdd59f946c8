"""The layers one after another: calibrate, prune, keep, write back. In order, on what the pruned
layers before them give; or all on the original network's activations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from tqdm.auto import tqdm

from lobs_native.calibration.blocks import Stack
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.partial import passed_before
from lobs_native.calibration.replay import Replay
from lobs_native.calibration.run import Run, Source
from lobs_native.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import Layer
from lobs_native.network.allocation import passes
from lobs_native.network.peak import LayerPeak
from lobs_native.network.resources import RunPlan
from lobs_native.network.selection import Plan
from lobs_native.network.structure import Structure
from lobs_native.report.records import LayerReport
from lobs_native.rundir.ledger import Ledger
from lobs_native.solvers.patterns import Pattern, Unstructured
from lobs_native.solvers.problem import nearest_count
from lobs_native.solvers.weight import PrunedWeight, prune_groups

__all__ = ["LayerLoop", "Means", "layer_report", "prune_layer"]


@dataclass(frozen=True)
class Means:
    """What the layers are pruned with."""

    plan: RunPlan
    backend: str | None
    sensitivity: Mapping[str, Tensor]
    ledger: Ledger | None


_New = tuple[Tensor, "Tensor | None"]  # weight (G, R, C) and bias (G, R)


class LayerLoop:
    """One network's layers.

    Attributes
    ----------
    done : {name: LayerReport}
    masks : {name: (G, R, C) bool}
    """

    def __init__(self, run: Run, inputs: str, structure: Structure, means: Means) -> None:
        self.run = run
        self.inputs = inputs
        self.structure = structure
        self.means = means
        self.ledger = means.ledger
        self.states = None if means.ledger is None else means.ledger.states
        self.done: dict[str, LayerReport] = {}
        self.masks: dict[str, Tensor] = {}

    def carry_out(self) -> None:
        """Prune them all, in the model."""
        total = sum(len(group) for _, groups in self.structure.parts for group in groups)
        off = None if self.run.progress else True
        self.bar = tqdm(total=total, desc="layers", unit="layer", disable=off)
        with self.bar:
            if self.inputs == "dense":
                ((_, (order,)),) = self.structure.parts
                self._on_original_inputs(order)
            else:
                for stack, groups in self.structure.parts:
                    self._in_order(stack, groups)

    # ---- one layer -------------------------------------------------------------------------------

    def _kept(self, plan: Plan) -> bool:
        return self.ledger is not None and plan.layer in self.ledger

    def _prune(self, plan: Plan, moments: Moments, calibrating: float) -> _New:
        report, out = prune_layer(
            plan,
            moments,
            calibrating=calibrating,
            importance=self.means.sensitivity.get(plan.layer.name),
            memory=self.means.plan.scratch,
            backend=self.means.backend,
        )
        if self.ledger is not None:
            self.ledger.keep(plan.layer, report, out.weight, out.bias, out.mask)
        self.done[plan.layer.name], self.masks[plan.layer.name] = report, out.mask
        self.bar.update()
        return out.weight, out.bias

    def _load(self, plan: Plan) -> _New:
        assert self.ledger is not None
        name = plan.layer.name
        self.done[name], weight, bias, self.masks[name] = self.ledger.load(plan.layer)
        self.bar.update()
        return weight, bias

    def _write(self, plan: Plan, weight: Tensor, bias: Tensor | None) -> None:
        self.run.changed.update(plan.layer.parameters)
        plan.layer.write_back(weight, bias)

    # ---- all layers ------------------------------------------------------------------------------

    def _on_original_inputs(self, order: Sequence[Plan]) -> None:
        """Every pass must see the original network, so new weights wait until the last one."""
        with Shelf(self.means.plan.kept_limit) as waiting:

            def wait(plan: Plan, weight: Tensor, bias: Tensor | None) -> None:
                waiting.put((plan.layer.name, "weight"), weight)
                if bias is not None:
                    waiting.put((plan.layer.name, "bias"), bias)

            for plan in filter(self._kept, order):
                wait(plan, *self._load(plan))
            rest = [plan for plan in order if plan.layer.name not in self.done]
            begun_with = passed_before(self.states, "calibrate")
            for piece in passes(rest, self.means.plan.statistics_limit, begun_with):
                begun = time.perf_counter()
                layers = [plan.layer for plan in piece]
                what = f"calibrate {len(layers)} layers"
                moments = calibrate(layers, self.run, what, states=self.states)
                calibrating = (time.perf_counter() - begun) / len(piece)
                for plan in piece:
                    wait(plan, *self._prune(plan, moments.pop(plan.layer.name), calibrating))
            for plan in order:
                name = plan.layer.name
                self._write(plan, waiting[name, "weight"], waiting.get((name, "bias")))
        self.done = {plan.layer.name: self.done[plan.layer.name] for plan in order}

    def _in_order(self, stack: Stack | None, groups: Sequence[Sequence[Plan]]) -> None:
        """A part of the network, in a stack block by block; layers of a group read one tensor."""
        with contextlib.ExitStack() as scope:
            replay, source = None, cast(Source, self.run)
            if stack is not None and not all(self._kept(p) for group in groups for p in group):
                limit = self.means.plan.states_limit
                corrected = self.inputs == "corrected"
                replay = Replay(stack, self.run, limit, corrected, self.states)
                source = scope.enter_context(replay)
            for group in groups:
                if all(map(self._kept, group)):
                    for plan in group:
                        self._write(plan, *self._load(plan))
                    continue
                if stack is not None and replay is not None:
                    while replay.block < (stack.block_of(group[0].layer.name) or 0):
                        replay.advance()
                self._group(group, source)
            if replay is not None:
                replay.finish()

    def _group(self, group: Sequence[Plan], source: Source) -> None:
        """Calibrate layers that read one tensor together, and prune each."""
        leader = group[0].layer
        early = leader.name in self.structure.once and len(leader.sites) == 1
        readers = {leader.name: [plan.layer for plan in group]}
        begun = time.perf_counter()
        (moments,) = calibrate(
            [leader],
            source,
            f"calibrate {leader.name}",
            until=leader.caller if early else None,
            corrected=readers if self.inputs == "corrected" else None,
            states=self.states,
        ).values()
        calibrating = (time.perf_counter() - begun) / len(group)
        for plan in group:
            kept = self._kept(plan)
            self._write(
                plan, *(self._load(plan) if kept else self._prune(plan, moments, calibrating))
            )


def prune_layer(
    plan: Plan,
    moments: Moments,
    *,
    calibrating: float,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> tuple[LayerReport, PrunedWeight]:
    """Prune one layer by what it has read; nothing is written to it.

    ``mask`` (G, R, C) bool, True = may stay; ``calibrating`` is the time that its moments took.
    Errors name the layer.
    """
    layer = plan.layer
    peak = LayerPeak(layer.weight().device)
    notes = [*layer.notes, *moments.notes(layer)]
    drift = moments.drift(layer)
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
            importance=importance,
        )
    except (ArgumentError, NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    report = layer_report(
        layer,
        out,
        method=plan.method,
        pattern=plan.pattern,
        scope=plan.scope,
        asked=plan.asked,
        damping=plan.damping,
        rows=moments.rows,
        calibrating=calibrating,
        inherited=None if drift is None else drift.inherited,
        peak=peak,
    )
    return report, out


def layer_report(
    layer: Layer,
    out: PrunedWeight,
    *,
    method: str,
    pattern: Pattern,
    scope: str,
    asked: str,
    damping: float,
    rows: float,
    calibrating: float = 0.0,
    inherited: float | None = None,
    peak: LayerPeak | None = None,
) -> LayerReport:
    """What was asked of a layer beside what came of it."""
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        method=method,
        scope=scope,
        asked=asked,
        sparsity=out.sparsity,
        error=out.error,
        relative_error=out.relative_error,
        damping=out.damping,
        damping_asked=damping,
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
        inherited=inherited,
        pattern=pattern.name,
        dtype=str(out.weight.dtype).removeprefix("torch."),
        predicted=out.predicted,
        energy=out.energy,
        condition=out.condition,
        curve_sparsity=out.curve_sparsity,
        curve_error=out.curve_error,
        peak_memory=None if peak is None else peak.bytes(),
        peak_memory_device=None if peak is None else peak.device_bytes(),
    )


def _within(zeros: Tensor, plan: Plan) -> bool:
    """Whether what is asked for removes all of these weights (G, R, C) and no pattern is against
    it."""
    share = plan.target.sparsity
    if share is None or not isinstance(plan.pattern, Unstructured):
        return False
    if plan.scope == "row":
        return int(zeros.sum(2).max()) <= nearest_count(share, zeros.shape[2])
    return int(zeros.sum()) <= nearest_count(share, plan.weights)
