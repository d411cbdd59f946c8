"""One run of :func:`lobs_native.prune`: examine the model, prune it, and report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native import checks, ops
from lobs_native.calibration.held_back import divided
from lobs_native.calibration.offload import Offload
from lobs_native.calibration.outputs import First, Samples, check_classes, held_back_loss
from lobs_native.calibration.partial import States
from lobs_native.calibration.ranks import ALONE, Ranks
from lobs_native.calibration.sensitivity import sensitivities
from lobs_native.calibration.session import Session, batches_of
from lobs_native.calibration.token_weights import TokenWeights
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Place, Shelf
from lobs_native.network import bound
from lobs_native.network.allocation import budget_costs
from lobs_native.network.bound import covered_weights, error_bound_of, samples_of
from lobs_native.network.coverage import uncovered
from lobs_native.network.layerwise import Context, LayerLoop
from lobs_native.network.original import differing_from, keep_originals
from lobs_native.network.peak import Peak, give_back, keep_tight, tighter
from lobs_native.network.resources import RunPlan, plan_run, waiting_limit
from lobs_native.network.run_report import report_of
from lobs_native.network.search import Search
from lobs_native.network.selection import LayerJob, candidates_of, weights_of
from lobs_native.network.sensitive import sensitive_of, weighted_of
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shared import Clock, SharedLedger, check_ranks
from lobs_native.network.stages import Stages
from lobs_native.network.structure import multiplications, order_of, structure_of, workload
from lobs_native.network.tuning import Tuner, to_tune
from lobs_native.network.uses import settle
from lobs_native.report.records import Coverage, ErrorBound, plain
from lobs_native.report.report import Report
from lobs_native.rundir.fingerprints import fingerprints, name_of
from lobs_native.rundir.ledger import Ledger
from lobs_native.version import versions

__all__ = ["Pruning"]


class Pruning:
    """A model, its data and the settings of a run; it computes nothing by itself.

    ``places`` says where parameters lie in files, as far as known: those that do need not be kept
    elsewhere while they are pruned. ``original``: the network whose outputs are aimed at, if that
    is not the model as it is; ``pieces``: bytes of this rank's pieces of what was gathered.

    Raises
    ------
    ArgumentError, DtypeError, PatternError, BackendError
        The settings do not fit the model or the data, or a layer cannot be pruned correctly.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        settings: NetworkSettings,
        places: Mapping[str, Place] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
        offload: Offload | None = None,
        original: nn.Module | None = None,
        pieces: int = 0,
    ) -> None:
        self.masks = masks or {}  # by layer, where what may stay is decided already
        self.stages = Stages()
        self.places = {**(places or {}), **({} if offload is None else offload.places)}
        self.settings, self.original, self.pieces = settings, original, pieces
        self.searched: dict[str, float] | None = None  # what a search for a division found
        self.candidates = candidates_of(model, settings)
        self.batches = batches_of(calibration)
        batches, held_back = divided(self.batches, settings.held_back)
        if settings.device is not None:
            checks.zeros((1,), torch.float32, settings.device, "device")  # refuses unusable ones
            model.to(settings.device)
        for device in {p.device for p in model.parameters() if not p.is_meta}:
            ops.select_backend(settings.backend, device)
        self.session = Session(
            model,
            batches,
            settings.forward,
            settings.device,
            settings.seed,
            settings.progress and ranks.first,
            token_mask=settings.token_mask == "auto",
            held_back=held_back,
            ranks=ranks,
            offload=offload,
            classes=settings.classes,
        )
        self.session.differing = differing_from(original, self.session)

    def look(self, first: First | None = None) -> RunPlan:
        """Run the model to see how it uses its weights and in which order, and plan the run.
        ``first`` keeps what it returns for the first batch."""
        settled = settle(self.candidates, self.session, self.settings, first)
        self.selected = [job.with_mask(self.masks.get(job.layer.name)) for job in settled.jobs]
        self.skipped = settled.skipped
        self.sensitive = sensitive_of(self.selected, self.settings)
        self.weighted = weighted_of(self.selected, self.settings)
        self.jobs, flow = order_of(self.selected, self.session, settled.seen)
        self.rows = flow.rows
        self.coverage = Coverage.of(sum(weights_of(job.layer) for job in self.jobs), self.skipped)
        self.structure = structure_of(self.jobs, flow, self.session, self.settings, settled.seen)
        check_classes(self.session)
        stacks, reasons = self.structure.stacks, self.structure.reasons
        self.tuned = to_tune(stacks, reasons, self._pruned(), self.session, self.settings)
        covered = covered_weights(self.session, self.jobs)
        self.sampled = self.settings.measure != "all" and not covered
        work = workload(
            self.structure,
            self.session,
            self.rows,
            self.settings,
            sensitive=bool(self.sensitive) and self.settings.sensitivity != "bound",
            weighted=[job.layer.name for job in self.weighted],
            shared_budget=any(job.shared for job in self.jobs),
            tuned=self.tuned,
            sampled=self.sampled,
            covered=covered,
            seen=settled.seen,
        )
        work = dataclasses.replace(work, pieces=self.pieces)
        return plan_run(self.jobs, work, self.settings, self.session.ranks)

    def _pruned(self) -> dict[str, nn.Parameter]:
        """The parameters of all layers that are pruned, by name."""
        return {name: p for job in self.jobs for name, p in job.layer.parameters.items()}

    def plan(self, *, stacklevel: int) -> RunPlan:
        """Look at the model and plan the run, with a warning about weights that are not pruned."""
        with self.session.evaluating():
            plan = self.look()
        self._warn("plan_prune", stacklevel + 1)
        return plan

    def _warn(self, function: str, stacklevel: int) -> None:
        """Warn about weights that are not pruned, unless they are few."""
        if line := uncovered(self.coverage, self.skipped):
            warnings.warn(f"lobs_native.{function}: {line}", stacklevel=stacklevel + 1)

    def carry_out(self) -> Report:
        """Prune; on any exception, all weights get their old values back."""
        session, peak, clock = self.session, Peak(), Clock()
        with peak.measuring(), contextlib.ExitStack() as kept, session.evaluating():
            check_ranks(session.ranks, self.settings, lambda: self._prints)
            first = First(kept.enter_context(Shelf(waiting_limit(self.settings.memory))))
            with self.stages.stage("looking at the model"), tighter():
                plan = self.look(None if self.settings.measure == "all" else first)
            if session.ranks.first:
                self._warn("prune", 4)
            if session.progress and sys.stderr.isatty():
                tqdm.write(str(plan), file=sys.stderr)
            if plan.limit is not None:
                keep_tight()
            session.originals = kept.enter_context(Shelf(plan.kept_limit))
            session.swapped_limit = plan.swapped_limit
            ledger = self._ledger()
            if ledger is not None:
                kept.enter_context(ledger)
                ledger.check_space([job.layer for job in self.jobs])
                if ledger.states is not None and self.settings.memory is not None:
                    ledger.states.largest = plan.scratch
            with self.stages.stage("keeping original weights"):
                parts = [*(job.layer.parameters for job in self.selected), *self.tuned]
                parameters = {name: p for part in parts for name, p in part.items()}
                keep_originals(session, parameters, self.places, self.original)
            try:
                with self.stages.stage("measuring the output"):
                    part, samples = self.sampled, Samples()
                    if session.ranks.first:
                        samples = samples_of(session, self.settings, first, kept, sampled=part)
                loop, error_bound = self._prune(plan, ledger, peak, samples)
                of_ranks = clock.of_all(session.ranks)
            except BaseException as error:
                session.restore()
                if ledger is not None and hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(
                        f"{ledger.kept(len(self.jobs))} are kept in {ledger.path}; "
                        "call prune with the same arguments to resume"
                    )
                raise
        return report_of(
            loop,
            error_bound,
            jobs=self.jobs,
            skipped=self.skipped,
            coverage=self.coverage,
            peak=peak,
            ledger=ledger,
            searched=self.searched,
            ranks=of_ranks,
        )

    def _prune(
        self, plan: RunPlan, ledger: Ledger | SharedLedger | None, peak: Peak, samples: Samples
    ) -> tuple[LayerLoop, ErrorBound]:
        """Prune the layers in the model, and bound the change of its output."""
        with self.stages.stage("sensitivities"):
            sensitivity = self._sensitivity(ledger, peak)
        with self.stages.stage("dividing the budget"):
            shares = self._shares(plan, sensitivity, ledger)
        jobs = [self._with_share(job, shares.get(job.layer.name)) for job in self.jobs]
        loop = self._loop(jobs, plan, sensitivity, ledger, self.stages)
        loop.carry_out()
        if self.settings.tune == "network":
            assert loop.context.tuner is not None
            with self.stages.stage("tuning the network"):
                if loop.context.tuner.tune_network(self.structure.stacks):
                    loop.tuned_with("network", list(loop.done))
        if ledger is not None and ledger.states is not None:
            ledger.states.clear()
        give_back()
        with self.stages.stage("measuring the output"):
            return loop, self._error_bound(jobs, loop, plan, samples)

    def _error_bound(
        self, jobs: Sequence[LayerJob], loop: LayerLoop, plan: RunPlan, samples: Samples
    ) -> ErrorBound:
        """What rank 0 measures of the whole network."""
        session, found = self.session, dict[str, Any]()
        session.padded = any(session.ranks.all_values("padding", session.padded))
        if session.ranks.first:
            how = (self.settings, plan.output_limit, samples)
            found = dataclasses.asdict(error_bound_of(session, jobs, loop.done, *how))
        return ErrorBound(**session.ranks.value("the change of the output", found))

    def _loop(
        self,
        jobs: Sequence[LayerJob],
        plan: RunPlan,
        sensitivity: Mapping[str, Tensor] | None,
        ledger: Ledger | SharedLedger | None,
        stages: Stages,
    ) -> LayerLoop:
        """The loop over the layers, with these settings for each."""
        tuner = None
        if self.tuned:
            tuner = Tuner(self.session, self._pruned(), ledger, plan, self.settings)
        context = Context(self.settings, plan, sensitivity or {}, ledger, stages, tuner)
        return LayerLoop(self.session, self.structure.with_jobs(jobs), context)

    # ---- a common budget -------------------------------------------------------------------------

    def _sensitivity(
        self, ledger: Ledger | SharedLedger | None, peak: Peak
    ) -> dict[str, Tensor] | None:
        """The sensitivity of the output to the rows of each layer, from the run directory if it is
        there; None if nothing is measured."""
        known = None if ledger is None else ledger.sensitivity()
        tokens = self.session.weights = TokenWeights() if self.weighted else None
        if ledger is not None and known is not None:
            if tokens is not None:
                tokens.restore(ledger.token_weights())
            measured = known[0]
        else:
            measured = self._measured(None if ledger is None else ledger.states)
            give_back()
            peak.reset()
            if ledger is not None and (measured is not None or tokens is not None):
                ledger.keep_sensitivity(measured, None if tokens is None else tokens.kept())
        for job in self.jobs:
            if tokens is not None and job.layer.name not in tokens:
                job.layer.notes.append(
                    "token_weights: all its rows counted the same, since the gradient of the "
                    "network's output at its own is not known"
                )
        return measured

    def _measured(self, states: States | None) -> dict[str, Tensor] | None:
        """The sensitivities of rows; those of tokens become known to the session."""
        rows = [job.layer for job in self.sensitive if job in self.jobs]
        tokens = [job.layer for job in self.weighted if job in self.jobs]
        by_bound = self.settings.sensitivity == "bound"
        found: dict[str, Tensor] = {}
        if tokens or (rows and not by_bound):
            layers = dict.fromkeys([*tokens, *(() if by_bound else rows)])
            found = sensitivities(self.session, list(layers), states, self.session.weights)
        if rows and by_bound:
            found = bound.amplifications(self.session.model, rows)
        return {x.name: found[x.name] for x in rows if x.name in found} if rows else None

    def _shares(
        self,
        plan: RunPlan,
        sensitivity: Mapping[str, Tensor] | None,
        ledger: Ledger | SharedLedger | None,
    ) -> dict[str, float]:
        """The sparsities of the layers that share a budget, from the run directory if they are
        there."""
        known = None if ledger is None else ledger.shares()
        if known is not None:
            return known
        flops = self.settings.budget == "flops"
        costs = budget_costs(
            self.jobs,
            self.session,
            self.settings,
            plan,
            sensitivity=sensitivity,
            each=multiplications(self.jobs, self.rows) if flops else {},
            states=None if ledger is None else ledger.states,
        )
        search = Search(
            costs,
            {job.layer.name: job.weights for job in self.jobs},
            lambda shares: self._loss(shares, plan, sensitivity),
            record=ledger,
            clock=self.session.ranks.clock,
        )
        shares = search.best(self.settings.search, self.settings.search_seconds)
        self.searched = search.summary()
        if ledger is not None and shares:
            ledger.keep_shares(shares)
        return shares

    def _loss(
        self, shares: Mapping[str, float], plan: RunPlan, sensitivity: Mapping[str, Tensor] | None
    ) -> float:
        """Prune to these sparsities, measure the output on the batches held back, and go back."""
        jobs = [
            job.with_sparsity(shares[job.layer.name]) if job.layer.name in shares else job
            for job in self.jobs
        ]
        try:
            self._loop(jobs, plan, sensitivity, None, Stages()).carry_out()
            ranks, limit = self.session.ranks, plan.output_limit
            mine = held_back_loss(self.session, limit) if ranks.first else None
            loss: float | None = ranks.value("the loss of a division", mine)
        finally:
            self.session.restore()
        if loss is None:
            raise ArgumentError(
                "search: the model returns no floating-point tensors that can be compared; use 0"
            )
        return loss

    def _with_share(self, job: LayerJob, share: float | None) -> LayerJob:
        if share is not None:
            return job.with_sparsity(share)
        if job.shared:
            job.layer.notes.append(
                "it kept the requested sparsity: the sensitivity of the network's output to it is "
                "not known"
            )
        return job

    # ---- the run directory and the report --------------------------------------------------------

    def _ledger(self) -> Ledger | SharedLedger | None:
        """The ledger in the run directory, opened; None without a run directory."""
        path = self.settings.run_dir
        if path is None:
            return None
        ranks, own = self.session.ranks, None
        if ranks.first:
            own = Ledger.open(path, self._header(), self.settings.resume)
        return own if ranks.size == 1 else SharedLedger(ranks, own, path)

    def _header(self) -> dict[str, Any]:
        """What the run is, for its run directory."""
        return {
            "config": plain(self.settings.arguments(compared=True)),
            "coverage": {
                "pruned": self.coverage.pruned,
                "skipped": [dataclasses.asdict(layer) for layer in self.skipped],
            },
            "fingerprints": self._prints,
            "forward": name_of(self.settings.forward),
            "layers": [job.layer.name for job in self.jobs],
            "machine": {"threads": ops.threads(), "backends": self._backends()},
            "versions": versions(),
        }

    @functools.cached_property
    def _prints(self) -> dict[str, Any]:
        """The fingerprints of the model, the data (seeded, since some are shuffled) and masks."""
        torch.manual_seed(self.settings.seed)
        session, original = self.session, self.original
        return fingerprints(session.model, self.batches, self.masks, session.unused, original)

    def _backends(self) -> list[str]:
        """The names of the backends that will prune the layers."""
        devices = {job.layer.weight().device for job in self.jobs}
        return sorted({ops.select_backend(self.settings.backend, x) for x in devices})
