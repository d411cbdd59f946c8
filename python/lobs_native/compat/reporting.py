"""The report of pruning that was calibrated by a host."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.layers import Layer
from lobs_native.network.selection import weights_of
from lobs_native.report.records import Coverage, ErrorBound, LayerReport, Skipped
from lobs_native.report.report import Report
from lobs_native.version import __version__

__all__ = ["report_of"]

_NOT_CHOSEN = "the host's settings do not choose it"


def _untouched(
    model: nn.Module, layers: Sequence[Layer], skipped: Sequence[Skipped]
) -> list[Skipped]:
    """The parameters of two or more dimensions that belong neither to ``layers`` nor to what is
    ``skipped``, as left out on purpose."""
    modules = dict(model.named_modules())
    prefixes = [x.name if x.name in modules else x.name.rpartition(".")[0] for x in skipped]
    named = [modules[prefix] for prefix in prefixes if prefix]
    taken = {id(p) for layer in layers for p in layer.parameters.values()}
    taken |= {id(p) for module in named for p in module._parameters.values() if p is not None}
    return [
        Skipped(name.removesuffix(".weight"), _NOT_CHOSEN, p.numel(), on_purpose=True)
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in taken
    ]


def report_of(
    layers: Sequence[LayerReport],
    skipped: Sequence[Skipped],
    *,
    model: nn.Module,
    pruned: Sequence[Layer],
    removed: int,
    weights: int,
    seconds: float,
    settings: dict[str, Any],
    host: Mapping[str, str],
    bound: str,
) -> Report:
    """A Report. ``skipped`` is what the host chose and was left alone; what it did not choose of
    ``model`` is added, beside the layers ``pruned``. ``host`` has the versions of the host's
    packages, and ``bound`` the reason why there is no error bound."""
    left = [*skipped, *_untouched(model, pruned, skipped)]
    ours = {"lobs_native": __version__, "torch": str(torch.__version__)}
    return Report(
        layers=tuple(layers),
        skipped=tuple(left),
        error_bound=ErrorBound(covered=False, reason=bound),
        sparsity=removed / weights if weights else 0.0,
        removed=removed,
        weights=weights,
        seconds=seconds,
        settings=settings,
        versions={**ours, **host, "python": platform.python_version()},
        coverage=Coverage.of(sum(map(weights_of, pruned)), left, removed),
    )
