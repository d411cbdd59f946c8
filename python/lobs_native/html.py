"""Reports as one HTML page that needs nothing else: no script, no network, no second file.

Whatever comes from outside (layer names above all) passes through :func:`visible` and
``html.escape`` before it enters a page, so a name can neither add markup nor hide in it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # report imports this module
    from lobs_native.report import ErrorBound, LayerReport, Report, Skipped

__all__ = ["Curve", "demo_page", "report_page", "visible"]


@dataclass(frozen=True)
class Curve:
    """One line of the demo's plot."""

    name: str
    points: tuple[tuple[float, float], ...]  # (sparsity, test error), both fractions in [0, 1]


def report_page(report: Report) -> str:
    """The page that ``Report.save("report.html")`` writes.

    Parameters
    ----------
    report : Report
        What ``prune`` returned. Not modified.

    Returns
    -------
    str
        A whole HTML document with its style inside.
    """
    return _page("Pruning report", _summary(report) + _layers(report) + _appendix(report))


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
        What was done, with what data: shown as a list above the plot.
    header, rows : sequences of str
        The comparison, one row per run. The first column is text, the others are numbers.
    legend : str
        What the columns mean.
    curves : sequence of Curve
        Test error against sparsity, one per method.
    before : float
        Test error before pruning, a fraction: the plot's dashed line.
    report : Report
        The run that is shown in full.
    report_title : str
        Which run that is.

    Returns
    -------
    str
        A whole HTML document with its style and its plot inside.
    """
    body = [
        _definitions(facts),
        "<h2>Test error against sparsity</h2>",
        _plot(curves, before),
        "<h2>All runs</h2>",
        _table(header, rows, legend),
        f"<h2>{_text(report_title)}</h2>",
        _summary(report),
        _layers(report),
        _appendix(report),
    ]
    return _page("Pruning methods on handwritten digits", "".join(body))


def visible(value: object) -> str:
    """``str(value)`` with everything that does not print (control characters, escape sequences,
    line breaks, direction marks, lone surrogates) spelled out, so that it stays on its line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


# ---- the page ------------------------------------------------------------------------------------

# The policy forbids what the page does not need, should anything ever slip through the escaping.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fff; --ink: #1d2329; --soft: #5b6670; --line: #dde2e6; --band: #f5f7f8;
  --bar: #2f6f9f; --warn: #8a4b00; --warn-band: #fdf3e3;
  --series-0: #8c5a00; --series-1: #5b6670; --series-2: #1f5fae; --series-3: #7b3f98; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191d; --ink: #e4e8eb; --soft: #9aa5ae;
  --line: #333b42; --band: #1c2227; --bar: #6fb1e0; --warn: #f0b765; --warn-band: #30261a;
  --series-0: #e0a84a; --series-1: #a9b4bd; --series-2: #74b3f2; --series-3: #c692e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; font-weight: 600; margin: 0 0 1.2rem; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.4rem 0 .7rem; }
