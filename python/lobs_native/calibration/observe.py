"""Running a model to see how it uses its parameters, in which order it calls its layers, and
whether modules of unknown classes compute what their type describes.

One run on the first batch serves all of this. It is slow, since every operation is looked at. What
that batch does not use is waited for in the next ones at the model's ordinary speed, and only a
batch that does use it is looked at again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lobs_native.calibration.blocks import Sightings
from lobs_native.calibration.flow import Flow, Look
from lobs_native.calibration.hooks import Columns, attached, first_argument, hooked
from lobs_native.calibration.outputs import First, sizes_of
from lobs_native.calibration.seeding import random_state, set_random_state
from lobs_native.calibration.session import Session
from lobs_native.calibration.survey import Survey, Use
from lobs_native.calibration.watch import Touch
from lobs_native.layers import Layer
from lobs_native.layers.own import has_recurrent, recurrent_in_products

__all__ = ["Observation", "observe"]

_CLOSE = 1e-4  # relative distance below which an output counts as equal


@dataclass
class Observation:
    """What was seen on the first batch, and on the next ones until everything had been used."""

    uses: dict[nn.Parameter, Use]
    called: set[str] = field(default_factory=set)  # layers whose modules were called
    unlike: set[str] = field(default_factory=set)  # those that did not return what is expected
    failed: dict[str, str] = field(default_factory=dict)  # watched layer: what it was used by
    seconds: float = 0.0  # that the model's operations took on the first batch
    outputs: list[tuple[int, int]] = field(default_factory=list)  # sizes of what it returned
    look: Look | None = None  # the calls of layers, if the first batch reached all of them
    sightings: Sightings | None = None  # the calls of blocks on the first batch, if asked for

    def flow_of(self, layers: Sequence[Layer]) -> Flow | None:
        """How these layers are called; None if it was not seen for exactly these."""
        if self.look is None or set(map(id, layers)) != set(map(id, self.look.layers)):
            return None
        return self.look.flow()


def observe(
    session: Session,
    layers: Sequence[Layer],
    own: Sequence[nn.Parameter],
    trials: Container[str],
    sightings: Sightings | None = None,
    first: First | None = None,
) -> Observation:
    """Run the model to see how it uses its parameters, until all of these layers and parameters
    have been used; inside :meth:`Session.evaluating`.

    For the layers whose names are in ``trials``, the module's output is compared with what the
    class that their type describes computes from the same input. ``sightings`` watches the first
    batch, and ``first`` keeps what the model returns for it: unless it draws random numbers, of
    which the next batch would then get others, or is computed in another way than usual.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in layers:
        for site in layer.sites:
            for parameter in site.parameters.values():
                owners.setdefault(parameter, []).append(site.caller)
    survey = Survey(session.model, owners)
    seen = Observation(survey.uses, sightings=sightings)
    known = [layer for layer in layers if layer.watched or layer.name not in trials]
    look = Look(known)
    checked: set[str] = set()

    def see(layer: Layer, x: Tensor, columns: Columns) -> None:
        if layer.watched:
            seen.called.add(layer.name)
        with _disable_current_modes():
            if look.batches == 0:
                look.see(layer, x, columns)
            elif not layer.watched and layer.name not in checked:
                next(iter(columns(x)), None)  # an error names the layer if the input does not fit
        checked.add(layer.name)

    def fail(layer: Layer, use: str) -> None:
        seen.failed.setdefault(layer.name, use)

    def leave(layer: Layer, site: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.numel():
                return  # a call with no rows
            seen.called.add(layer.name)
            if layer.name in trials and not _as_described(site, args, kwargs, output):
                seen.unlike.add(layer.name)

        return site.caller.register_forward_hook(hook, with_kwargs=True)

    @contextlib.contextmanager
    def surveying() -> Iterator[None]:
        plain = [(layer, site) for layer in layers if not layer.watched for site in layer.sites]
        with contextlib.ExitStack() as scope:
            scope.enter_context(attached(leave(*pair) for pair in plain))
            for layer in layers:
                scope.enter_context(layer.running())
            scope.enter_context(recurrent_in_products(session.model))
            scope.enter_context(survey.running())
            scope.enter_context(hooked(known, see, fail))
            yield

    def idle() -> tuple[list[Layer], list[nn.Parameter]]:
        """The layers and parameters that have not been used."""
        waiting = [layer for layer in layers if layer.name not in seen.called]
        waiting = [
            layer
            for layer in waiting
            if not any(p in survey.uses and survey.uses[p].used for p in layer.parameters.values())
        ]
        return waiting, [p for p in own if not survey.uses[p].used and p.numel() > max(p.shape)]

    for batch in session.each("survey"):
        if look.batches == 0:
            watching = contextlib.nullcontext() if sightings is None else sightings.watching()
            before = random_state()
            with look.entered(), watching, surveying():
                output = session.call(session.model, batch)
            look.end_batch()
            drawn = not _equal(before, random_state())
            if first is not None and not drawn and not has_recurrent(session.model):
                first.keep(session, batch, output)
            seen.seconds, seen.outputs = survey.seconds, sizes_of(output)
            del output
        else:
            random = random_state()
            if _uses(session, batch, *idle()):
                set_random_state(random)  # for a model that draws the way it takes
                with surveying():
                    session.call(session.model, batch)
        if not any(idle()):
            break
    if look.complete and len(known) == len(layers):
        seen.look = look
    return seen


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(x, others[k]) for k, x in some.items())


def _uses(
    session: Session, batch: Any, layers: Sequence[Layer], parameters: Sequence[nn.Parameter]
) -> bool:
    """Run the model on a batch to see whether it uses any of these layers or parameters."""
    within = [p for layer in layers for p in layer.parameters.values()]
    touch = Touch([*within, *parameters])

    def enter(*_: Any) -> None:
        touch.touched = True

    callers = {site.caller for layer in layers for site in layer.sites}
    with attached(caller.register_forward_pre_hook(enter) for caller in callers), touch:
        session.call(session.model, batch)
    return touch.touched


def _as_described(site: Layer, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a call returned what the described class computes from the same first argument."""
    base = site.base_of(site.module)
    x = first_argument(args, kwargs)
    if base is None or not isinstance(x, Tensor) or not isinstance(output, Tensor):
        return False
    with _disable_current_modes():
        try:
            expected = base.forward(_as_base(site, base), x)
        except Exception:  # inputs that the described class does not take
            return False
        if expected.shape != output.shape or not output.is_floating_point():
            return False
        difference = float((expected.double() - output.double()).norm())
        close = max(_CLOSE, 4 * torch.finfo(output.dtype).eps)
        return difference <= close * float(expected.double().norm())


def _as_base(site: Layer, base: type[nn.Module]) -> nn.Module:
    """The module as an instance of ``base`` itself, with the same tensors."""
    module, twin = site.module, base.__new__(base)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    for part in (site.weight_part, site.bias_part):
        if (
            part
            and module._parameters.get(part) is None
            and getattr(module, part, None) is not None
        ):
            twin.__dict__[part] = site.stored(part)  # it is computed
    return twin
