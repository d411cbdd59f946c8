"""``LOBSModifier``: our pruning as a modifier of llm-compressor, fed by its calibration.

Importing this module needs llm-compressor, and makes the modifier known to its recipes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compressed_tensors
import llmcompressor
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils import is_match, update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lobs_native.calibration.hooks import Columns, reader
from lobs_native.calibration.moments import Moments
from lobs_native.checks import check_choice
from lobs_native.compat.llmcompressor.padding import Padding
from lobs_native.compat.llmcompressor.targets import layers_of_targets
from lobs_native.compat.reporting import report_of
from lobs_native.errors import ArgumentError, LobsError, NonFiniteError
from lobs_native.layers import Layer
from lobs_native.network.layerwise import prune_layer
from lobs_native.network.selection import OVERRIDABLE, Plan, overridden, plan_layer, tie
from lobs_native.report.records import LayerReport, Skipped
from lobs_native.report.report import Report
from lobs_native.solvers.patterns import pattern_of
from lobs_native.solvers.settings import METHODS, SCOPES, Target, check_damping
from lobs_native.solvers.weight import PrunedWeight

__all__ = ["LOBSModifier"]

_DAMPING = 0.01


class LOBSModifier(Modifier):
    """Prune by second-order information inside llm-compressor's ``oneshot``.

    ``oneshot(model=model, dataset=data, recipe=[LOBSModifier(sparsity=0.5, ignore=["lm_head"])])``,
    or under the name ``LOBSModifier`` in a YAML recipe once this class has been imported. Layers
    are calibrated by llm-compressor's pipeline (each part of the network on the outputs of the
    parts that are pruned already), pruned as ``lobs_native.prune`` does, biases updated with the
    weights, and written back through its offloading.

    Parameters
    ----------
    sparsity, threshold, max_error, method, scope, prune_bias, refine
        As in :func:`lobs_native.prune`. ``sparsity`` is exact per layer; there is no scope "model",
        because llm-compressor shows one part of the network at a time.
    pattern : str
        As in :func:`lobs_native.prune`: ``"2:4"`` keeps 2 of 4, ``"1:4"`` keeps 1 of 4.
    mask_structure : str
        The same as SparseGPTModifier has it: the number of **zeros** in each group, so ``"1:4"``
        keeps 3 of 4; ``"0:0"`` is no pattern. Give this or ``pattern``.
    damping, dampening_frac : float
        Two names for one fraction of the mean diagonal of H, 0.01 by default.
    preserve_sparsity_mask : bool
        Weights that are zero stay zero, whatever they cost. Without it zeros go first too, but a
        pattern may have no room for all of them.
    overrides : {target: {name: value}}
        Other settings for some layers, the last match wins. Targets as in ``targets``.
    targets, ignore : str or list of str
        Names, ``"re:..."`` or class names, of layers or of modules that contain them. A target
        that matches nothing is an error. The type of a layer may be any that ``lobs_native`` knows.
    backend : str
        A name from :func:`lobs_native.backends`.
    report : str
        Path, ``.json`` or ``.html``, to save the report to at the end; :attr:`result` has it too.
    keep_originals : bool
        Keep the original weights on the CPU until all layers are done, so that a failure leaves
        the model as it was; :meth:`undo` does so after failures of the network itself. Without it
        only the part that fails is left as it was.

    Raises
    ------
    pydantic.ValidationError (a ValueError)
        A setting is wrong; the message is ours.
    ArgumentError, PatternError
        From ``oneshot``, before calibration: targets, layers or settings do not fit each other.
    NonFiniteError, NotPositiveDefiniteError, LobsError
        From ``oneshot``: a layer cannot be pruned, was not called, or is used again after it was
        pruned. The message names it; nothing is pruned in place of what was asked.

    Notes
    -----
    Padding: rows whose ``attention_mask`` is 0 do not count, nor those of ``loss_mask`` with
    ``use_loss_mask``. Layers whose weight is shared with a layer that is not pruned with it (an
    ``lm_head`` tied to the embeddings) are skipped with a warning and named in the report. Not for
    several processes (torch.distributed).
    """

    requires_calibration_data: bool = True

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None
    method: str = "exact"
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

    _plans: list[Plan] = PrivateAttr(default_factory=list)
    _skipped: list[Skipped] = PrivateAttr(default_factory=list)
    _moments: dict[str, Moments] = PrivateAttr(default_factory=dict)
    _seconds: dict[str, float] = PrivateAttr(default_factory=dict)
    _originals: dict[str, dict[str, Tensor]] = PrivateAttr(default_factory=dict)
    _done: dict[str, LayerReport] = PrivateAttr(default_factory=dict)
    _removed: int = PrivateAttr(default=0)
    _padding: Padding | None = PrivateAttr(default=None)
    _failed: bool = PrivateAttr(default=False)
    _begun: float = PrivateAttr(default=0.0)
    _result: Report | None = PrivateAttr(default=None)

    @property
    def result(self) -> Report | None:
        """The report, once ``oneshot`` is through."""
        return self._result

    def undo(self) -> None:
        """Give all weights their old values back, where ``oneshot`` was ended by something else
        than this modifier (the network itself failed, or ran out of memory)."""
        self._failed = True
        self.remove_hooks()
        self._moments.clear()
        self._restore()

    # ---- settings --------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _check(self) -> LOBSModifier:
        settings = self._settings()
        method = check_choice(settings["method"], "method", METHODS)
        if settings["scope"] == "model":
            raise ArgumentError(
                "scope: 'model' needs the whole network at once, and llm-compressor shows it part "
                "by part; use 'layer' or 'row', or lobs_native.prune"
            )
        check_choice(settings["scope"], "scope", SCOPES)
        check_damping(settings["damping"])
        pattern = pattern_of(settings["pattern"])
        Target.of(
            settings["sparsity"], settings["threshold"], settings["max_error"], method, pattern
        )
        if self.report is not None and Path(self.report).suffix not in (".json", ".html"):
            raise ArgumentError(f"report: {self.report!r} must end in .json or .html")
        return self

    def _settings(self) -> dict[str, Any]:
        """What ``lobs_native.prune`` would be given."""
        given = {name: getattr(self, name) for name in OVERRIDABLE}
        return {**given, "pattern": self._pattern(), "damping": self._damping()}

    def _damping(self) -> float:
        given = [x for x in (self.damping, self.dampening_frac) if x is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise ArgumentError(
                f"damping: {given[0]:g}, but dampening_frac is {given[1]:g}; they are two names "
                "for one fraction, give one of them"
            )
        return given[0] if given else _DAMPING

    def _pattern(self) -> str:
        if self.mask_structure is None:
            return "unstructured" if self.pattern is None else self.pattern
        if self.pattern is not None:
            raise ArgumentError(
                f"pattern: {self.pattern!r}, but mask_structure is {self.mask_structure!r}; give "
                "one of them (pattern counts what is kept, mask_structure the zeros)"
            )
        zeros, _, size = self.mask_structure.partition(":")
        if not (zeros.isdecimal() and size.isdecimal() and int(zeros) <= int(size)):
            raise ArgumentError(
                f"mask_structure: {self.mask_structure!r}; write 'n:m' for n zeros in every m "
                "weights, or '0:0' for no pattern"
            )
        return f"{int(size) - int(zeros)}:{int(size)}" if int(zeros) else "unstructured"

    def _said(self) -> dict[str, Any]:
        """For the report: our names of settings, then those that only this modifier has."""
        own = ("targets", "ignore", "overrides", "preserve_sparsity_mask", "backend")
        return {**self._settings(), **{name: getattr(self, name) for name in own}}

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
                f"report: the folder of {self.report!r} is not there; make it first"
            )
        model = state.model
        found, hidden = layers_of_targets(model, self.targets, self.ignore)
        with disable_onloading():  # tied weights are one tensor only where they are stored
            layers, tied = tie(model, found, explicit=False)
        self._skipped = [*hidden, *tied]
        for skipped in self._skipped:
            logger.warning(f"LOBSModifier leaves {skipped.name} as it is: {skipped.reason}")
        if not layers:
            some = "".join(f"; {s.name}: {s.reason}" for s in self._skipped)
            raise ArgumentError(
                f"targets: {self.targets!r} without ignore {self.ignore!r} leave no layer to "
                f"prune{some}"
            )
        self._plans = [self._planned(layer) for layer in layers]
        self._check_overrides()
        return True

    def _planned(self, layer: Layer) -> Plan:
        settings = self._settings()
        for target, changes in self.overrides.items():
            if is_match(layer.name, layer.module, target):
                settings = overridden(settings, changes, target)
        return plan_layer(layer, settings)

    def _check_overrides(self) -> None:
        layers = [plan.layer for plan in self._plans]
        for target in self.overrides:
            if not any(is_match(layer.name, layer.module, target) for layer in layers):
                raise ArgumentError(f"overrides: {target!r} matches no layer that is to be pruned")

    # ---- calibration -----------------------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch what the layers read."""

        def running() -> int:
            return int(state.current_batch_idx)

        def see(layer: Layer, x: Tensor, columns: Columns) -> None:
            self._see(layer, x, columns, self._mask(state))

        self._padding = Padding.of(state.data.calib)
        if self._padding is not None:
            self._watch(state.model.get_input_embeddings(), self._padding.watching(running))
        for plan in self._plans:
            for site in plan.layer.sites:
                self._watch(site.module, reader(plan.layer, site, see))

    def _watch(self, module: nn.Module, hook: Callable[..., None]) -> None:
        def guarded(*arguments: Any) -> None:
            with self._all_or_nothing():
                hook(*arguments)

        self.register_hook(module, guarded, "forward_pre", with_kwargs=True)

    def _mask(self, state: State) -> Tensor | None:
        """Of the running batch: (B, T) bool, True = counts."""
        if state.loss_masks is not None:
            given = state.loss_masks[state.current_batch_idx]
            return None if given is None else given != 0
        return None if self._padding is None else self._padding.mask(state.current_batch_idx)

    def _see(self, layer: Layer, x: Tensor, columns: Columns, mask: Tensor | None) -> None:
        begun = time.perf_counter()
        if layer.name in self._done:
            raise LobsError(
                f"layer {layer.name!r}: it is used again after it was pruned, in a later part of "
                "the network; ignore it, or pass pipeline='basic' to oneshot"
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
        """Prune the layers of the part of the network that has been calibrated: all, then write."""
        with self._all_or_nothing():
            seen = [plan for plan in self._plans if plan.layer.name in self._moments]
            made = [(plan, self._pruned(plan)) for plan in seen]
            for plan, (report, out) in made:
                self._write(plan.layer, out)
                self._done[plan.layer.name] = report
                self._removed += int((~out.mask).sum())
        if not self.keep_originals:
            self._originals.clear()

    def _pruned(self, plan: Plan) -> tuple[LayerReport, PrunedWeight]:
        layer = plan.layer
        moments = self._moments.pop(layer.name)
        if not moments.rows > 0:
            raise LobsError(f"layer {layer.name!r}: all rows that it saw are padding")
        report, out = prune_layer(
            plan,
            moments,
            calibrating=self._seconds.pop(layer.name),
            mask=layer.weight() != 0 if self.preserve_sparsity_mask else None,
            backend=self.backend,
        )
        logger.info(
            f"Pruned {layer.name} to {report.sparsity:.4f} by {report.method}: relative error "
            f"{report.relative_error:.4g}, {report.rows:g} rows, {report.seconds_pruning:.2f} s"
        )
        return report, out

    def _write(self, layer: Layer, out: PrunedWeight) -> None:
        parts = [layer.weight_part] + ([layer.bias_part] if out.bias is not None else [])
        self._originals[layer.name] = {
            part: layer.stored(part).to("cpu", copy=True) for part in parts
        }
        if not _offloaded(layer.module):
            layer.write_back(out.weight, out.bias)
            return
        update_offload_parameter(layer.module, layer.weight_part, layer.unpack(out.weight))
        if out.bias is not None:
            shape = layer.stored(layer.bias_part).shape
            update_offload_parameter(layer.module, layer.bias_part, out.bias.reshape(shape))

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """On any exception the weights are as they were, as far as originals are kept."""
        try:
            yield
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def _restore(self) -> None:
        for plan in self._plans:
            layer = plan.layer
            for part, value in self._originals.pop(layer.name, {}).items():
                if _offloaded(layer.module):
                    update_offload_parameter(layer.module, part, value)
                elif part == layer.weight_part:
                    layer.write_back(layer.pack(value), None)
                else:
                    layer.stored(part).copy_(value)

    # ---- the end ---------------------------------------------------------------------------------

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Refuse to end with layers that were never called."""
        with self._all_or_nothing():
            missing = [p.layer.name for p in self._plans if p.layer.name not in self._done]
            if missing:
                some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise LobsError(
                    f"{len(missing)} of {len(self._plans)} layers were never called during "
                    f"calibration: {some}; add them to ignore, or give data that reaches them"
                )
        self.remove_hooks()
        self._originals.clear()
        self._padding = None

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make the report, and save it where that was asked for."""
        if self._failed:  # llm-compressor ends what failed when its next run begins
            return True
        missing = len(self._plans) - len(self._done)
        if missing:
            self.remove_hooks()
            raise LobsError(
                f"LOBSModifier: {missing} of {len(self._plans)} layers are not pruned: calibration "
                "did not run to its end, or not at all (pass dataset= to oneshot)"
            )
        self._result = report_of(
            list(self._done.values()),
            self._skipped,
            removed=self._removed,
            weights=sum(plan.weights for plan in self._plans),
            seconds=time.perf_counter() - self._begun,
            settings=self._said(),
            host={
                "llmcompressor": str(llmcompressor.__version__),
                "compressed_tensors": str(compressed_tensors.__version__),
            },
            bound="llm-compressor shows the network part by part",
        )
        self._plans = []
        if self.report is not None:
            self._result.save(os.fspath(self.report))
        return True


def _offloaded(module: nn.Module) -> bool:
    return isinstance(module._parameters, OffloadCache)


ModifierFactory.register("LOBSModifier", LOBSModifier)
