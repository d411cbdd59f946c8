"""The loop over the layers: calibrate, prune, checkpoint, write back.

Layers are pruned in order, each on the outputs of the pruned layers before it; or all of them on
the activations of the original network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from tqdm.auto import tqdm

from lobs_native.calibration.blocks import Stack
from lobs_native.calibration.held_back import HeldBack
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.offload import put_away
from lobs_native.calibration.partial import passed_before
from lobs_native.calibration.replay import Replay
from lobs_native.calibration.session import Session, Source
from lobs_native.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import Layer
from lobs_native.network.allocation import passes
from lobs_native.network.experts import error_of_each, prune_experts, zeros_of_each
from lobs_native.network.layer_report import layer_report
from lobs_native.network.packed import PackedMask
from lobs_native.network.peak import LayerPeak, give_back
from lobs_native.network.resources import RunPlan
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shared import Done, SharedLedger, shared_out
from lobs_native.network.stages import Stages
from lobs_native.network.structure import Structure
from lobs_native.network.tuning import Tuner
from lobs_native.network.zeros import more_zeros, within
from lobs_native.report.records import LayerReport
from lobs_native.rundir.ledger import Ledger
from lobs_native.solvers.rows import WHOLE, Rows
from lobs_native.solvers.weight import PrunedWeight, prune_groups

__all__ = ["Context", "LayerLoop", "prune_layer"]


@dataclass(frozen=True)
class Context:
    """What pruning the layers takes besides each layer's own settings."""

    settings: NetworkSettings
    plan: RunPlan
    sensitivity: Mapping[str, Tensor]
    ledger: Ledger | SharedLedger | None
    stages: Stages
    tuner: Tuner | None = None


_log = logging.getLogger("lobs_native")
_New = tuple[Tensor, "Tensor | None"]  # weight (G, R, C) and bias (G, R)


