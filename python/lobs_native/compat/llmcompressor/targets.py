"""The layers selected by llm-compressor's ``targets`` and ``ignore``."""

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
    """The layers that ``targets`` match and ``ignore`` does not, in module order; and those whose
    inputs cannot be observed from outside, as skipped.

    A target is a module's name, a regular expression for names after ``"re:"``, or a class name. A
    module that contains layers selects all of them. Raises ArgumentError for a target that matches
    nothing.
    """
    wanted: set[nn.Module] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = [module for name, module in model.named_modules() if is_match(name, module, target)]
        if not hits:
            raise ArgumentError(
                f"targets: {target!r} matches no module of {type(model).__name__}; pass a module's "
                "name or class, or 're:' and a regular expression for names"
            )
        wanted.update(inner for module in hits for inner in module.modules())
    ignored = {module for name, module in model.named_modules() if is_match(name, module, ignore)}
    selected, hidden = [], []
    for layer in layers_of(model):
        if layer.module not in wanted or {layer.module, layer.caller} & ignored:
            continue
        if layer.watched:
            reason = "its inputs are internal to another module; use lobs_native.prune"
            weights = layer.groups * layer.rows * layer.width
            hidden.append(Skipped(layer.name, reason, weights))
            continue
        _check(layer)
        selected.append(layer)
    return selected, hidden


def _check(layer: Layer) -> None:
    """``layer.check()`` without the wrapper that llm-compressor's offloading or quantisation may
    have put around the module's forward."""
    module = layer.caller
    marks = ("_original_forward_func", "quantization_scheme")
    wrapped = any(hasattr(module, mark) for mark in marks) and "forward" in vars(module)
    wrapper = vars(module).pop("forward") if wrapped else None
    try:
        layer.check()
    finally:
        if wrapped:
            vars(module)["forward"] = wrapper
