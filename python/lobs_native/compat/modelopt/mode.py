"""The sparsity mode ``"lobs"`` for NVIDIA Model-Optimizer, and its searcher.

Importing it needs Model-Optimizer; :func:`lobs_native.compat.modelopt.register` does so.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import modelopt
import torch
from modelopt.torch.opt.searcher import BaseSearcher
from modelopt.torch.sparsity.weight_sparsity.mode import SparseGPTModeDescriptor
from modelopt.torch.sparsity.weight_sparsity.searcher import BaseSparseSearcher
from modelopt.torch.utils import print_rank_0
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.calibration.hooks import Columns, hooked
from lobs_native.calibration.moments import Moments
from lobs_native.compat.reporting import report_of
from lobs_native.errors import ArgumentError, LobsError, NonFiniteError
from lobs_native.layers import Layer, layers_for
from lobs_native.network.allocation import passes
from lobs_native.network.layerwise import prune_layer
from lobs_native.network.selection import LayerJob, job_of, tie
from lobs_native.report.records import LayerReport, Skipped
from lobs_native.solvers.settings import LAYER_OPTIONS, TARGETS, LayerOptions, LayerSettings, merged
from lobs_native.solvers.weight import PrunedWeight

__all__ = ["LOBSModeDescriptor", "LOBSSearcher"]


class LOBSSearcher(BaseSparseSearcher):
    """Prunes the layers of a sparse meta-model, writes the repaired weights into it and sets masks.

    Keys of ``config``, besides those of all searchers (``forward_loop``, or ``data_loader`` with
    ``collect_func``, is required):

    sparsity, threshold, max_error, method, scope, damping, prune_bias, refine
        As in :func:`lobs_native.prune`; there is no scope "model".
    pattern
        As in :func:`lobs_native.prune`, or the host's ``"2:4 sparsity"``. The default is 2:4, as in
        the host, unless one of the three targets is given.
    overrides
        {name of a module: {key: value}}. To leave layers out, use the mode's own configuration, as
        in the host: ``("lobs", {"nn.Linear": {"*head*": None}})``.
    memory
        The largest number of bytes of second moments. Layers that do not fit are calibrated in
        further passes over the data, on the outputs of the layers pruned before. By default, all
        layers are calibrated in one pass of the original network.
    backend
        A name from :func:`lobs_native.backends`.
    report
        A path, ``.json`` or ``.html``, to which the report is saved.

    Raises
    ------
    ArgumentError, PatternError
        A setting does not fit. Raised before anything runs.
    NonFiniteError, NotPositiveDefiniteError, LobsError
        A layer cannot be pruned or was never called. The message names it; all weights and masks
        are unchanged.

    Notes
    -----
    The network runs in evaluation mode. The padding of convolutions is part of their inputs.
    Several processes are not supported.
    """

    # ---- settings --------------------------------------------------------------------------------

    @property
    def default_search_config(self) -> dict[str, Any]:
        """The keys of ``config`` and their defaults."""
        return {
            **super().default_search_config,
            **{field.name: field.default for field in dataclasses.fields(LayerOptions)},
            "pattern": None,
            "overrides": {},
            "memory": None,
            "backend": None,
            "report": None,
        }

    def sanitize_search_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """``config`` with defaults; unknown keys are refused by name."""
        known = self.default_search_config
        if unknown := set(config or {}) - set(known):
            raise ArgumentError(
                f"config: {sorted(unknown)} unknown; known: {', '.join(sorted(known))}"
            )
        settings = BaseSearcher.sanitize_search_config(self, dict(config or {}))
        pattern = settings["pattern"]
        if pattern is None:
            targeted = any(settings[name] is not None for name in TARGETS)
            pattern = "unstructured" if targeted else "2:4"
        settings["pattern"] = _pattern(pattern)
        if settings["scope"] == "model":
            raise ArgumentError(
                "scope: 'model' is only for lobs_native.prune; use 'layer' or 'row'"
            )
        if settings["memory"] is not None:
            settings["memory"] = checks.positive_int(settings["memory"], "memory")
        report = settings["report"]
        if report is not None and Path(report).suffix not in (".json", ".html"):
            raise ArgumentError(f"report: {report!r} must end in .json or .html")
        return dict(settings)

    def _check_weight_size(self, weight: Tensor, mod_name: str) -> bool:
        return True  # if the pattern does not fit, job_of raises an error that names the layer

    def _compute_mask(self, module: nn.Module) -> Tensor:
        raise NotImplementedError("masks come with the weights, see run_search")

    # ---- the search ------------------------------------------------------------------------------

    def before_search(self) -> None:
        """Plan how to prune each layer, without running anything."""
        super().before_search()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise LobsError("lobs: torch.distributed is initialised; prune in one process")
        if self.forward_loop is None:
            raise ArgumentError(
                "config: calibration is needed; pass 'forward_loop', or 'data_loader' with "
                "'collect_func'"
            )
        candidates = [
            layer
            for name, module in self._named_sparsifiable_modules()
            for layer in layers_for(name, module)
        ]
        for layer in candidates:
            layer.check()
        layers, self.skipped = tie(self.model, candidates)
        if not layers:
            raise ArgumentError("model: the mode's rules leave no layer to prune")
        for target in self.config["overrides"]:
            if target not in {layer.name for layer in layers}:
                raise ArgumentError(f"overrides: {target!r} is not a layer to be pruned")
        self.jobs = [self._job(layer) for layer in layers]
        self.begun = time.perf_counter()

    def _job(self, layer: Layer) -> LayerJob:
        options = {name: self.config[name] for name in LAYER_OPTIONS}
        changes = self.config["overrides"].get(layer.name)
        if changes is not None:
            options |= merged({layer.name: changes})
        return job_of(layer, LayerSettings(**options))

    @torch.no_grad()
    def run_search(self) -> None:
        """Calibrate, prune, write and mask. On any exception everything is restored."""
        self.model.eval()  # the host restores the mode after the search
        limit = self.config["memory"]
        pieces = [self.jobs] if limit is None else passes(self.jobs, limit)
        originals: list[tuple[Layer, dict[str, Tensor], Tensor]] = []
        self.done: list[LayerReport] = []
        self.removed = 0
        try:
            for piece in pieces:
                for job, report, out in self._pruned(piece):
                    kept = {part: p.clone() for part, p in _parameters(job.layer)}
                    originals.append((job.layer, kept, _sparse(job.layer)._weight_mask.clone()))
                    self._write(job.layer, out)
                    self.done.append(report)
                    self.removed += int((~out.mask).sum())
        except BaseException:
            for layer, kept, mask in originals:
                for part, parameter in _parameters(layer):
                    parameter.copy_(kept[part])
                _sparse(layer).set_mask(mask)
            raise

    def _pruned(self, jobs: list[LayerJob]) -> Iterator[tuple[LayerJob, LayerReport, PrunedWeight]]:
        begun = time.perf_counter()
        moments = self._calibrated(jobs)
        each = (time.perf_counter() - begun) / len(jobs)
        for job in jobs:
            report, out = prune_layer(
                job,
                moments.pop(job.layer.name),
                calibrating=each,
                backend=self.config["backend"],
            )
            print_rank_0(
                f"{report.name}: {report.sparsity:.4f} removed by {report.method}, relative error "
                f"{report.relative_error:.4g}"
            )
            yield job, report, out

    def _calibrated(self, jobs: list[LayerJob]) -> dict[str, Moments]:
        moments = {job.layer.name: Moments(job.layer) for job in jobs}

        def see(layer: Layer, x: Tensor, columns: Columns) -> None:
            try:
                for group, rows in columns(x.detach()):
                    moments[layer.name][group].update(rows)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"layer {layer.name!r}: its input on the calibration data: {error}"
                ) from error

        with hooked([job.layer for job in jobs], see):
            self.forward_loop(self.model)
        missing = [name for name, of_layer in moments.items() if not of_layer.rows > 0]
        if missing:
            raise LobsError(
                f"{len(missing)} of {len(jobs)} layers were never called during calibration: "
                f"{', '.join(missing[:8])}; leave them out by the mode's rules, or pass data that "
                "reaches them"
            )
        return moments

    def _write(self, layer: Layer, out: PrunedWeight) -> None:
        """Write into the parameters themselves: ``module.weight`` is their product with a mask."""
        for part, parameter in _parameters(layer):
            if part == layer.weight_part:
                parameter.copy_(layer.unpack(out.weight))
            elif out.bias is not None:
                parameter.copy_(out.bias.reshape(parameter.shape))
        _sparse(layer).set_mask(layer.unpack(out.mask))

    def after_search(self) -> None:
        """Make the report."""
        super().after_search()
        skipped: list[Skipped] = self.skipped
        for layer in skipped:
            print_rank_0(f"{layer.name}: skipped: {layer.reason}")
        reported = (*LAYER_OPTIONS, "overrides", "memory", "backend")
        self.report = report_of(
            self.done,
            skipped,
            model=self.model,
            pruned=[job.layer for job in self.jobs],
            removed=self.removed,
            weights=sum(job.weights for job in self.jobs),
            seconds=time.perf_counter() - self.begun,
            settings={name: self.config[name] for name in reported},
            host={"modelopt": str(modelopt.__version__)},
            bound="Model-Optimizer's forward loop does not show what the network returns",
        )
        if self.config["report"] is not None:
            self.report.save(os.fspath(self.config["report"]))


class LOBSModeDescriptor(SparseGPTModeDescriptor):
    """The mode ``"lobs"``, with the configuration of ``"sparsegpt"``."""

    @property
    def name(self) -> str:
        """The mode's name."""
        return "lobs"

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """The searcher, which does the pruning."""
        return LOBSSearcher


def _pattern(pattern: Any) -> Any:
    """The pattern without the host's suffix " sparsity"."""
    if isinstance(pattern, str) and (match := re.fullmatch(r"(\d+:\d+) sparsity", pattern)):
        return match[1]
    return pattern


def _sparse(layer: Layer) -> Any:
    """The module as the host's SparseModule."""
    return layer.module


def _parameters(layer: Layer) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's own weight and bias."""
    for part in (layer.weight_part, layer.bias_part):
        parameter = layer.module._parameters.get(part)
        if parameter is not None:
            yield part, parameter
