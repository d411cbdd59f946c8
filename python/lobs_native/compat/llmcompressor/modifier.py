"""``LOBSModifier``: pruning as a modifier of llm-compressor, with its calibration.

Importing this module needs llm-compressor, and registers the modifier for its recipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compressed_tensors
import llmcompressor
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import is_match
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lobs_native.calibration.hooks import Columns, reader
from lobs_native.calibration.moments import Moments
from lobs_native.compat.llmcompressor.padding import Padding
from lobs_native.compat.llmcompressor.settings import check_settings, damping_of, pattern_text
from lobs_native.compat.llmcompressor.targets import layers_of_targets
from lobs_native.compat.llmcompressor.writing import Originals, write
from lobs_native.compat.reporting import report_of
from lobs_native.errors import ArgumentError, LobsError, NonFiniteError
from lobs_native.layers import Layer
from lobs_native.network.layerwise import prune_layer
from lobs_native.network.selection import LayerJob, job_of, tie
from lobs_native.report.records import LayerReport, Skipped
from lobs_native.report.report import Report
from lobs_native.solvers.settings import LAYER_OPTIONS, LayerSettings, merged
from lobs_native.solvers.weight import PrunedWeight

__all__ = ["LOBSModifier"]


class LOBSModifier(Modifier):
    """Prune by second-order information inside llm-compressor's ``oneshot``.

    ``oneshot(model=model, dataset=data, recipe=[LOBSModifier(sparsity=0.5, ignore=["lm_head"])])``,
    or by the name ``LOBSModifier`` in a YAML recipe, once this class has been imported.
    llm-compressor's pipeline calibrates the layers, each part of the network on the outputs of the
    parts pruned before it. They are pruned as by ``lobs_native.prune``, biases updated with the
    weights, and written back through llm-compressor's offloading.

    Parameters
    ----------
    sparsity, threshold, max_error, method, scope, prune_bias, refine
        As in :func:`lobs_native.prune`. ``sparsity`` is exact for each layer. There is no scope
        "model", because llm-compressor shows one part of the network at a time.
    pattern : str
        As in :func:`lobs_native.prune`: ``"2:4"`` keeps 2 of 4, ``"1:4"`` keeps 1 of 4.
    mask_structure : str
        The same in the notation of SparseGPTModifier: the number of **zeros** in each group, so
        ``"1:4"`` keeps 3 of 4, and ``"0:0"`` means no pattern. Pass this or ``pattern``.
    damping, dampening_frac : float
        Two names for one fraction of the mean diagonal of H, 0.01 by default.
    preserve_sparsity_mask : bool
        Weights that are zero stay zero, whatever the cost. Without it, zeros are also removed
        first, but a pattern may have no room for all of them.
    overrides : {target: {name: value}}
        Other settings for some layers; the last match wins. Targets are as in ``targets``.
    targets, ignore : str or list of str
        Names, ``"re:..."`` or class names of layers, or of modules that contain layers. A target
        that matches nothing is an error. A layer may be of any type that ``lobs_native`` supports.
    backend : str
        A name from :func:`lobs_native.backends`.
    report : str
        A path, ``.json`` or ``.html``, to which the report is saved at the end. :attr:`result` has
        it too.
    keep_originals : bool
        Keep the original weights on the CPU until all layers are done, so that a failure leaves
        the model unchanged. After a failure of the network itself, call :meth:`undo`. If False,
        only the part that fails is left unchanged.

    Raises
    ------
    pydantic.ValidationError (a ValueError)
        A setting is invalid; the message is from this package.
    ArgumentError, PatternError
        From ``oneshot``, before calibration: targets, layers or settings do not fit each other.
    NonFiniteError, NotPositiveDefiniteError, LobsError
        From ``oneshot``: a layer cannot be pruned, was not called, or is used again after it was
        pruned. The message names it. No other method is substituted.

    Notes
    -----
    Padding: rows with an ``attention_mask`` of 0 do not count, nor, with ``use_loss_mask``, rows
    with a ``loss_mask`` of 0. A layer whose weight is shared with a layer that is not pruned (an
    ``lm_head`` tied to the embeddings) is skipped with a warning and listed in the report. Several
    processes (torch.distributed) are not supported.
    """

    requires_calibration_data: bool = True

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None
    method: str = "auto"
    pattern: str | None = None
    mask_structure: str | None = None
    scope: str = "layer"
    damping: float | None = None
    dampening_frac: float | None = None
    prune_bias: bool = False
    refine: str | None = None
    preserve_sparsity_mask: bool = False
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=list)
    backend: str | None = None
    report: str | None = None
    keep_originals: bool = True

    _jobs: list[LayerJob] = PrivateAttr(default_factory=list)
    _skipped: list[Skipped] = PrivateAttr(default_factory=list)
    _moments: dict[str, Moments] = PrivateAttr(default_factory=dict)
    _seconds: dict[str, float] = PrivateAttr(default_factory=dict)
    _originals: Originals = PrivateAttr(default_factory=Originals)
    _done: dict[str, LayerReport] = PrivateAttr(default_factory=dict)
    _removed: int = PrivateAttr(default=0)
    _padding: Padding | None = PrivateAttr(default=None)
    _failed: bool = PrivateAttr(default=False)
    _begun: float = PrivateAttr(default=0.0)
    _result: Report | None = PrivateAttr(default=None)

    @property
    def result(self) -> Report | None:
        """The report, after ``oneshot``."""
        return self._result

    def undo(self) -> None:
        """Restore all weights, after ``oneshot`` has ended by an error outside this modifier (the
        network failed, or ran out of memory)."""
        self._failed = True
        self.remove_hooks()
        self._moments.clear()
        self._originals.restore()

    # ---- settings --------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _check(self) -> LOBSModifier:
        check_settings(self._options(), self.report)
        return self

    def _options(self) -> dict[str, Any]:
        """The arguments of ``lobs_native.prune`` for every layer."""
        return {
            **{name: getattr(self, name) for name in LAYER_OPTIONS},
            "pattern": pattern_text(self.pattern, self.mask_structure),
            "damping": damping_of(self.damping, self.dampening_frac),
        }

    def _report_settings(self) -> dict[str, Any]:
        """The settings for the report, those that only this modifier has at the end."""
        own = ("targets", "ignore", "overrides", "preserve_sparsity_mask", "backend")
        return {**self._options(), **{name: getattr(self, name) for name in own}}

    # ---- which layers ----------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the layers and check everything that can be checked before calibration."""
        self._begun = time.perf_counter()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise LobsError(
                "LOBSModifier: torch.distributed is initialised; run oneshot in one process"
            )
        if self.report is not None and not Path(self.report).absolute().parent.is_dir():
            raise ArgumentError(
                f"report: the folder of {self.report!r} does not exist; create it first"
            )
        model = state.model
        selected, hidden = layers_of_targets(model, self.targets, self.ignore)
        with disable_onloading():  # tied weights are one tensor in storage, but not when onloaded
            layers, tied = tie(model, selected)
        self._skipped = [*hidden, *tied]
        for skipped in self._skipped:
            logger.warning(f"LOBSModifier skips {skipped.name}: {skipped.reason}")
        if not layers:
            reasons = "".join(f"; {s.name}: {s.reason}" for s in self._skipped)
            raise ArgumentError(
                f"targets: {self.targets!r} without ignore {self.ignore!r} leave no layer to "
                f"prune{reasons}"
            )
        self._jobs = [self._job(layer) for layer in layers]
        self._check_overrides()
        return True

    def _job(self, layer: Layer) -> LayerJob:
        matching = {
            target: changes
            for target, changes in self.overrides.items()
            if is_match(layer.name, layer.module, target)
        }
        return job_of(layer, LayerSettings(**{**self._options(), **merged(matching)}))

    def _check_overrides(self) -> None:
        layers = [job.layer for job in self._jobs]
        for target in self.overrides:
            if not any(is_match(layer.name, layer.module, target) for layer in layers):
                raise ArgumentError(f"overrides: {target!r} does not match any layer to be pruned")

    # ---- calibration -----------------------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Attach hooks that observe the layers' inputs."""

        def running() -> int:
            return int(state.current_batch_idx)

        def see(layer: Layer, x: Tensor, columns: Columns) -> None:
            self._see(layer, x, columns, self._mask(state))

        self._padding = Padding.of(state.data.calib)
        if self._padding is not None:
            self._watch(state.model.get_input_embeddings(), self._padding.watching(running))
        for job in self._jobs:
            for site in job.layer.sites:
                self._watch(site.module, reader(job.layer, site, see))

    def _watch(self, module: nn.Module, hook: Callable[..., None]) -> None:
        def guarded(*arguments: Any) -> None:
            with self._all_or_nothing():
                hook(*arguments)

        self.register_hook(module, guarded, "forward_pre", with_kwargs=True)

    def _mask(self, state: State) -> Tensor | None:
        """The mask of the current batch: (B, T) bool, True = counts."""
        if state.loss_masks is not None:
            loss_mask = state.loss_masks[state.current_batch_idx]
            return None if loss_mask is None else loss_mask != 0
        return None if self._padding is None else self._padding.mask(state.current_batch_idx)

    def _see(self, layer: Layer, x: Tensor, columns: Columns, mask: Tensor | None) -> None:
        begun = time.perf_counter()
        if layer.name in self._done:
            raise LobsError(
                f"layer {layer.name!r}: used again after it was pruned, in a later part of the "
                "network; ignore it, or pass pipeline='basic' to oneshot"
            )
        moments = self._moments.get(layer.name)
        if moments is None:
            moments = self._moments[layer.name] = Moments(layer)
        if mask is None and self._padding is not None:
            moments.unmasked = True
        x = x.detach().to(moments[0].device)
        weights = moments.weights(x, mask)
        try:
            for group, rows in columns(x):
                moments[group].update(rows, weights)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error
        spent = time.perf_counter() - begun
        self._seconds[layer.name] = self._seconds.get(layer.name, 0.0) + spent

    # ---- pruning ---------------------------------------------------------------------------------

    def on_sequential_epoch_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune the layers of the part that has been calibrated. They are written once all are
        pruned."""
        with self._all_or_nothing():
            seen = [job for job in self._jobs if job.layer.name in self._moments]
            pruned = [(job, self._pruned(job)) for job in seen]
            for job, (report, out) in pruned:
                self._originals.keep(job.layer, biases=out.bias is not None)
                write(job.layer, out)
                self._done[job.layer.name] = report
                self._removed += int((~out.mask).sum())
        if not self.keep_originals:
            self._originals.clear()

    def _pruned(self, job: LayerJob) -> tuple[LayerReport, PrunedWeight]:
        layer = job.layer
        moments = self._moments.pop(layer.name)
        if not moments.rows > 0:
            raise LobsError(f"layer {layer.name!r}: all rows that it saw are padding")
        kept = layer.weight() != 0 if self.preserve_sparsity_mask else None
        report, out = prune_layer(
            dataclasses.replace(job, mask=kept),
            moments,
            calibrating=self._seconds.pop(layer.name),
            backend=self.backend,
        )
        logger.info(
            f"Pruned {layer.name} to {report.sparsity:.4f} by {report.method}: relative error "
            f"{report.relative_error:.4g}, {report.rows:g} rows, {report.seconds_pruning:.2f} s"
        )
        return report, out

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """On any exception, restore the weights whose originals are kept."""
        try:
            yield
        except BaseException:
            self.undo()
            raise

    # ---- the end ---------------------------------------------------------------------------------

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Raise LobsError if there are layers that were never called."""
        with self._all_or_nothing():
            missing = [j.layer.name for j in self._jobs if j.layer.name not in self._done]
            if missing:
                names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise LobsError(
                    f"{len(missing)} of {len(self._jobs)} layers were never called during "
                    f"calibration: {names}; add them to ignore, or pass data that reaches them"
                )
        self.remove_hooks()
        self._originals.clear()
        self._padding = None

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make the report, and save it if asked to."""
        if self._failed:  # llm-compressor finalizes a failed run when the next one begins
            return True
        missing = len(self._jobs) - len(self._done)
        if missing:
            self.remove_hooks()
            raise LobsError(
                f"LOBSModifier: {missing} of {len(self._jobs)} layers are not pruned: calibration "
                "was not completed, or did not run at all (pass dataset= to oneshot)"
            )
        self._result = report_of(
            list(self._done.values()),
            self._skipped,
            model=state.model,
            pruned=[job.layer for job in self._jobs],
            removed=self._removed,
            weights=sum(job.weights for job in self._jobs),
            seconds=time.perf_counter() - self._begun,
            settings=self._report_settings(),
            host={
                "llmcompressor": str(llmcompressor.__version__),
                "compressed_tensors": str(compressed_tensors.__version__),
            },
            bound="llm-compressor shows the network part by part",
        )
        self._jobs = []
        if self.report is not None:
            self._result.save(os.fspath(self.report))
        return True


ModifierFactory.register("LOBSModifier", LOBSModifier)
