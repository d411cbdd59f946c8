"""Prune a network: find its layers, calibrate, prune each, and report. Orchestrates; computes
nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native import checks, ops
from lobs_native.calibration.partial import States
from lobs_native.calibration.run import Forward, Run, batches_of
from lobs_native.calibration.sensitivity import sensitivities
from lobs_native.checks import check_choice
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.files.shelf import Shelf
from lobs_native.network import bound
from lobs_native.network.allocation import share_budget
from lobs_native.network.bound import error_bound_of
from lobs_native.network.layerwise import LayerLoop, Means
from lobs_native.network.peak import Peak, keep_tight
from lobs_native.network.resources import RunPlan, plan_run
from lobs_native.network.selection import OVERRIDABLE, Plan, plan_layers
from lobs_native.network.structure import multiplications, order_of, structure_of, workload
from lobs_native.report.records import plain
from lobs_native.report.report import Report
from lobs_native.rundir.fingerprints import fingerprints
from lobs_native.rundir.ledger import Ledger, check_resume
from lobs_native.solvers.patterns import GroupsOf
from lobs_native.solvers.settings import Target
from lobs_native.version import versions

__all__ = ["INPUTS", "plan_prune", "prune"]

INPUTS = ("pruned", "dense", "corrected")
_TOLD = (  # arguments that the report repeats, besides those that overrides may change
    *("include", "exclude", "overrides", "spread", "sensitivity", "budget", "inputs", "blocks"),
    *("device", "backend", "memory", "seed", "token_mask"),
)
_NOT_COMPARED = ("threads", "batches", "memory")  # they stand elsewhere, or change no result


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
    spread: float = 0.2,
    sensitivity: str | None = "auto",
    budget: str = "weights",
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
    run_dir: str | os.PathLike[str] | None = None,
    resume: str = "auto",
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
        As in :func:`lobs_native.prune_weight`; "model" compares weights over all layers and removes
        the share ``sparsity`` of all of them. It needs method "exact", single weights, and one more
        pass over the data.
    spread : float
        With scope "model", how far a layer's sparsity may be from the one asked for. Every layer
        also keeps at least half of the weights that it was asked to keep. 1 sets no bounds.
    sensitivity : "auto", "output", "bound" or None
        "output" multiplies what removals from a row cost by how much the network's output depends
        on it: the mean square, over the data and random directions v, of the gradient of ``v .
        output`` (the diagonal of the Gauss-Newton matrix), from one pass with backward passes and
        without labels. It counts where "exact" compares rows, in a layer or over the model. "auto"
        does so with scope "model". Layers whose outputs are no module's outputs (attention,
        experts) keep the sparsity asked, as do those that the output does not depend on. "bound"
        (scope "model") takes the squared spectral norms of the later layers instead, which
        minimises the bound of Theorem 3.2 up to a constant, for the networks it covers. None
        compares rows of a layer by their costs alone, and layers by cost over the square root of
        their ``tr(W H W^T)``.
    budget : "weights" or "flops"
        With scope "model", what ``sparsity`` is a share of: all weights, or all multiplications of
        one forward pass (a convolution's weight is used at every position).
    include, exclude : glob or list of globs on module names
        Default: every layer of a known type: nn.Linear, nn.Conv1d to 3d and their transposes,
        nn.MultiheadAttention (``<name>.q_proj``, ``k_proj``, ``v_proj``, ``out_proj``), Conv1D and
        experts as transformers stores them (``<name>.gate_up_proj``, ``down_proj``), and those of
        :func:`lobs_native.register_layer`. A glob that matches no layer is an error.
    overrides : {glob: {argument: value}}
        Other arguments for some layers, for example ``{"classifier": {"sparsity": 0.3}}``; later
        ones win. A target (sparsity, threshold, max_error) or an N:M pattern replaces the target
        from before.
    inputs : "pruned", "dense" or "corrected"
        Whether a layer is calibrated on what the already pruned network feeds it ("pruned"), or on
        the original network's activations ("dense": the paper, and Theorem 3.2 as printed; one pass
        over the data for all layers). "corrected" runs both networks side by side: on the pruned
        one's inputs, a layer is asked for the original one's outputs, so that it makes up for what
        the layers before it lost: ``W + (A P)^T`` is pruned in place of W, with ``P = mean of x^T
        (y0 - x W^T)``. Where an output goes straight into a sum with something else (a residual
        connection), the sums are made to agree. Experts, and layers whose zeros would be filled,
        are calibrated as with "pruned", and their notes say so. It costs one more run of the
        original network for every run of the pruned one, and usually leaves the network by far the
        nearest to the original (``python bench/quality/whole_encoder.py``).
    blocks : "auto" or None
        With inputs "pruned", run a stack of blocks (a transformer's) block by block on what each
        receives, instead of the whole model for every layer; the results are the same. "auto" does
        so where modules of a list are called one after another on what the one before returned, and
        a replay of the first batch gives what the model gives; ``report.settings`` says which
        ("blocks") and why others are not ("no blocks").
    forward : callable(model, batch), optional
        How to run the model on a batch when none of the above is right.
    memory : int, optional
        Bytes that pruning may take besides the model, the data, a forward pass (with sensitivities,
        a backward pass), and what libraries keep for themselves (some tens of megabytes): kernels
        use fewer threads, second moments are accumulated in several passes, hidden states and
        original weights go to a temporary folder on disk. A plan is made before anything is changed
        (``report.settings["plan"]``; printed on a terminal), and MemoryError says what is needed if
        the limit cannot be kept to. From then on glibc gives pieces of a megabyte or more back to
        the system at once, for the whole process.
    device : optional
        Move the model (it stays there) and each batch to this device first.
    run_dir : path, optional
        A folder that keeps every layer that has been pruned, so that a run that was killed, or
        ended by an error or a full disk, loses none: call prune again with the same arguments, and
        only the other layers are calibrated and pruned. Between two layers, sums over the data and
        what the next block receives are kept as well whenever writing them takes at most a
        twentieth of the time since the last ones (with ``memory``, if they are small). On the same
        machine with as many threads the network then has the bits of an uninterrupted run. About
        the size of the weights, and twice that of the sums.
    resume : "auto", "never" or "anyway"
        What to do where ``run_dir`` holds a run: "auto" goes on if model, data, arguments (but
        ``memory``), versions and threads are the same, and is an error that lists the differences
        otherwise; "anyway" goes on nevertheless, and ``report.settings["resumed despite"]`` says
        despite what; "never" is an error.
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
    MemoryError
        ``memory`` is too small for some layer; nothing has been changed.
    CheckpointError
        ``run_dir`` cannot be written or read, is another run or is in use. The model is as it was.

    Notes
    -----
    A weight that several layers use is pruned once, for the inputs of all of them, when the first
    is reached; their biases are updated only if they are one as well. One that something else uses
    too (an embedding, an excluded layer) is skipped, or refused if ``include`` asks for it. N:M
    patterns of a convolution group neighbouring input channels at one kernel position. Experts are
    measured each on the rows that it was sent, and count the same; one that saw none is pruned by
    magnitude, and its notes say so, as they do where there were fewer rows than columns. Source:
    Dong, Chen & Pan 2017; "corrected" is the asymmetric calibration of Li et al. 2025 (GPTAQ), with
    sums added here.
    """
    given = dict(locals())
    pruning = _Pruning(given.pop("model"), given.pop("calibration"), given)
    return pruning.carry_out()


