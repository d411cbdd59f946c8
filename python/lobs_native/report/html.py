"""Reports as one HTML page that needs nothing else: no network, no second file. Its script sorts
the layers, and without it everything can be read all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lobs_native.report import page
from lobs_native.report.page import DASH, data, number, percent, text, visible
from lobs_native.report.plots import Curve, panels, plot
from lobs_native.report.review import Check, Note, notes_of, review
from lobs_native.report.runtimes import runtimes

if TYPE_CHECKING:  # report imports this module
    from lobs_native.report.records import ErrorBound, LayerReport
    from lobs_native.report.report import Report

__all__ = ["Curve", "demo_page", "report_page", "visible"]


def report_page(report: Report) -> str:
    """The page that ``Report.save("report.html")`` writes.

    Parameters
    ----------
    report : Report
        What ``prune`` returned. Not modified.

    Returns
    -------
    str
        A whole HTML document with its style and its script inside.
    """
    return page.page("Pruning report", _lead(report) + _report(report))


def demo_page(
    *,
    facts: Mapping[str, str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    legend: str,
    curves: Sequence[Curve],
    before: float,
    report: Report,
    report_title: str,
) -> str:
    """The page that ``lobs-native demo`` writes: a comparison of methods and one full report.

    Parameters
    ----------
    facts : mapping of str to str
        What was done, with what data: shown as a list below the plot.
    header, rows : sequences of str
        The comparison, one row per run. The first column is text, the others are numbers.
    legend : str
        What the columns mean.
    curves : sequence of Curve
        Test error against sparsity, one per method.
    before : float
        Test error before pruning, a fraction: the plot's line without marks.
    report : Report
        The run that is shown in full.
    report_title : str
        Which run that is.

    Returns
    -------
    str
        A whole HTML document with its style, its script and its plot inside.
    """
    body = [
        "<h2>Test error against sparsity</h2>",
        plot(curves, before),
        "<h2>What was done</h2>",
        page.definitions({name: text(value) for name, value in facts.items()}),
        "<h2>All runs</h2>",
        page.plain_table(header, rows, legend),
        f"<h2>{text(report_title)}</h2>",
        _report(report),
    ]
    return page.page("Pruning methods on handwritten digits", "".join(body))


def _report(report: Report) -> str:
    notes = notes_of(report.layers)
    return (
        _unfinished(report)
        + _figures(report)
        + _checks(review(report))
        + _output(report.error_bound)
        + _curves(report.layers)
        + _layers(report, notes)
        + _notes(notes)
        + _left_alone(report)
        + _runtimes(report)
        + _settings(report)
    )


# ---- what to know first --------------------------------------------------------------------------


def _lead(report: Report) -> str:
    told = report.settings
    parts = [
        str(told[name])
        for name in ("model", "model class", "method", "pattern")
        if told.get(name) is not None
    ]
    for name in ("sparsity", "threshold", "max_error", "scope", "inputs"):
        if told.get(name) is not None:
            parts.append(f"{name.replace('_', ' ')} {told[name]}")
    return f'<p class="lead">{text(" · ".join(parts))}</p>\n'


def _unfinished(report: Report) -> str:
    if not report.missing:
        return ""
    done, whole = len(report.layers), len(report.layers) + len(report.missing)
    return (
        f'<div class="alert"><b>Unfinished: {done} of {whole} layers are done.</b> The figures are '
        "of these alone, and nothing is known of the network's output yet. Missing: "
        f"{page.named(report.missing)}</div>\n"
    )


def _figures(report: Report) -> str:
    bound, layers = report.error_bound, report.layers
    figures = [page.figure(data(report.sparsity, percent(report.sparsity)), "sparsity")]
    if bound.relative is not None:
        figures.append(page.figure(data(bound.relative), _change_label(bound)))
    finite = [x for x in layers if math.isfinite(x.relative_error)]
    if finite:
        worst = max(finite, key=lambda x: x.relative_error)
        label = f"largest relative error of a layer: {page.name(worst.name)}"
        figures.append(page.figure(data(worst.relative_error), label))
    removed = f"of {data(report.weights)} weights removed"
    figures += [
        page.figure(data(report.removed), removed),
        page.figure(str(len(layers)), "layers pruned" if len(layers) != 1 else "layer pruned"),
        page.figure(f"{data(report.seconds)} s", "in all"),
    ]
    return f'<div class="figures">{"".join(figures)}</div>\n'


def _change_label(bound: ErrorBound) -> str:
    said = "change of the network's output, relative to it"
    if bound.spectral is None or not bound.output_norm:
        return f"{said}; no bound"
    return f"{said}; at most {data(bound.share(bound.spectral))} by the bound"


def _checks(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        where = f": {page.named(check.layers)}" if check.layers else ""
        kind = ' class="bad"' if not check.good else ' class="seen"' if check.layers else ""
        rows.append(f"<dt>{text(check.name)}</dt><dd{kind}>{text(check.said)}{where}</dd>")
    return f'<dl class="checks">{"".join(rows)}</dl>\n'


def _output(bound: ErrorBound) -> str:
    explained = (
        "<h2>Output of the whole network</h2><p>Distance between the pruned and the original "
        "output, ‖pruned − original‖ / √rows, on the calibration inputs, and what the errors of "
        "the layers guarantee about it (Dong, Chen &amp; Pan 2017).</p>"
    )
    if not bound.covered:
        explained += f'<p class="soft">No bound: {text(bound.reason)}.</p>'
    named = {
        "original output": bound.output_norm,
        "measured distance": bound.measured,
        "bound with spectral norms": bound.spectral,
        "bound with Frobenius norms": bound.frobenius,
    }
    rows = "".join(
        f"<tr><td>{name}</td><td>{data(value)}</td><td>{data(bound.share(value))}</td></tr>\n"
        for name, value in named.items()
        if value is not None
    )
    if not rows:
        return explained
    caption = f"Bounds by {bound.reason}." if bound.covered else ""
    header = ("Quantity", "Value", "Relative to the original output")
    return explained + page.table(header, f"<tbody>\n{rows}</tbody>", caption)


def _curves(layers: Sequence[LayerReport]) -> str:
    if not layers:
        return ""
    said = (
        "Relative error of each layer's output against its sparsity, the same axes everywhere. "
        "Line: what the removals cost along the way, damping included, as far as they were "
        "traced. Disc: where the layer was cut, as measured without damping."
    )
    if not all(layer.curve_sparsity for layer in layers):
        said += (
            " Layers without a line were pruned by a method, or to a mask, that makes no such "
            "curve: it chooses for one sparsity."
        )
    return f'<h2>Error against sparsity</h2><p class="caption">{said}</p>\n{panels(layers)}'


# ---- layers --------------------------------------------------------------------------------------

_MEANINGS = {
    "Relative error": "the measured error over the output's own mean square; bars compare layers",
    "Error measured": "tr(dW H dWᵀ) with the layer's inputs, in float64, from the final weights",
    "inherited": "with corrected inputs, where errors are distances from the original network's "
    "output: what it was before the layer was touched",
    "Error predicted": "what the costs of the removals add up to, with damping; the measured one "
    "should not be above it",
    "Part of bound": "what the layer adds to the bound with spectral norms",
    "Optimality": "how far the kept weights are from the best for their mask, in units of "
    "rounding; below 30, they are it",
    "Condition": "of the damped second moments, estimated from below",
    "Memory, MB": "highest of the process while the layer was pruned, above what it had when the "
    "run began",
}


def _layers(report: Report, notes: Sequence[Note]) -> str:
    layers, parts = report.layers, report.error_bound.parts
    errors = [x.relative_error for x in layers if math.isfinite(x.relative_error)]
    largest = max(errors, default=0.0)
    marks: dict[str, list[int]] = {}
    for k, note in enumerate(notes, 1):
        for name in note.layers:
            marks.setdefault(name, []).append(k)
    rows = [_cells(layer, largest, marks.get(layer.name, []), parts) for layer in layers]
    for name in ("Method", "Events"):  # where they say nothing that is not said elsewhere
        if len({row[name] for row in rows}) == 1 and (name == "Method" or not notes):
            for row in rows:
                del row[name]
    bodies = "".join(
        f"<tbody><tr>{''.join(_cell(*cell) for cell in row.values())}</tr></tbody>\n"
        for row in rows
    )
    header = list(rows[0]) if rows else ["Layer"]
    how = {f"{x.method}, scope {x.scope}, backend {x.backend}" for x in layers}
    same = f"All of them: {how.pop()}. " if len(how) == 1 else ""
    caption = f"Layers, in the order they were pruned in. {same}A heading sorts by its column."
    told = {*header, *(["inherited"] if any(x.inherited is not None for x in layers) else [])}
    legend = page.definitions({k: text(said) for k, said in _MEANINGS.items() if k in told})
    return (
        f"<h2>Layers</h2>{page.table(header, bodies, caption, kind='layers')}"
        f'<details class="legend"><summary>What the columns mean</summary>{legend}</details>\n'
    )


_Cell = tuple[float | None, str] | tuple[str]


def _cell(*cell: Any) -> str:
    """Of (markup), or (number, markup): the number is what it is sorted by."""
    if len(cell) == 1:
        return f"<td>{cell[0]}</td>"
    value, shown = cell
    return f'<td data-v="{"" if value is None else repr(value)}">{shown}</td>'


def _cells(
    layer: LayerReport, largest: float, marks: Sequence[int], parts: Mapping[str, float] | None
) -> dict[str, _Cell]:
    """A row, by the names of its columns."""

    def plain(value: float | None, small: str = "") -> _Cell:
        return value, number(value) + _small(small)

    def size(value: int | None, small: str = "") -> _Cell:
        return value, (DASH if value is None else f"{value / 1e6:,.0f}") + _small(small)

    shape = " × ".join(map(str, layer.shape))
    asked = layer.damping not in (0.0, layer.damping_asked)
    inherited = "" if layer.inherited is None else f"inherited {number(layer.inherited)}"
    device = layer.peak_memory_device
    on_device = "" if device is None else f"{device / 1e6:,.0f} on device"
    events = [] if layer.status == "ok" else [f'<span class="status">{text(layer.status)}</span>']
    if marks:
        told = "; ".join(layer.notes)
        events.append(
            f'<span class="ref" title="{text(told)}">note {", ".join(map(str, marks))}</span>'
        )
    return {
        "Layer": (page.name(layer.name) + _small(f"{layer.kind} {shape}"),),
        "Sparsity": (layer.sparsity, percent(layer.sparsity) + _small(_asked(layer))),
        "Relative error": (
            layer.relative_error,
            number(layer.relative_error) + _bar(layer.relative_error, largest),
        ),
        "Error measured": plain(layer.error, inherited),
        "Error predicted": plain(layer.predicted),
        **({} if parts is None else {"Part of bound": plain(parts.get(layer.name))}),
        "Optimality": plain(layer.optimality, f"{layer.swaps:,} swaps" if layer.swaps else ""),
        "Damping": (
            layer.damping,
            f"{layer.damping:g}" + _small(f"asked {layer.damping_asked:g}" if asked else ""),
        ),
        "Condition": (
            layer.condition,
            DASH if layer.condition is None else f"{layer.condition:.1e}".replace("e+0", "e"),
        ),
        "Rows seen": plain(layer.rows, f"of {layer.columns:,} columns"),
        "Dead inputs": plain(layer.dead_columns),
        "Calibrate, s": plain(layer.seconds_calibrating),
        "Prune, s": plain(layer.seconds_pruning),
        "Memory, MB": size(layer.peak_memory, on_device),
        "Method": (text(layer.method) + _small(f"{layer.scope}; {layer.backend}"),),
        "Events": (" ".join(events),),
    }


def _asked(layer: LayerReport) -> str:
    name, _, value = layer.asked.partition(" ")
    try:
        return f"asked {percent(float(value))}" if name == "sparsity" else f"asked: {layer.asked}"
    except ValueError:
        return f"asked: {layer.asked}"


def _small(value: str) -> str:
    return f"<small>{text(value)}</small>" if value else ""


def _bar(value: float, largest: float) -> str:
    """``value`` as a share of ``largest``; an infinity fills the bar."""
    share = min(1.0, value / largest) if largest > 0 else 0.0
    width = 100.0 * share if math.isfinite(value) else 100.0
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="100" height="8"></rect><rect width="{width:.2f}" height="8"></rect></svg>'
    )


def _notes(notes: Sequence[Note]) -> str:
    if not notes:
        return ""
    items = "".join(
        f"<li><b>{k}</b><div>{text(note.text)}<br>{page.named(note.layers)}</div></li>\n"
        for k, note in enumerate(notes, 1)
    )
    said = "What was done differently from what was asked, or is to be known, and where."
    return f'<h2>Notes</h2><p class="caption">{said}</p><ol class="notes">{items}</ol>\n'


# ---- the rest ------------------------------------------------------------------------------------


def _left_alone(report: Report) -> str:
    if not report.skipped:
        return ""
    rows = [(layer.name, layer.reason) for layer in report.skipped]
    return "<h2>Layers left alone</h2>" + page.plain_table(("Layer", "Why"), rows, kind="words")


def _runtimes(report: Report) -> str:
    found = runtimes(report.layers, str(report.settings.get("pattern")))
    rows = [(x.where, x.faster, x.why) for x in found]
    said = (
        "A pruned network is a dense one with zeros in it: smaller when it is compressed, and "
        "faster only where something uses the zeros. As known in November 2026."
    )
    header = ("Where", "Faster?", "Why")
    return (
        "<h2>Where this sparsity runs faster today, and where it does not</h2>"
        + page.plain_table(header, rows, said, kind="words three")
    )


_ASKED = (
    *("model", "model class", "dtype", "method", "pattern", "sparsity", "threshold", "max_error"),
    *("scope", "inputs", "refine", "damping", "prune_bias", "spread", "sensitivity", "budget"),
    *("include", "exclude", "overrides", "memory", "device", "backend", "blocks", "token_mask"),
    "seed",
)


def _settings(report: Report) -> str:
    told = report.settings
    asked = {k: told[k] for k in _ASKED if told.get(k) is not None}
    unset = [k for k in _ASKED if k in told and told[k] is None]
    done = {k: v for k, v in told.items() if k not in _ASKED}
    shown = {name: _setting(name, value) for name, value in asked.items()}
    if unset:
        shown["not set"] = text(", ".join(unset))
    parts = [("What was asked", shown)] if shown else []
    if done:
        parts.append(("What was done", {name: _setting(name, v) for name, v in done.items()}))
    parts.append(("Versions", {name: text(v) for name, v in report.versions.items()}))
    return "".join(f"<h2>{title}</h2>{page.definitions(pairs)}\n" for title, pairs in parts)


_BYTES = {"memory", "layer", "statistics", "states", "kept", "disk", "limit", "scratch"}


def _setting(name: str, value: Any) -> str:
    """A setting as markup."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping) and value:
        return page.definitions({str(k): _setting(str(k), v) for k, v in value.items()})
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_setting("", x) for x in value) or "none"
    if type(value) in (int, float):
        size = type(value) is int and (
            name in _BYTES or name.endswith("_limit") or name.startswith("peak memory")
        )
        return data(value, f"{value / 1e6:,.1f} MB" if size else f"{value:,}")
    return text(json.dumps(value, default=str))