class LayerLoop:
    """The layers of one network, pruned one after another.

    Attributes
    ----------
    done : {name: LayerReport}
    masks : {name: (G, R, C)}, as bits
    """

    def __init__(self, session: Session, structure: Structure, context: Context) -> None:
        self.session = session
        self.structure = structure
        self.context = context
        self.inputs = context.settings.inputs
        self.ledger = context.ledger
        self.states = None if context.ledger is None else context.ledger.states
        self.stage = context.stages.stage
        self.tuner = context.tuner if context.settings.tune == "blocks" else None
        self.names = [
            job.layer.name for _, groups in structure.parts for group in groups for job in group
        ]
        self.begun = time.perf_counter()
        self.done: dict[str, LayerReport] = {}
        self.masks: dict[str, PackedMask] = {}

    def carry_out(self) -> None:
        """Prune all layers in the model."""
        total = sum(len(group) for _, groups in self.structure.parts for group in groups)
        off = None if self.session.progress else True
        self.bar = tqdm(total=total, desc="layers", unit="layer", disable=off)
        with self.bar:
            if self.inputs == "dense":
                ((_, (jobs,)),) = self.structure.parts
                self._on_original_inputs(jobs)
            else:
                for stack, groups in self.structure.parts:
                    self._in_order(stack, groups)

    # ---- one layer -------------------------------------------------------------------------------

    def _committed(self, job: LayerJob) -> bool:
        return self.ledger is not None and job.layer in self.ledger

    def _elsewhere(self, layers: Sequence[Layer], source: Source, **how: Any) -> dict[str, Moments]:
        """The second moments of the rows that are held back, by layer; none without such rows."""
        if not self.session.held_back:
            return {}
        return calibrate(layers, HeldBack(source, self.session.held_back), "held back", **how)

    def _prune(
        self,
        job: LayerJob,
        moments: Moments,
        elsewhere: Moments | None,
        calibrating: float,
        rows: Rows,
    ) -> Done:
        with self.stage("removing weights"):
            give_back(before=job.moment_bytes)
            report, out = prune_layer(
                job,
                moments,
                elsewhere=elsewhere,
                calibrating=calibrating,
                importance=self.context.sensitivity.get(job.layer.name),
                memory=self.context.plan.scratch,
                backend=self.context.settings.backend,
                rows=rows,
            )
        self.session.unused(*job.layer.parameters.values())
        return Done.of(report, out)

    def _pruned(
        self,
        jobs: Sequence[LayerJob],
        moments: dict[str, Moments],
        elsewhere: dict[str, Moments],
        calibrating: float,
    ) -> Iterator[tuple[LayerJob, _New]]:
        """Prune layers, shared out among the ranks, and commit them in order. The moments are
        taken out."""

        def prune(job: LayerJob, rows: Rows) -> Done:
            name = job.layer.name
            return self._prune(job, moments.pop(name), elsewhere.pop(name, None), calibrating, rows)

        def forget(job: LayerJob) -> None:
            del moments[job.layer.name]

        for job, done in shared_out(self.session.ranks, jobs, prune, forget):
            if self.ledger is not None:
                self.ledger.keep(job.layer, *done)
            yield job, self._note(job, done)

    def _load(self, job: LayerJob) -> _New:
        assert self.ledger is not None
        return self._note(job, Done(*self.ledger.load(job.layer)))

    def _note(self, job: LayerJob, done: Done) -> _New:
        self.done[job.layer.name] = done.report
        mask = PackedMask.of(done.mask)
        self.masks[job.layer.name] = dataclasses.replace(
            mask, bits=put_away(self.session.offload, mask.bits)
        )
        self.bar.update()
        return done.weight, done.bias

    def _write(self, job: LayerJob, weight: Tensor, bias: Tensor | None) -> None:
        self.session.changed.update(job.layer.parameters)
        job.layer.write_back(weight, bias)
        if self.session.offload is not None:
            self.session.offload.keep(job.layer.parameters.values())

    # ---- all layers ------------------------------------------------------------------------------

    def _on_original_inputs(self, jobs: Sequence[LayerJob]) -> None:
        """Every pass must see the original network, so new weights wait until the last one."""
        with Shelf(self.context.plan.kept_limit) as waiting:

            def wait(job: LayerJob, weight: Tensor, bias: Tensor | None) -> None:
                waiting.put((job.layer.name, "weight"), put_away(self.session.offload, weight))
                if bias is not None:
                    waiting.put((job.layer.name, "bias"), bias)

            for job in filter(self._committed, jobs):
                wait(job, *self._load(job))
            rest = [job for job in jobs if job.layer.name not in self.done]
            begun_with = passed_before(self.states, "calibrate")
            most = self.context.plan.statistics_limit
            most //= 2 if self.session.held_back else 1
            for piece in passes(rest, most, begun_with):
                begun = time.perf_counter()
                layers = [job.layer for job in piece]
                what = f"calibrate {len(layers)} layers"
                with self.stage("calibrating"):
                    moments = calibrate(layers, self.session, what, states=self.states)
                    elsewhere = self._elsewhere(layers, self.session)
                calibrating = (time.perf_counter() - begun) / len(piece)
                for job, new in self._pruned(piece, moments, elsewhere, calibrating):
                    wait(job, *new)
                _log.info("%d of %d layers", len(self.done), len(self.names))
            for job in jobs:
                name = job.layer.name
                self._write(job, waiting[name, "weight"], waiting.get((name, "bias")))
                waiting.drop((name, "weight"))
        self.done = {job.layer.name: self.done[job.layer.name] for job in jobs}

    def _in_order(self, stack: Stack | None, groups: Sequence[Sequence[LayerJob]]) -> None:
        """Prune one part of the network: a stack block by block, layers of a group together."""
        with contextlib.ExitStack() as scope:
            replay, source = None, cast(Source, self.session)
            committed = all(self._committed(job) for group in groups for job in group)
            tuned = self.tuner is None or stack is None or self.tuner.all_committed(stack)
            if stack is not None and not (committed and tuned):
                limit = self.context.plan.states_limit
                corrected = self.inputs == "corrected"
                replay = Replay(
                    stack,
                    self.session,
                    limit,
                    corrected,
                    self.states,
                    whole=self.tuner is not None,  # rank 0 tunes blocks on all batches
                )
                with self.stage("running blocks"):
                    source = scope.enter_context(replay)
            for group, after in itertools.zip_longest(groups, groups[1:]):
                block = None if stack is None else stack.block_of(group[0].layer.name)
                if all(map(self._committed, group)):
                    for job in group:
                        self._write(job, *self._load(job))
                else:
                    self._advance(replay, block)
                    self._group(group, source)
                    if replay is not None:
                        self._repeat_finished(replay)
                    self._tell(stack, group)
                ends = not after or stack is None or stack.block_of(after[0].layer.name) != block
                if ends and stack is not None and block is not None and self.tuner is not None:
                    self._tune(self.tuner, stack, block, replay)
            if replay is not None:
                with self.stage("running blocks"):
                    replay.finish()

    def _advance(self, replay: Replay | None, block: int | None) -> None:
        """Run blocks until the current one is ``block``."""
        with self.stage("running blocks"):
            while replay is not None and replay.block < (block or 0):
                replay.advance()

    def _tune(self, tuner: Tuner, stack: Stack, block: int, replay: Replay | None) -> None:
        """Tune a block whose layers are all pruned; or write what it was tuned to before."""
        name = stack.names[block]
        if tuner.committed(name):
            kept = tuner.load(name)
        else:
            assert replay is not None
            self._advance(replay, block)
            with self.stage("tuning blocks"):
                kept = tuner.tune_block(replay)
        if kept:
            self.tuned_with("block", [x for x in self.done if stack.block_of(x) == block])

    def tuned_with(self, whole: str, layers: Iterable[str]) -> None:
        """Note that these layers were tuned with their block, or with the network."""
        for layer in layers:
            report = self.done[layer]
            notes = (*report.notes, f"tuned with its {whole} afterwards: errors are of before")
            self.done[layer] = dataclasses.replace(report, notes=notes)

    def _repeat_finished(self, replay: Replay) -> None:
        """Let the parts of the current block repeat their outputs whose layers are all pruned."""
        for part, layers in self.structure.finishing(replay.stack, replay.block).items():
            if all(layer in self.done for layer in layers):
                replay.repeat(part)

    def _tell(self, stack: Stack | None, group: Sequence[LayerJob]) -> None:
        """Log one line for a block that is done, or for layers outside of blocks."""
        name = group[-1].layer.name
        if stack is not None:
            block = stack.names[stack.block_of(name) or 0]
            last = [n for n in self.names if n.startswith(f"{block}.")][-1]
            if name != last:
                return
            name = block
        seconds = time.perf_counter() - self.begun
        count, total = len(self.done), len(self.names)
        _log.info("%d of %d layers after %.0f s: %s", count, total, seconds, name)

    def _group(self, group: Sequence[LayerJob], source: Source) -> None:
        """Calibrate layers that read one tensor together, and prune each."""
        leader = group[0].layer
        early = leader.name in self.structure.once and len(leader.sites) == 1
        readers = {leader.name: [job.layer for job in group]}
        how: dict[str, Any] = {
            "until": leader.caller if early else None,
            "readers": readers,
            "corrected": self.inputs == "corrected",
        }
        begun = time.perf_counter()
        with self.stage("calibrating"):
            what = f"calibrate {leader.name}"
            (moments,) = calibrate([leader], source, what, states=self.states, **how).values()
            elsewhere = self._elsewhere([leader], source, **how).get(leader.name)
        calibrating = (time.perf_counter() - begun) / len(group)
        for job in filter(self._committed, group):
            self._write(job, *self._load(job))
        rest = [job for job in group if job.layer.name not in self.done]
        of_each = {job.layer.name: moments for job in rest}
        others = {} if elsewhere is None else {job.layer.name: elsewhere for job in rest}
        for job, new in self._pruned(rest, of_each, others, calibrating):
            self._write(job, *new)