def plan_prune(model: nn.Module, calibration: Iterable[Any], **arguments: Any) -> RunPlan:
    """What :func:`prune` would take with the same arguments: memory, disk and time.

    Runs the model on the first and on the largest batch a few times; changes nothing but the
    device, where one is given.

    Returns
    -------
    RunPlan
        Bytes and seconds; ``str()`` of it is for people.

    Raises
    ------
    MemoryError
        ``memory`` is too small; the message says for which layer, and what it needs.
    Everything that prune raises before it starts.
    """
    known = inspect.signature(prune).parameters
    for name in arguments:
        if name not in known or name in ("model", "calibration"):
            raise ArgumentError(f"{name}: prune has no such argument; it has {', '.join(known)}")
    defaults = {n: p.default for n, p in known.items() if n not in ("model", "calibration")}
    pruning = _Pruning(model, calibration, {**defaults, "progress": False, **arguments})
    with pruning.run.evaluating():
        return pruning.look()


class _Pruning:
    """One call of :func:`prune`: checks its arguments, looks at the model, and prunes it."""

    def __init__(self, model: nn.Module, calibration: Any, given: Mapping[str, Any]) -> None:
        self.begun = time.perf_counter()
        self.given = given
        defaults = {name: given[name] for name in OVERRIDABLE}
        self.plans, self.tied = plan_layers(
            model, defaults, given["include"], given["exclude"], given["overrides"]
        )
        self.memory: int | None = None
        if given["memory"] is not None:
            self.memory = checks.positive_int(given["memory"], "memory")
        self.inputs = check_choice(given["inputs"], "inputs", INPUTS)
        self.spread = checks.real(given["spread"], "spread")
        if not 0 <= self.spread <= 1:
            raise ArgumentError(
                f"spread: {self.spread:g}; it is a difference of sparsities, from 0 to 1"
            )
        self.weighed = self._check_budget(given["sensitivity"], given["budget"])
        if given["blocks"] is not None:
            check_choice(given["blocks"], "blocks", ("auto",))
        forward, seed, device = given["forward"], given["seed"], given["device"]
        if forward is not None and not callable(forward):
            raise DtypeError(
                f"forward: expected callable(model, batch), got {type(forward).__name__}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise DtypeError(f"seed: expected an int, got {type(seed).__name__}")
        check_resume(given["resume"])
        if given["token_mask"] is not None:
            check_choice(given["token_mask"], "token_mask", ("auto",))
        batches = batches_of(calibration)
        if device is not None:
            checks.zeros((1,), torch.float32, device, "device")  # refuses what cannot be used
            model.to(device)
        for plan in self.plans:
            ops.select_backend(given["backend"], plan.layer.weight().device)
        masked = given["token_mask"] == "auto"
        self.run = Run(model, batches, forward, device, seed, given["progress"], masked)

    def _check_budget(self, sensitivity: Any, budget: Any) -> list[Plan]:
        """The layers whose rows are to be weighed."""
        if sensitivity is not None:
            check_choice(sensitivity, "sensitivity", ("auto", "output", "bound"))
        check_choice(budget, "budget", ("weights", "flops"))
        sharing = [plan for plan in self.plans if plan.scope == "model"]
        if budget == "flops" and not sharing:
            raise ArgumentError("budget: 'flops' is shared among layers; use scope 'model' with it")
        if sensitivity == "bound" and not sharing:
            raise ArgumentError("sensitivity: 'bound' compares layers; use scope 'model' with it")
        if sensitivity != "output":
            return [] if sensitivity is None else sharing
        weighed = [plan for plan in self.plans if _weighed(plan)]
        if not weighed:
            raise ArgumentError(
                "sensitivity: 'output' weighs rows against each other, which needs method "
                "'exact', no N:M pattern, and scope 'layer' or 'model'; use 'auto' or None"
            )
        return weighed

    def look(self) -> RunPlan:
        """Run the model on the first batch: in which order its layers come, and what it will
        take."""
        included = self.given["include"] is not None
        self.order, self.uncalled, self.rows = order_of(self.plans, self.run, explicit=included)
        self.structure = structure_of(self.order, self.run, self.inputs, self.given["blocks"])
        work = workload(
            self.structure,
            self.run,
            self.rows,
            self.inputs,
            weighed=bool(self.weighed),
            shared_budget=any(plan.scope == "model" for plan in self.order),
        )
        return plan_run(
            self.order,
            work,
            inputs=self.inputs,
            memory=self.memory,
            backend=self.given["backend"],
        )

    def carry_out(self) -> Report:
        """Prune; on any exception all weights are as they were."""
        run, peak = self.run, Peak()
        with peak.measuring(), contextlib.ExitStack() as kept, run.evaluating():
            planned = self.look()
            _show(planned, run.progress)
            if planned.limit is not None:
                keep_tight()
            run.originals = kept.enter_context(Shelf(planned.kept_limit))
            run.swapped_limit = planned.swapped_limit
            ledger = self._ledger()
            if ledger is not None:
                kept.enter_context(ledger)
                ledger.check_space([plan.layer for plan in self.order])
                ledger.states.largest = planned.scratch if self.memory is not None else None
            for plan in self.plans:
                for name, parameter in plan.layer.parameters.items():
                    run.originals.put(name, parameter.detach().clone())
            try:
                order, sensitivity = self._decided(planned, ledger, peak)
                structure = self.structure.with_plans(order)
                means = Means(planned, self.given["backend"], sensitivity or {}, ledger)
                loop = LayerLoop(run, self.inputs, structure, means)
                loop.carry_out()
                done, masks = loop.done, loop.masks
                if ledger is not None:
                    ledger.states.clear()
                error_bound = error_bound_of(run.model, run, order, done, self.inputs)
            except BaseException as error:
                _restore(run)
                if ledger is not None and hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(
                        f"{len(ledger)} of {len(self.order)} layers are kept in {ledger.run.path}; "
                        "call prune with the same arguments to go on"
                    )
                raise
        weights = sum(mask.numel() for mask in masks.values())
        removed = sum(int((~mask).sum()) for mask in masks.values())
        return Report(
            layers=tuple(done.values()),
            skipped=(*self.tied, *self.uncalled),
            error_bound=error_bound,
            sparsity=removed / weights,
            removed=removed,
            weights=weights,
            seconds=time.perf_counter() - self.begun,
            settings={
                **self._settings(),
                **structure.said(),
                "plan": planned.to_dict(),
                "peak memory": peak.bytes(),
                "peak memory of sensitivities": peak.before_reset if sensitivity else None,
                **({} if ledger is None else {"run_dir": str(ledger.run.path)}),
                **({} if ledger is None else {"resumed layers": ledger.found}),
                **({} if ledger is None else ledger.states.said()),
                **(
                    {"resumed despite": ledger.differences} if ledger and ledger.differences else {}
                ),
            },
            versions=versions(),
            masks={p.layer.name: p.layer.unpack(masks[p.layer.name]) for p in order},
        )

    def _ledger(self) -> Ledger | None:
        """The run directory, opened, if there is to be one."""
        path = self.given["run_dir"]
        if path is None:
            return None
        settings = self._settings()
        header = {
            "config": {k: v for k, v in plain(settings).items() if k not in _NOT_COMPARED},
            "fingerprints": fingerprints(self.run.model, self.run.batches),
            "forward": _name_of(self.given["forward"]),
            "layers": [plan.layer.name for plan in self.order],
            "machine": {"threads": ops.threads(), "backends": self._backends()},
            "versions": versions(),
        }
        return Ledger.open(path, header, self.given["resume"])

    def _backends(self) -> list[str]:
        """What will do the work, in detail."""
        names = {
            ops.select_backend(self.given["backend"], plan.layer.weight().device)
            for plan in self.order
        }
        return sorted(names)

    def _decided(
        self, planned: RunPlan, ledger: Ledger | None, peak: Peak
    ) -> tuple[list[Plan], dict[str, Tensor] | None]:
        """The plans with their shares of a common budget, and the sensitivities; from the run
        directory if they are there."""
        states = None if ledger is None else ledger.states
        measured = None if ledger is None else ledger.sensitivity()
        if measured is None:
            measured = (self._sensitivity(states),)
            peak.reset()
            if ledger is not None and measured != (None,):
                ledger.keep_sensitivity(measured[0])
        (sensitivity,) = measured
        shares = None if ledger is None else ledger.shares()
        if shares is None:
            shares = self._shares(planned, sensitivity, states)
            if ledger is not None and shares:
                ledger.keep_shares(shares)
        order = []
        for plan in self.order:
            share = shares.get(plan.layer.name)
            if share is not None:
                plan = dataclasses.replace(plan, target=Target(sparsity=share))
            elif plan.scope == "model":
                plan.layer.notes.append(
                    "it kept the sparsity asked: how the network's output depends on it is not "
                    "known"
                )
            order.append(plan)
        return order, sensitivity

    def _sensitivity(self, states: States | None) -> dict[str, Tensor] | None:
        layers = [plan.layer for plan in self.weighed if plan in self.order]
        if not layers:
            return None
        if self.given["sensitivity"] == "bound":
            return bound.amplifications(self.run.model, layers)
        return sensitivities(self.run, layers, states)

    def _shares(
        self, planned: RunPlan, sensitivity: Mapping[str, Tensor] | None, states: States | None
    ) -> dict[str, float]:
        flops = self.given["budget"] == "flops"
        return share_budget(
            self.order,
            self.run,
            spread=self.spread,
            sensitivity=sensitivity,
            each=multiplications(self.order, self.rows) if flops else {},
            statistics=planned.statistics_limit,
            memory=planned.scratch,
            backend=self.given["backend"],
            states=states,
        )

    def _settings(self) -> dict[str, Any]:
        """The arguments, for the report."""
        told = (*OVERRIDABLE, *_TOLD)
        said = {name: copy.deepcopy(self.given[name]) for name in told}
        if not isinstance(said["pattern"], str):
            said["pattern"] = repr(said["pattern"])
        if said["device"] is not None:
            said["device"] = str(said["device"])
        return {**said, "threads": ops.threads(), "batches": len(self.run.batches)}


def _weighed(plan: Plan) -> bool:
    """Whether the sensitivity of its rows makes a difference to a layer."""
    grouped = isinstance(plan.pattern, GroupsOf)
    return plan.method == "exact" and not grouped and plan.scope in ("layer", "model")


def _name_of(forward: Forward | None) -> str | None:
    """Of a function, for comparing it with the one of another process."""
    if forward is None:
        return None
    named = forward if hasattr(forward, "__qualname__") else type(forward)
    return f"{named.__module__}.{named.__qualname__}"


def _show(plan: RunPlan, progress: bool) -> None:
    if progress and sys.stderr.isatty():
        tqdm.write(str(plan), file=sys.stderr)


@torch.no_grad()
def _restore(run: Run) -> None:
    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    for name in run.changed:
        parameters[name].copy_(run.originals[name])
