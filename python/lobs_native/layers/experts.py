"""Mixtures of experts with stacked weights, (E, outputs, inputs) or (E, inputs, outputs), as in
transformers: every expert is a group with its own second moment.

Each expert is measured on the rows that the router sends it, and all experts count equally. So that
rarely used ones are not sacrificed, the second moment of an expert with few rows is mixed with the
identity, and its weights are not compared with those of others. One that saw no rows is pruned by
magnitude, and a note reports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lobs_native.layers.base import Layer
from lobs_native.layers.matrix import Matrix

__all__ = ["Experts"]

_INPUTS, _OUTPUT = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"


class Experts(Matrix):
    """A layer for each three-dimensional parameter, recognised by its name and shape.

    Among the implementations in transformers, only the plain loop over experts ("eager") multiplies
    by each expert's weight separately. It therefore runs during calibration, whatever the
    configuration.
    """

    routed = True

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        parts = [module._parameters.get(part) for part in (*_INPUTS, _OUTPUT)]
        stacked = [p for p in parts if p is not None and p.ndim == 3]
        same_count = len({len(p) for p in stacked}) == 1
        return type(module) if len(stacked) > 1 and parts[-1] is not None and same_count else None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        layers: list[Layer] = []
        down = module._parameters[_OUTPUT]
        assert down is not None
        for part in (*_INPUTS, _OUTPUT):
            weight = module._parameters.get(part)
            if weight is None or weight.ndim != 3:
                continue
            bias = f"{part}_bias" if module._parameters.get(f"{part}_bias") is not None else ""
            transposed = getattr(module, "is_transposed", None)
            if transposed is None:  # the experts' inputs are as wide as their outputs
                first = next(p for q in _INPUTS if (p := module._parameters.get(q)) is not None)
                transposed = first.shape[2] != down.shape[1]
            kind = type(module).__name__
            layers.append(cls(name, part, module, kind, part, bias, transposed=transposed))
        return layers

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        config = getattr(self.module, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if config is None or before in (None, "eager"):
            yield
            return
        config._experts_implementation = "eager"
        try:
            yield
        finally:
            config._experts_implementation = before
