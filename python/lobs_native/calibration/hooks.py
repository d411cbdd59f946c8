"""Hooks that observe the inputs of layers, and forward passes that end early."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.watch import Columns, Fail, See, Watch
from lobs_native.errors import DtypeError
from lobs_native.layers import Layer

__all__ = [
    "Columns",
    "Enough",
    "See",
    "attached",
    "ending",
    "first_argument",
    "hooked",
    "reader",
    "unfused_attention",
    "without_caches",
]


class Enough(BaseException):
    """Ends a forward pass once nothing more is needed from it. It is not an Exception, so that a
    model that catches exceptions lets it through."""


@contextlib.contextmanager
def attached(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks at the end."""
    registered: list[Any] = []
    try:
        registered.extend(handles)
        yield
    finally:
        for handle in registered:
            handle.remove()


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with first, by place or by name; None if with nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


def reader(layer: Layer, site: Layer, see: See) -> Callable[..., None]:
    """A forward pre-hook (with keyword arguments) for ``site``, one of the uses of ``layer``. It
    calls ``see(layer, inputs, columns)``."""
    signature = inspect.signature(type(site.module).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *inputs = signature.bind(module, *args, **kwargs).args
        if not inputs or not isinstance(inputs[0], Tensor):
            kind = f"a {type(inputs[0]).__name__}" if inputs else "no argument"
            raise DtypeError(f"layer {site.name!r}: called with {kind} instead of a tensor")
        x, *others = inputs
        if x.is_nested:
            x = _flat(layer, x)
        see(layer, x, lambda x: site.columns(x, *others))

    return hook


def _flat(layer: Layer, nested: Tensor) -> Tensor:
    """The rows (n, C) of a nested tensor."""
    if not layer.token_rows:
        raise DtypeError(
            f"layer {layer.name!r}: called on a nested tensor; pass padded tensors, or exclude it"
        )
    return torch.cat([part.reshape(-1, layer.width) for part in nested.unbind()])


@contextlib.contextmanager
def hooked(layers: Sequence[Layer], see: See, fail: Fail | None = None) -> Iterator[None]:
    """Call ``see(layer, inputs, columns)`` whenever a layer is called; ``columns(inputs)`` yields
    the inputs as pairs (group, X) with X (n, C). For ``fail`` see :class:`Watch`."""
    with contextlib.ExitStack() as scope:
        scope.enter_context(unfused_attention())
        for layer in layers:
            scope.enter_context(layer.running())
            for site in layer.sites if not layer.watched else ():
                hook = reader(layer, site, see)
                handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
                scope.callback(handle.remove)
        if watched := [layer for layer in layers if layer.watched]:
            scope.enter_context(Watch(watched, see, fail))
        yield


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Turn off torch's fused attention, which hides the inputs of its output projection and passes
    nested tensors from one encoder layer to the next."""
    before = bool(torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def ending(until: nn.Module | None) -> Iterator[None]:
    """Raise Enough as soon as ``until`` has returned, which ends the forward pass."""

    def stop(*_: Any) -> None:
        raise Enough

    with attached([] if until is None else [until.register_forward_hook(stop)]):
        yield


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Turn off ``use_cache`` in the configurations of the model and its parts, and in those inside
    these. A cache would only take memory, and each block of a stack would write to it."""
    waiting = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    configs: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            inner = getattr(config, "__dict__", {}).values()
            waiting.extend(value for value in inner if hasattr(value, "use_cache"))
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
