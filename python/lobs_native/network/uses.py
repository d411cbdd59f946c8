"""From how a model uses its parameters to the layers that are pruned, and the reasons why others
are not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from lobs_native.calibration.blocks import Sightings
from lobs_native.calibration.observe import Observation, observe
from lobs_native.calibration.outputs import First
from lobs_native.calibration.session import Session
from lobs_native.calibration.survey import Use
from lobs_native.calibration.watch import unobservable
from lobs_native.errors import ArgumentError, DtypeError, LobsError, PatternError, ShapeError
from lobs_native.layers import Layer
from lobs_native.layers.block import group_step
from lobs_native.layers.own import MixedConv, Own, OwnConv, OwnConvTranspose, Product
from lobs_native.network.conventions import MIXING
from lobs_native.network.coverage import nothing_left
from lobs_native.network.selection import (
    Candidates,
    LayerJob,
    job_of,
    reason_of,
    weights_of,
)
from lobs_native.network.settings import NetworkSettings
from lobs_native.report.records import Skipped

__all__ = ["Reason", "Settled", "settle", "without_data"]

# Operations that subtract a mean.
_STANDARDIZING = {"native_batch_norm", "_native_batch_norm_legit", "native_layer_norm", "var_mean"}
_STANDARDIZING |= {"_native_batch_norm_legit_no_training", "cudnn_batch_norm", "mean", "std_mean"}


@dataclass(frozen=True)
class Reason:
    """Why a weight is not pruned."""

    text: str
    on_purpose: bool = False
    error: LobsError | None = None  # the one that says more

    def as_error(self, name: str) -> LobsError:
        """The error for the layer of this name."""
        if self.error is not None:
            return self.error
        return ArgumentError(f"layer {name!r}: {self.text}; leave it out (exclude)")


@dataclass
class Settled:
    """The layers to prune, and all that is left alone."""

    jobs: list[LayerJob] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    errors: list[LobsError] = field(default_factory=list)
    seen: Observation | None = None  # of the run of the model, if there was one

    def add(self, made: LayerJob | Reason, name: str, weights: int) -> None:
        """Add a layer, or the reason why it is left alone."""
        if isinstance(made, LayerJob):
            self.jobs.append(made)
            return
        self.skipped.append(Skipped(name, made.text, weights, made.on_purpose))
        if made.error is not None:
            self.errors.append(made.error)

    def check(self) -> Settled:
        """Raise if there is no layer: the first error, if one says more than the reasons."""
        if not self.jobs:
            raise self.errors[0] if self.errors else ArgumentError(nothing_left(self.skipped))
        return self


def _is_settled(layer: Layer) -> bool:
    """Whether the module is of the very class that the layer type describes."""
    base = layer.base_of(layer.caller)
    return layer.forward_is_known() and base is not None and type(layer.caller) is base


def settle(
    candidates: Candidates, session: Session, settings: NetworkSettings, first: First | None = None
) -> Settled:
    """Run the model to see how it uses the candidates, and decide what is pruned and how. ``first``
    keeps what it returns for the first batch.

    A layer that cannot be pruned is an error with ``strict``, or if ``include`` names it.
    """
    trials = {x.name for x in candidates.layers if not x.watched and not _is_settled(x)}
    own = [x.parameter for x in candidates.own]
    sightings = None
    if settings.inputs != "dense" and settings.blocks == "auto":
        sightings = Sightings(session.model, [layer.name for layer in candidates.layers])
    try:
        seen = observe(session, candidates.layers, own, trials, sightings, first)
    except (RuntimeError, NotImplementedError) as error:
        empty = [name for name, p in session.model.named_parameters() if p.is_meta]
        if isinstance(error, LobsError) or not empty:
            raise
        raise DtypeError(
            f"model: {', '.join(empty[:4])}{' ...' if len(empty) > 4 else ''} on the meta device, "
            f"and the model does not run without their values ({' '.join(str(error).split())}); "
            "load or materialise them first"
        ) from error
    modules = dict(session.model.named_modules())
    settled = Settled([], [*candidates.skipped], [*candidates.errors], seen)

    def decided(
        made: Layer | Reason, name: str, parameters: Collection[nn.Parameter]
    ) -> LayerJob | Reason:
        routes = any(p in seen.uses and seen.uses[p].routes for p in parameters)
        if routes and name not in candidates.named:
            made = Reason(MIXING, on_purpose=True)
        decision = _job_or_reason(made, settings)
        session.unused(*parameters)
        return decision

    for layer in candidates.layers:
        of_layer = _of_layer(layer, seen, modules)
        made = decided(of_layer, layer.name, layer.parameters.values())
        _refuse(made, layer.name, settings, candidates)
        settled.add(made, layer.name, weights_of(layer))
    found = []
    for x in candidates.own:
        of_own = _of_own(x, seen.uses[x.parameter], seen, modules)
        found.append((x, decided(of_own, x.name, [x.parameter])))
    of_layers = {
        id(parameter)
        for _, made in found
        if isinstance(made, LayerJob)
        for parameter in made.layer.parameters.values()
    }
    for x, made in found:
        if isinstance(made, LayerJob) or id(x.parameter) not in of_layers:  # else it is a bias
            _refuse(made, x.name, settings, candidates)
            settled.add(made, x.name, x.parameter.numel())
    return settled.check()


def without_data(candidates: Candidates, settings: NetworkSettings) -> Settled:
    """What can be said before the model has run: the layers of known types, in module order, and
    all that is left alone or depends on how the model uses it."""
    settled = Settled([], [*candidates.skipped], [*candidates.errors])
    for layer in candidates.layers:
        made = _job_or_reason(layer, settings)
        _refuse(made, layer.name, settings, candidates)
        settled.add(made, layer.name, weights_of(layer))
    later = Reason("whether it can be pruned is seen when the model runs; pass data")
    for own in candidates.own:
        settled.add(later, own.name, own.parameter.numel())
    return settled if candidates.own else settled.check()


def _refuse(
    made: LayerJob | Reason, name: str, settings: NetworkSettings, candidates: Candidates
) -> None:
    """Raise if a layer is left alone that must not be."""
    if isinstance(made, Reason) and (
        (settings.strict and not made.on_purpose) or name in candidates.named
    ):
        raise made.as_error(name)


def _job_or_reason(made: Layer | Reason, settings: NetworkSettings) -> LayerJob | Reason:
    """The job of a layer; or why its settings do not fit it."""
    if isinstance(made, Reason):
        return made
    own, shared = settings.for_layer(made.name)
    try:
        return job_of(made, own, shared)
    except (ArgumentError, DtypeError, PatternError, ShapeError) as error:
        return Reason(reason_of(made, error), error=error)


# ---- known types ---------------------------------------------------------------------------------


def _of_layer(
    layer: Layer,
    seen: Observation,
    modules: dict[str, nn.Module],
) -> Layer | Reason:
    """A layer of a known type, as it is to be pruned."""
    if layer.watched:
        if layer.name in seen.failed:
            error = unobservable(layer, seen.failed[layer.name])
            return Reason(reason_of(layer, error), error=error)
        if layer.name not in seen.called:
            return _never_called(layer)
        if not layer.forward_is_known():
            layer.bias_part = ""
            layer.notes.append("its module has a forward of its own, so its bias was not updated")
        return layer
    parameter = layer.module._parameters.get(layer.weight_part)
    use = None if parameter is None else seen.uses[parameter]
    outside = set() if use is None else use.outside
    as_described = layer.name in seen.called and layer.name not in seen.unlike
    if as_described and not outside:
        return layer
    if parameter is None:
        if layer.name not in seen.called:
            return _never_called(layer)
        return Reason("its module does not return what its weight and input alone would give")
    assert use is not None
    if not use.used:
        return _never_called(layer)
    if len(layer.sites) > 1:
        return Reason("its weight is shared, and used by other means than calls of its modules")
    own = Own(layer.name, layer.prefix, layer.module, layer.weight_part, parameter)
    made = _of_own(own, use, seen, modules)
    if isinstance(made, Reason):
        if outside:
            return Reason(f"outside the calls of its module, {made.text}", made.on_purpose)
        text = f"in a forward of its own, {made.text}; a layer type can describe it"
        more = ", or lobs_native.fold_weights replace it" if use.changed else ""
        return Reason(f"{text} (lobs_native.register_layer){more}")
    made.notes[:] = [*layer.notes, *made.notes]
    if made.bias() is None and layer.bias() is not None:
        made.notes.append("its bias was not updated: it is not seen to be added in each product")
    return made


def _never_called(layer: Layer) -> Reason:
    return Reason(
        "never called on the calibration data",
        error=ArgumentError(
            f"calibration: the model never calls {layer.name!r} on it, or only without rows; pass "
            "batches that reach it, or leave it out of include"
        ),
    )


# ---- parameters of any module --------------------------------------------------------------------


def _of_own(own: Own, use: Use, seen: Observation, modules: dict[str, nn.Module]) -> Layer | Reason:
    """A parameter as a layer, if it is the plain operand of products or convolutions."""
    if own.parameter.is_meta:
        return Reason("it has no values here (meta device)")
    if not use.plain:
        return _reason(use)
    made = _made(own, use, seen, modules)
    if isinstance(made, Layer):
        assert use.callers is not None
        made.around_all, made.around_some = tuple(use.callers), frozenset(use.some)
    return made


def _made(own: Own, use: Use, seen: Observation, modules: dict[str, nn.Module]) -> Layer | Reason:
    """The layer of a plain operand."""
    assert use.callers is not None
    caller = use.callers[-1]
    if use.calls:
        if len(use.calls) > 1:
            return Reason("it is used in convolutions of several forms")
        (call,) = use.calls
        bias = _bias(own, use, seen, modules, (call.out_channels,))
        kind = OwnConvTranspose if call.transposed else OwnConv
        return kind(own, bias, call=call, caller=caller)
    parameter = own.parameter
    if use.mixed:
        if len(use.mixed) > 1:
            return Reason("filters are mixed from it for convolutions of several forms")
        if sum(use.mixed.values()) != sum(use.blocks.values()):  # samples, and rows of products
            return Reason("filters are mixed from it, and it is multiplied otherwise as well")
        if use.mixed_otherwise:
            return Reason("filters are mixed from it that are used otherwise as well")
        (call,) = use.mixed
        return MixedConv(own, call=call, caller=caller)
    first = next(iter(use.blocks))
    apart = group_step(first, parameter.numel()) if parameter.is_contiguous() else None
    alike = {(block.rows, block.columns) for block in use.blocks}
    if apart is None or len(alike) > 1 or any(block.offset % apart for block in use.blocks):
        return Reason("it is multiplied in several ways: in parts, or in two orientations")
    groups, R = parameter.numel() // first.size, first.shape[0]
    counts = [use.blocks.get(block, 0) for block in use.blocks]
    in_order = all(use.shifts.get(b) == {b.offset // apart * R} for b in use.blocks)
    shape = (groups, R) if groups > 1 else (R,)
    return Product(
        own,
        _bias(own, use, seen, modules, shape) if in_order else "",
        block=first,
        apart=apart,
        caller=caller,
        routed=groups > 1 and (len(counts) < groups or len(set(counts)) > 1),
    )


def _bias(
    own: Own,
    use: Use,
    seen: Observation,
    modules: dict[str, nn.Module],
    shape: tuple[int, ...],
) -> str:
    """The bias of this shape that is added in every product of a weight and nowhere else, if its
    module has it; otherwise ""."""
    if len(use.biases) != 1 or (name := next(iter(use.biases))) is None:
        return ""
    prefix, _, part = name.rpartition(".")
    if prefix != own.prefix or modules[prefix] is not own.module:
        return ""
    bias = own.module._parameters[part]
    assert bias is not None
    of_bias = seen.uses[bias]
    elsewhere = of_bias.blocks or of_bias.calls or of_bias.changed or of_bias.looked_up
    elsewhere = elsewhere or of_bias.entrywise or of_bias.others
    users = [u for u in seen.uses.values() if name in u.biases]
    unlike = bias.shape != shape or not bias.is_contiguous()
    return "" if elsewhere or len(users) > 1 or unlike else part


def _reason(use: Use) -> Reason:
    """Why a parameter is no plain operand."""

    def listed(operations: dict[str, None]) -> str:
        return ", ".join(f"aten::{name}" for name in operations)

    if not use.used:
        return Reason("it is not used on the calibration data")
    multiplied = bool(use.blocks or use.calls)
    if use.mixed_bias:
        return Reason("biases are mixed from it, which are added to products", True)
    if use.both:
        return Reason("it is multiplied with another weight, or made into one by activations")
    if use.changed.keys() & _STANDARDIZING:
        return Reason(
            f"it is centered or standardized ({listed(use.changed)}) before it is multiplied, so "
            "that zeros in it would not stay zeros; lobs_native.fold_weights puts a plain "
            "convolution or linear layer with the resulting weight in its place"
        )
    if use.changed:
        return Reason(
            f"it is copied or changed ({listed(use.changed)}) before it is multiplied, so that its "
            "inputs are not seen"
        )
    if use.others:
        return Reason(f"it is used by {listed(use.others)}, which is no product with one input")
    if use.parts:
        return Reason("it is multiplied in parts that do not lie together in memory")
    if multiplied and use.looked_up:
        return Reason(f"it is looked up as well ({listed(use.looked_up)})", on_purpose=True)
    if multiplied:
        return Reason(f"it is multiplied, and used otherwise as well ({listed(use.entrywise)})")
    if use.looked_up:
        return Reason(
            f"it is a table that is looked up ({listed(use.looked_up)}), not multiplied", True
        )
    if use.added:
        return Reason("it is a bias, which is added to products", True)
    if use.inputs:
        return Reason("it is a learned input of layers, not a weight of one", True)
    if use.entrywise:
        return Reason(
            f"it is combined with activations entry by entry ({listed(use.entrywise)}), not "
            "multiplied as a matrix",
            True,
        )
    return Reason("nothing is multiplied with it", True)
