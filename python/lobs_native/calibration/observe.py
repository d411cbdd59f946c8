"""Running a model to see how it uses its parameters, and whether modules of unknown classes compute
what their type describes."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lobs_native.calibration.hooks import Columns, attached, reader
from lobs_native.calibration.session import Session
from lobs_native.calibration.survey import Survey, Use
from lobs_native.calibration.watch import Watch
from lobs_native.layers import Layer
from lobs_native.layers.own import recurrent_in_products

__all__ = ["Observation", "observe"]

_CLOSE = 1e-4  # relative distance below which an output counts as equal


@dataclass
class Observation:
    """What was seen on the first batch, and on the next ones until everything had been used."""

    uses: dict[nn.Parameter, Use]
    called: set[str] = field(default_factory=set)  # layers whose modules were called
    unlike: set[str] = field(default_factory=set)  # those that did not return what is expected
    failed: dict[str, str] = field(default_factory=dict)  # watched layer: what it was used by


def observe(
    session: Session,
    layers: Sequence[Layer],
    own: Sequence[nn.Parameter],
    trials: Container[str],
) -> Observation:
    """Run the model to see how it uses its parameters, until all of these layers and parameters
    have been used; inside :meth:`Session.evaluating`.

    For the layers whose names are in ``trials``, the module's output is compared with what the
    class that their type describes computes from the same input.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in layers:
        for site in layer.sites:
            for parameter in site.parameters.values():
                owners.setdefault(parameter, []).append(site.caller)
    survey = Survey(session.model, owners)
    seen = Observation(survey.uses)

    def leave(layer: Layer, site: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.numel():
                return  # a call with no rows
            seen.called.add(layer.name)
            if layer.name in trials and not _as_described(site, args, kwargs, output):
                seen.unlike.add(layer.name)

        return site.caller.register_forward_hook(hook, with_kwargs=True)

    def fail(layer: Layer, use: str) -> None:
        seen.failed.setdefault(layer.name, use)

    def used(layer: Layer) -> bool:
        parameters = (survey.uses.get(p) for p in layer.parameters.values())
        return layer.name in seen.called or any(use is not None and use.used for use in parameters)

    watched = [layer for layer in layers if layer.watched]
    plain = [(layer, site) for layer in layers if not layer.watched for site in layer.sites]
    checked: set[str] = set()

    def check(layer: Layer, x: Tensor, columns: Columns) -> None:
        if layer.name not in checked:
            checked.add(layer.name)
            next(iter(columns(x)), None)  # an error names the layer if the input does not fit

    def enter(layer: Layer, site: Layer) -> Any:
        hook = reader(layer, site, check)
        return site.module.register_forward_pre_hook(hook, with_kwargs=True)

    known = [(layer, site) for layer, site in plain if layer.name not in trials]
    handles = [*(enter(*pair) for pair in known), *(leave(*pair) for pair in plain)]
    with contextlib.ExitStack() as scope:
        scope.enter_context(attached(handles))
        for layer in layers:
            scope.enter_context(layer.running())
        scope.enter_context(recurrent_in_products(session.model))
        scope.enter_context(survey.running())
        scope.enter_context(Watch(watched, lambda layer, *_: seen.called.add(layer.name), fail))
        for batch in session.each("survey"):
            session.call(session.model, batch)
            idle = any(not survey.uses[p].used for p in own if p.numel() > max(p.shape))
            if not idle and all(map(used, layers)):
                break
    return seen


def _as_described(site: Layer, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a call returned what the described class computes from the same first argument."""
    base = site.base_of(site.module)
    x = args[0] if args else next(iter(kwargs.values()), None)
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
