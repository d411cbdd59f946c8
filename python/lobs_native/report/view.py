"""What the page of a report shows beside the report's own fields, as plain data for templates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lobs_native.report import quantizers, runtimes
from lobs_native.report.charts import LayerCharts, layer_charts
from lobs_native.report.layer_table import LayerTable, layer_table
from lobs_native.report.records import Coverage, ErrorBound, LayerReport, ReportRecord
from lobs_native.report.review import Cause, Check, Note, causes_of, notes_of, review
from lobs_native.report.text import DASH

__all__ = ["Quantity", "ReportView", "report_view"]


@dataclass(frozen=True)
class Quantity:
    """A number, and how it is read."""

    value: float
    text: str


Setting: TypeAlias = "str | Quantity | tuple[Setting, ...] | dict[str, Setting]"


@dataclass(frozen=True)
class ReportView:
    """Everything that is computed for the page."""

    summary: tuple[str, ...]  # the run in a few words
    worst: LayerReport | None  # the layer with the largest finite error
    checks: tuple[Check, ...]
    distances: tuple[tuple[str, float], ...]  # the known ones of the network's output
    charts: LayerCharts
    table: LayerTable
    notes: tuple[Note, ...]
    causes: tuple[Cause, ...]  # why weights were left alone
    weights: tuple[tuple[str, int, float], ...]  # of the network: what became of them, and shares
    runtimes: tuple[runtimes.Runtime, ...]
    runtimes_as_of: str
    quantizers: tuple[str, str]  # sentences about them
    requested: dict[str, Setting]
    recorded: dict[str, Setting]  # during the run


def report_view(report: ReportRecord) -> ReportView:
    """Compute what the page of this report shows."""
    notes = notes_of(report.layers)
    finite = [x for x in report.layers if math.isfinite(x.relative_error)]
    requested, recorded = _settings(report.settings)
    return ReportView(
        summary=_summary(report.settings),
        worst=max(finite, key=lambda x: x.relative_error, default=None),
        checks=review(report),
        distances=_distances(report.error_bound),
        charts=layer_charts(report.layers),
        table=layer_table(report.layers, notes, report.error_bound.parts),
        notes=notes,
        causes=causes_of(report.skipped),
        weights=_weights(report.coverage),
        runtimes=runtimes.runtimes_for(report.layers, str(report.settings.get("pattern"))),
        runtimes_as_of=runtimes.as_of(),
        quantizers=quantizers.sentences(),
        requested=requested,
        recorded=recorded,
    )


def _summary(settings: Mapping[str, Any]) -> tuple[str, ...]:
    bare = ("model", "model class", "method", "pattern")
    named = ("sparsity", "threshold", "max_error", "scope", "inputs")
    return (
        *(str(settings[k]) for k in bare if settings.get(k) is not None),
        *(f"{k.replace('_', ' ')} {settings[k]}" for k in named if settings.get(k) is not None),
    )


def _weights(coverage: Coverage | None) -> tuple[tuple[str, int, float], ...]:
    if coverage is None or not coverage.total:
        return ()
    counts = {
        "in the pruned layers": coverage.pruned,
        "left out on purpose": coverage.on_purpose,
        "not understood, or impossible to prune": coverage.not_understood,
        "in all": coverage.total,
    }
    return tuple((what, count, count / coverage.total) for what, count in counts.items())


def _distances(bound: ErrorBound) -> tuple[tuple[str, float], ...]:
    where = "" if bound.rows is None else f", {bound.rows:,.0f} rows in {bound.batches} batches"
    distances = {
        "original output": bound.output_norm,
        f"measured distance{where}": bound.measured,
        "the same on batches held back": _held_back(bound),
        "bound with spectral norms": bound.spectral,
        "bound with Frobenius norms": bound.frobenius,
    }
    return tuple((name, value) for name, value in distances.items() if value is not None)


def _held_back(bound: ErrorBound) -> float | None:
    """The distance on the batches held back, for outputs of the size of the others."""
    if bound.held_back is None or bound.output_norm is None:
        return None
    return bound.held_back * bound.output_norm


# ---- settings ------------------------------------------------------------------------------------

_ARGUMENTS = (
    *("model", "model class", "dtype", "method", "pattern", "sparsity", "threshold", "max_error"),
    *("scope", "inputs", "refine", "damping", "prune_bias", "spread", "sensitivity"),
    *("token_weights", "budget", "search", "search_seconds", "include", "exclude", "overrides"),
    *("strict", "memory", "device", "backend", "blocks", "tune", "tune_passes", "tune_rate"),
    *("classes",),
    *("token_mask", "measure", "held_back", "seed"),
)
_BYTES = {"memory", "layer", "statistics", "states", "kept", "disk", "limit", "scratch"}
_BYTES |= {"output", "masks", "network", "offloaded", "pieces", "token_weights"}


def _settings(settings: Mapping[str, Any]) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """The arguments of the run, and what was recorded while it ran."""
    requested = {k: _setting(k, settings[k]) for k in _ARGUMENTS if settings.get(k) is not None}
    unset = [k for k in _ARGUMENTS if k in settings and settings[k] is None]
    if unset:
        requested["not set"] = ", ".join(unset)
    recorded = {k: _setting(k, v) for k, v in settings.items() if k not in _ARGUMENTS}
    return requested, recorded


def _setting(name: str, value: Any) -> Setting:
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value:
        return {str(k): _setting(str(k), v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_setting("", x) for x in value) or "none"
    if type(value) in (int, float):
        in_bytes = type(value) is int and (
            name in _BYTES or name.endswith("_limit") or name.startswith("peak memory")
        )
        return Quantity(value, f"{value / 1e6:,.1f} MB" if in_bytes else f"{value:,}")
    return json.dumps(value, default=str)
