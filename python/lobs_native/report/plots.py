"""Inline SVG: the error of every layer against sparsity, and the demo's comparison of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lobs_native.report.page import MANY, name, number, percent, scroll, text

if TYPE_CHECKING:  # report imports html, which imports this module
    from lobs_native.report.records import LayerReport

__all__ = ["Curve", "panels", "plot"]


@dataclass(frozen=True)
class Curve:
    """One line of the demo's plot."""

    name: str
    points: tuple[tuple[float, float], ...]  # (sparsity, test error), both fractions in [0, 1]


# ---- relative error of layers against sparsity ---------------------------------------------------

_WIDE, _HIGH = 170, 104  # of a panel, in units of the drawing, near pixels
_X0, _X1, _Y0, _Y1 = 32.0, 164.0, 6.0, 88.0  # its axes


def panels(layers: Sequence[LayerReport]) -> str:
    """One small plot for every layer, all with the same axes: the relative error that the removals
    add up to against sparsity, and, as a disc, what was measured where the layer was cut."""
    found = [x.relative_error for x in layers if 0 < x.relative_error < math.inf]
    lowest = math.floor(math.log10(min(found, default=0.1))) - 1  # decades
    lowest = max(-9, min(-2, lowest))
    drawn = "".join(_panel(layer, lowest) for layer in layers)
    grid = f'<div class="panels">{drawn}</div>\n'
    return grid if len(layers) <= MANY else scroll(grid, "Error against sparsity", "of-panels")


def _power(decade: int) -> str:
    """A power of ten as the label of an axis."""
    if decade > -3:
        return f"{10.0**decade:g}"
    return "10⁻" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(-decade))


def _across(sparsity: float) -> float:
    return _X0 + (_X1 - _X0) * min(1.0, max(0.0, sparsity))


def _down(error: float, lowest: int) -> float:
    """Logarithmic, from one at the top; what lies beyond the axis is drawn on its end."""
    decades = math.log10(error) if error > 0 else -math.inf
    return _Y0 + (_Y1 - _Y0) * max(0.0, min(1.0, decades / lowest))


def _panel(layer: LayerReport, lowest: int) -> str:
    line = ""
    if layer.curve_sparsity and layer.curve_error and layer.energy:
        errors = [error / layer.energy for error in layer.curve_error]
        points = list(zip(layer.curve_sparsity, errors, strict=True))
        # What is below the axis is left out, but for the point from which the line rises.
        first = next((k for k, (_, y) in enumerate(points) if y > 10.0**lowest), len(points) - 1)
        shown = [(_across(x), _down(y, lowest)) for x, y in points[max(0, first - 1) :]]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in shown)
        line = f'<path class="trace" d="{line}"></path>'
    at = ""
    if math.isfinite(layer.relative_error):
        x, y = _across(layer.sparsity), _down(layer.relative_error, lowest)
        at = f'<circle class="here" cx="{x:.1f}" cy="{y:.1f}" r="4"></circle>'
    error, share = number(layer.relative_error), percent(layer.sparsity)
    said = f"Relative error {error} at sparsity {share}" + ("" if line else "; no curve")
    return (
        f"<figure><figcaption>{name(layer.name)}"
        f"<span>{error} at {share}{'' if line else ', no curve'}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{text(said)}">'
        f"{_axes(lowest)}{line}{at}</svg></figure>\n"
    )


def _axes(lowest: int) -> str:
    step = 1 if lowest >= -4 else 2
    lines, labels = "", ""
    for decade in range(0, lowest - 1, -step):
        y = _down(10.0**decade, lowest)
        lines += f"M{_X0:g} {y:.1f}H{_X1:g}"
        labels += _label(_X0 - 4, y + 3, _power(decade), "end")
    for k in range(3):
        x = _across(k / 2)
        lines += f"M{x:.1f} {_Y0:g}V{_Y1:g}"
        labels += _label(
            x, _Y1 + 12, f"{50 * k}" + (" %" if k == 2 else ""), "middle" if k < 2 else "end"
        )
    return f'<path class="grid" d="{lines}"></path>{labels}'


# ---- test error against sparsity -----------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 68.0, 700.0, 16.0, 330.0  # the axes, in units of the drawing
_DASHES = (
    "7 4",
    "2 3",
    "none",
    "10 3 2 3",
    "none",
)  # with the marks, tells lines apart without colour


def plot(curves: Sequence[Curve], before: float) -> str:
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
        _label(across(x), _BOTTOM + 24, f"{100 * x:g}") for x in sorted({x for x, _ in points})
    ]
    parts.append(_label((_LEFT + _RIGHT) / 2, _BOTTOM + 46, "sparsity of every layer (%)"))
    middle = (_TOP + _BOTTOM) / 2
    turned = f' transform="rotate(-90 12 {middle})"'
    parts.append(_label(12, middle, "test error (%)", extra=turned))
    parts.append(f'<path class="before" d="M{_LEFT} {down(before):.1f}H{_RIGHT}"></path>')
    for k, curve in enumerate(curves):
        place = [(across(x), down(y)) for x, y in curve.points]
        parts.append(_series(k, curve.name, place))
    parts.append(
        _label(_LEFT + 14, _TOP + 18 + 22 * len(curves), "no marks: before pruning", "start")
    )
    names = ", ".join(curve.name for curve in curves)
    said = text(f"Test error against sparsity for {names}")
    drawn = (
        f'<svg class="plot" viewBox="0 0 720 380" role="img" aria-label="{said}">'
        f"{''.join(parts)}</svg>"
    )
    return scroll(drawn, "Test error against sparsity")


def _step(largest: float) -> float:
    """A round distance between grid lines that gives at most six of them."""
    return next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1) if largest <= 6 * s), 0.2)


def _label(x: float, y: float, said: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{text(said)}</text>'


def _series(k: int, name: str, place: Sequence[tuple[float, float]]) -> str:
    """One curve with its marks, and its entry in the legend at the upper left."""
    dash = _DASHES[k % len(_DASHES)]
    legend = _TOP + 14 + 22 * k
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in place)
    key = f"M{_LEFT + 14} {legend:.1f}h34"
    marks = [*place, (_LEFT + 31, legend)]
    return (
        f'<g class="s{k % 5}">'
        f'<path class="series" stroke-dasharray="{dash}" d="{line}{key}"></path>'
        + "".join(_mark(k, x, y) for x, y in marks)
        + "</g>"
        + _label(_LEFT + 56, legend + 4, name, "start")
    )


def _mark(k: int, x: float, y: float) -> str:
    """A disc, a square or a diamond: one shape per curve."""
    if k % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="mark"></circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if k % 3 == 2 else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"{turn} class="mark"></rect>'
