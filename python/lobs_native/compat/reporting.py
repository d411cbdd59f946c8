"""The report of pruning that was calibrated by a host."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lobs_native.report.records import ErrorBound, LayerReport, Skipped
from lobs_native.report.report import Report
from lobs_native.version import __version__

__all__ = ["report_of"]


def report_of(
    layers: Sequence[LayerReport],
    skipped: Sequence[Skipped],
    *,
    removed: int,
    weights: int,
    seconds: float,
    settings: dict[str, Any],
    host: Mapping[str, str],
    bound: str,
) -> Report:
    """A Report. ``host`` has the versions of the host's packages, and ``bound`` the reason why
    there is no error bound."""
    ours = {"lobs_native": __version__, "torch": str(torch.__version__)}
    return Report(
        layers=tuple(layers),
        skipped=tuple(skipped),
        error_bound=ErrorBound(covered=False, reason=bound),
        sparsity=removed / weights if weights else 0.0,
        removed=removed,
        weights=weights,
        seconds=seconds,
        settings=settings,
        versions={**ours, **host, "python": platform.python_version()},
    )