def prune_layer(
    job: LayerJob,
    moments: Moments,
    *,
    calibrating: float,
    elsewhere: Moments | None = None,
    importance: Tensor | None = None,
    memory: int | None = None,
    backend: str | None = None,
    rows: Rows = WHOLE,
) -> tuple[LayerReport, PrunedWeight]:
    """Prune one layer, given the second moments of its inputs; nothing is written to it.

    ``calibrating``: seconds spent on its moments;
    ``elsewhere``: those of rows that are held back, on which the result is measured as well;
    ``rows``: how processes divide those of its weight, if it has one group. Errors name the layer.
    """
    layer = job.layer
    peak = LayerPeak(layer.weight().device)
    notes, mask = [*layer.notes, *moments.notes(layer)], job.mask
    drift = moments.drift(layer)
    settings, zeros = job.settings, layer.weight() == 0
    if (more := more_zeros(zeros, job)) is not None:
        settings, mask = dataclasses.replace(settings, sparsity=more), ~zeros
        notes.append(
            f"it already has more zeros ({int(zeros.sum())}) than were asked for; all of them stay"
        )
    # With whole inputs, zeros of those that stay may be filled: what is left is dense.
    elif drift is not None and not settings.resolved_pattern.whole_inputs and bool(zeros.any()):
        if within(zeros, job):
            mask = ~zeros
        else:
            drift = None
            notes.append(
                "not corrected, only calibrated on pruned inputs: its weights have zeros already, "
                "which would be filled"
            )
    prune = functools.partial(
        prune_groups, samples=() if layer.routed else [h.rows for h in moments]
    )
    if moments.rare:
        prune = functools.partial(prune_experts, rare=moments.rare)
    try:
        out = prune(
            layer.weight(),
            moments.matrices(),
            settings,
            bias=layer.bias(),
            mask=mask,
            memory=memory,
            backend=backend,
            notes=notes,
            drift=drift,
            importance=importance,
            rows=rows,
        )
    except (ArgumentError, NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    report = layer_report(
        job,
        out,
        rows=moments.rows,
        calibrating=calibrating,
        inherited=None if drift is None else drift.inherited,
        peak=peak,
    )
    report = dataclasses.replace(report, effective_rows=moments.effective_rows)
    if elsewhere is not None:
        there = elsewhere.error(layer, out.weight, out.bias, corrected=drift is not None)
        report = dataclasses.replace(report, held_back_error=there)
    if layer.routed:
        report = dataclasses.replace(
            report,
            expert_rows=tuple(h.rows for h in moments),
            expert_sparsity=zeros_of_each(out),
            expert_error=error_of_each(layer.weight(), layer.bias(), out, moments.matrices()),
        )
    return report, out