p { max-width: 48rem; margin: .5rem 0; }
.soft, caption { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: .8rem 2.6rem; margin: 0 0 1rem; }
.figures div { min-width: 6rem; }
.figures b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-size: .9rem; }
th, td { text-align: right; padding: .38rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 600; font-size: .86rem; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child, .words th, .words td, .layers :is(th, td):nth-child(2),
  .layers :is(th, td):nth-child(n + 8):nth-child(-n + 9) { text-align: left; }
tbody tr:hover { background: var(--band); }
td small { display: block; color: var(--soft); }
.name { display: block; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.bar { display: block; width: 7rem; height: .5rem; margin: .3rem 0 0 auto; }
.bar rect { fill: var(--line); }
.bar rect + rect { fill: var(--bar); }
.status { color: var(--warn); font-weight: 600; }
.note td { text-align: left; white-space: normal; background: var(--warn-band); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.4rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.plot { width: 100%; max-width: 46rem; height: auto; display: block; }
.plot text { fill: var(--soft); font-size: 13px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 5px; }
.plot .grid { stroke: var(--line); }
.plot .before { stroke: var(--soft); }
.plot .series { fill: none; stroke-width: 2; stroke-linejoin: round; }
@media print { main { max-width: none; padding: 0; } tr { break-inside: avoid; } }
"""


def _page(title: str, body: str) -> str:
    return _PAGE.format(title=_text(title), style=_STYLE, body=body)


def _text(value: object) -> str:
    return html.escape(visible(value), quote=True)


def _number(value: float | None) -> str:
    """Three significant digits; whole and large numbers in full; a dash for None."""
    if value is None:
        return "–"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.3g}".rstrip(".")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else str(value)


def _figure(value: str, label: str) -> str:
    return f"<div><b>{value}</b>{label}</div>"


def _definitions(pairs: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, default=str)

    items = (f"<dt>{_text(k)}</dt><dd>{_text(plain(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of plain text cells."""
    cells = (_row(map(_text, row)) for row in rows)
    return _table_of(header, "".join(cells), caption)


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _table_of(header: Sequence[str], body: str, caption: str = "", kind: str = "numbers") -> str:
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    said = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}">{said}<thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


# ---- a report ------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    raised = sum(layer.status != "ok" for layer in report.layers)
    noted = sum(bool(layer.notes) for layer in report.layers)
    figures = [
        _figure(_percent(report.sparsity), "sparsity"),
        _figure(f"{report.removed:,}", f"of {report.weights:,} weights removed"),
        _figure(str(len(report.layers)), "layers pruned"),
        _figure(str(len(report.skipped)), "layers left alone"),
        _figure(f"{_number(report.seconds)} s", "in all"),
    ]
    if raised or noted:
        said = f"Layers with a status other than ok: {raised}; with notes: {noted}. See the table."
        notice = f'<p class="status">{said}</p>'
    else:
        notice = '<p class="soft">Every layer was pruned as asked: status ok, no notes.</p>'
    return f'<div class="figures">{"".join(figures)}</div>{notice}\n'


_LAYER_HEADER = (
    "Layer",
    "Asked",
    "Sparsity",
    "Relative error",
    "Error",
    "Optimality",
    "Damping",
    "Inputs",
    "Backend",
    "Status",
    "Seconds",
)


def _layers(report: Report) -> str:
    errors = [x.relative_error for x in report.layers if math.isfinite(x.relative_error)]
    largest = max(errors, default=0.0)
    caption = (
        "Error is tr(dW H dWᵀ) with the layer's own inputs; relative error is its share of "
        "tr(W H Wᵀ). Bars compare with the table's largest. Optimality is how far the kept "
        "weights are from the best for their mask, in units of rounding: below 30, they are it. "
        "Seconds are calibrating + pruning."
    )
    body = "".join(_layer(layer, largest) for layer in report.layers)
    return "<h2>Layers</h2>" + _table_of(_LAYER_HEADER, body, caption, kind="layers")


def _layer(layer: LayerReport, largest: float) -> str:
    shape = " × ".join(map(str, layer.shape))
    dead = f"{layer.dead_columns:,} dead columns" if layer.dead_columns else ""
    asked_damping = ""
    if layer.damping not in (0.0, layer.damping_asked):
        asked_damping = f"asked {layer.damping_asked:g}"
    status = _text(layer.status)
    cells = [
        f'<span class="name">{_text(layer.name)}</span>' + _small(f"{layer.kind} {shape}"),
        _text(layer.method) + _small(f"{layer.scope}, {layer.asked}"),
        _percent(layer.sparsity),
        _number(layer.relative_error) + _bar(layer.relative_error, largest),
        _number(layer.error),
        _number(layer.optimality) + _small(f"{layer.swaps} swaps" if layer.swaps else ""),
        f"{layer.damping:g}" + _small(asked_damping),
        f"{_number(layer.rows)} × {layer.columns:,}" + _small(dead),
        _text(layer.backend),
        status if layer.status == "ok" else f'<span class="status">{status}</span>',
        f"{_number(layer.seconds_calibrating)} + {_number(layer.seconds_pruning)}",
    ]
    notes = (
        f'<tr class="note"><td colspan="{len(_LAYER_HEADER)}">{_text(layer.name)}: {_text(note)}'
        "</td></tr>\n"
        for note in layer.notes
    )
    return _row(cells) + "".join(notes)


def _small(value: str) -> str:
    return f"<small>{_text(value)}</small>" if value else ""


def _bar(value: float, largest: float) -> str:
    """``value`` as a share of ``largest``; an infinity fills the bar."""
    share = min(1.0, value / largest) if largest > 0 else 0.0
    width = 100.0 * share if math.isfinite(value) else 100.0
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="100" height="8"></rect><rect width="{width:.2f}" height="8"></rect></svg>'
    )


def _appendix(report: Report) -> str:
    return (
        _bound(report.error_bound)
        + _skipped(report.skipped)
        + f"<h2>Settings</h2>{_definitions(report.settings)}"
        + f"<h2>Versions</h2>{_definitions(report.versions)}"
    )


def _bound(bound: ErrorBound) -> str:
    explained = (
        "<h2>Output of the whole network</h2><p>Distance between the pruned and the original "
        "output, ‖pruned − original‖ / √rows, on the calibration inputs, and what the errors of "
        "the layers guarantee about it (Dong, Chen &amp; Pan 2017).</p>"
    )
    if not bound.covered:
        explained += f'<p class="status">Bound: not covered: {_text(bound.reason)}</p>'
    named = [
        ("original output", bound.output_norm),
        ("measured distance", bound.measured),
        ("bound with spectral norms", bound.spectral),
        ("bound with Frobenius norms", bound.frobenius),
    ]
    rows = [
        (name, _number(value), _number(value / bound.output_norm) if bound.output_norm else "–")
        for name, value in named
        if value is not None
    ]
    if not rows:
        return explained
    caption = f"Bounds by {bound.reason}." if bound.covered else ""
    return explained + _table(
        ("Quantity", "Value", "Relative to the original output"), rows, caption
    )


def _skipped(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    rows = "".join(
        _row(f'<span class="name">{_text(value)}</span>' for value in (x.name, x.reason))
        for x in skipped
    )
    return "<h2>Layers left alone</h2>" + _table_of(("Layer", "Why"), rows, kind="words")


# ---- the plot ------------------------------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 700.0, 16.0, 330.0  # the axes, in units of the drawing
_DASHES = ("7 4", "2 3", "none", "10 3 2 3")  # with the marks, tells lines apart without colour


def _plot(curves: Sequence[Curve], before: float) -> str:
    """Test error against sparsity, both in percent, as inline SVG."""
    points = [point for curve in curves for point in curve.points]
    lowest, highest = min(x for x, _ in points), max(x for x, _ in points)
    largest = max(before, *(y for _, y in points))
    step = _step(largest)
    top = step * max(1, math.ceil(largest / step))

    def across(sparsity: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (sparsity - lowest) / ((highest - lowest) or 1.0)

    def down(error: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * error / top

    parts = []
    for k in range(round(top / step) + 1):
        y = down(k * step)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"></path>')
        parts.append(_label(_LEFT - 8, y + 4, f"{100 * k * step:g}", "end"))
    parts += [
        _label(across(x), _BOTTOM + 20, f"{100 * x:g}") for x in sorted({x for x, _ in points})
    ]
    parts.append(_label((_LEFT + _RIGHT) / 2, _BOTTOM + 42, "sparsity of every layer (%)"))
    middle = (_TOP + _BOTTOM) / 2
    turned = f' transform="rotate(-90 16 {middle})"'
    parts.append(_label(16, middle, "test error (%)", extra=turned))
    parts.append(f'<path class="before" d="M{_LEFT} {down(before):.1f}H{_RIGHT}"></path>')
    for k, curve in enumerate(curves):
        place = [(across(x), down(y)) for x, y in curve.points]
        parts.append(_series(k, curve.name, place))
    parts.append(
        _label(_LEFT + 14, _TOP + 18 + 22 * len(curves), "no marks: before pruning", "start")
    )
    names = ", ".join(curve.name for curve in curves)
    said = _text(f"Test error against sparsity for {names}")
    return (
        f'<svg class="plot" viewBox="0 0 720 380" role="img" aria-label="{said}">'
        f"{''.join(parts)}</svg>\n"
    )


def _step(largest: float) -> float:
    """A round distance between grid lines that gives at most six of them."""
    return next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1) if largest <= 6 * s), 0.2)


def _label(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{_text(text)}</text>'


def _series(k: int, name: str, place: Sequence[tuple[float, float]]) -> str:
    """One curve with its marks, and its entry in the legend at the upper left."""
    color = f"var(--series-{k % 4})"
    dash = _DASHES[k % len(_DASHES)]
    legend = _TOP + 14 + 22 * k
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in place)
    key = f"M{_LEFT + 14} {legend:.1f}h34"
    marks = [*place, (_LEFT + 31, legend)]
    return (
        f'<path class="series" style="stroke:{color}" stroke-dasharray="{dash}" d="{line}{key}">'
        "</path>"
        + "".join(_mark(k, x, y, color) for x, y in marks)
        + _label(_LEFT + 56, legend + 4, name, "start")
    )


def _mark(k: int, x: float, y: float, color: str) -> str:
    """A disc, a square or a diamond: one shape per curve."""
    if k % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{color}"></circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if k % 3 == 2 else ""
    return (
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"{turn} style="fill:{color}">'
        "</rect>"
    )
