"""Plain-text tables for a terminal: a report, and a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lobs_native.report.records import Skipped
from lobs_native.report.report import Report
from lobs_native.report.review import causes_of, notes_of, review
from lobs_native.report.text import visible
from lobs_native.solvers.settings import TARGETS

_NAMES = 4  # of layers that are left alone for the same reason


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def plan_table(planned: dict[str, Any]) -> str:
    rows = [("layer", "kind", "shape", "asked", "memory")]
    for layer in planned["layers"]:
        size = f"{layer['bytes'] / 1e6:,.1f} MB"
        shape = " x ".join(map(str, layer["shape"]))
        rows.append((visible(layer["name"]), layer["kind"], shape, layer["asked"], size))
    skipped = _left_alone([Skipped(**entry) for entry in planned["skipped"]])
    weights = sum(layer["weights"] for layer in planned["layers"])
    last = [f"{len(planned['layers'])} layers with {weights:,} weights"]
    if planned["run"] is not None:
        last.append(visible(planned["run"]["text"]))
    return "\n".join([aligned(rows), *skipped, *last])


def _grouped(report: Report) -> list[str]:
    """A line for every kind of note."""
    lines = []
    for note in notes_of(report.layers):
        first, *others = note.layers
        where = f"{len(note.layers)} layers ({first} to {others[-1]})" if others else first
        lines.append(f"{where}: {note.text}")
    return lines


def _left_alone(skipped: Sequence[Skipped]) -> list[str]:
    """A line for each reason why layers were left alone."""
    lines = []
    for cause in causes_of(skipped):
        some = ", ".join(map(visible, cause.names[:_NAMES]))
        more = f" and {len(cause.names) - _NAMES} more" if len(cause.names) > _NAMES else ""
        lines.append(f"skipped {some}{more}: {visible(cause.reason)}")
    return lines


def report_table(report: Report) -> str:
    rows = [("layer", "sparsity", "relative error", "damping")]
    for layer in report.layers:
        error, damping = f"{layer.relative_error:.4g}", f"{layer.damping:g}"
        rows.append((visible(layer.name), f"{layer.sparsity:.4f}", error, damping))
    notes = [visible(line) for line in _grouped(report)]
    notes += _left_alone(report.skipped)
    if (coverage := report.coverage) is not None:
        notes.append(
            f"of all {coverage.total:,} weights: {coverage.pruned:,} in the pruned layers, "
            f"{coverage.on_purpose:,} left out on purpose, {coverage.not_understood:,} not "
            f"understood or impossible to prune; sparsity of the whole network "
            f"{coverage.sparsity:.4f}"
        )
    if searched := report.settings.get("search for a division"):
        notes.append(
            f"{searched['evaluations']} divisions of the budget were tried: the loss on batches "
            f"held back fell from {searched['loss at first']:.4g} to {searched['least loss']:.4g}"
        )
    if (held_back := report.error_bound.held_back) is not None:
        notes.append(
            f"the output moved by {report.error_bound.relative or 0.0:.4g} of its size on the data "
            f"used, by {held_back:.4g} on batches held back"
        )
    notes += [check.said for check in review(report) if check.name == "Held back"]
    if "perplexity after" in report.settings:
        before, after = (report.settings[f"perplexity {when}"] for when in ("before", "after"))
        count = report.settings["tokens held back"]
        shown = [f"{x:.4g}" if isinstance(x, float) else "infinite" for x in (before, after)]
        notes.append(f"perplexity {shown[0]} before, {shown[1]} after, on {count:,} other tokens")
    last = (
        f"removed {report.removed:,} of {report.weights:,} weights ({report.sparsity:.4f}) in "
        f"{report.seconds:.1f} s"
    )
    return "\n".join([aligned(rows), *notes, last])


def in_short(config: dict[str, Any], versions: dict[str, Any]) -> str:
    """The method, the target and the versions of a run in one line."""
    names = (*TARGETS, "pattern", "inputs")
    chosen = [f"{name} {config[name]}" for name in names if config.get(name) is not None]
    software = [f"{name} {version}" for name, version in versions.items()]
    return f"{', '.join([str(config.get('method')), *chosen])}; {', '.join(software)}"
