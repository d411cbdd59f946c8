"""Which layers llm-compressor's ``targets`` and ``ignore`` mean."""

from __future__ import annotations

from collections.abc import Sequence

from compressed_tensors.utils import is_match
from torch import nn

from lobs_native.errors import ArgumentError
from lobs_native.layers import Layer, layers_of
from lobs_native.report.records import Skipped

__all__ = ["layers_of_targets"]


def layers_of_targets(
    model: nn.Module, targets: str | Sequence[str], ignore: str | Sequence[str]
) -> tuple[list[Layer], list[Skipped]]:
    """The layers in what ``targets`` match and ``ignore`` does not, in module order, and those that
    can be pruned but not seen from outside.

    A target is a module's name, ``"re:"`` and a regular expression for names, or a class name; of a
    module that contains layers, all of them are meant. Raises ArgumentError for one that matches
    nothing.
    """
    wanted: set[nn.Module] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = [module for name, module in model.named_modules() if is_match(name, module, target)]
        if not hits:
            raise ArgumentError(
                f"targets: {target!r} matches no module of {type(model).__name__}; give a module's "
                "name or class, or 're:' and a regular expression for names"
            )
        wanted.update(inner for module in hits for inner in module.modules())
    ignored = {module for name, module in model.named_modules() if is_match(name, module, ignore)}
    found, hidden = [], []
    for layer in layers_of(model):
        if layer.module not in wanted or {layer.module, layer.caller} & ignored:
            continue
        if layer.watched:
            reason = "its inputs are hidden in another module's forward; use lobs_native.prune"
            hidden.append(Skipped(layer.name, reason))
            continue
        _check(layer)
        found.append(layer)
    return found, hidden


def _check(layer: Layer) -> None:
    """``layer.check()``, with the forward that llm-compressor's offloading or quantisation has put
    around the module's own, if any, out of the way."""
    module = layer.caller
    marks = ("_original_forward_func", "quantization_scheme")
    wrapped = any(hasattr(module, mark) for mark in marks) and "forward" in vars(module)
    around = vars(module).pop("forward") if wrapped else None
    try:
        layer.check()
    finally:
        if wrapped:
            vars(module)["forward"] = around
