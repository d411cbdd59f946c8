"""Coordinates of the charts that the templates draw as inline SVG: the error of every layer against
its sparsity, and the demo's comparison of methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lobs_native.report.records import LayerReport
from lobs_native.report.text import number, percent

__all__ = ["Curve", "LayerCharts", "MethodChart", "layer_charts", "method_chart"]

Point = tuple[float, float]  # in units of the drawing, x to the right and y down


@dataclass(frozen=True)
class Label:
    """A text of a drawing."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


def _path(points: Iterable[Point]) -> str:
    """The polyline through these points, as the commands of an SVG path."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# ---- relative error of layers against sparsity ---------------------------------------------------

_X0, _X1, _Y0, _Y1 = 32.0, 164.0, 6.0, 88.0  # the axes, in units of the drawing, near pixels


@dataclass(frozen=True)
class LayerChart:
    """One layer: its name, the measured error and sparsity as text, and what is drawn."""

    name: str
    error: str
    sparsity: str
    trace: str  # the path of the predicted errors; "" if they were not traced
    disc: Point | None  # the measured error; None if it is not finite


@dataclass(frozen=True)
class LayerCharts:
    """One small chart per layer, all with the same axes."""

    grid: str
    labels: tuple[Label, ...]
    charts: tuple[LayerChart, ...]
    all_traced: bool
    width: int = 170
    height: int = 104


def layer_charts(layers: Sequence[LayerReport]) -> LayerCharts:
    """Charts of the relative error that the removals add up to, against sparsity, on a logarithmic
    axis; a disc marks the error that was measured at the sparsity reached."""
    errors = [x.relative_error for x in layers if 0 < x.relative_error < math.inf]
    lowest = math.floor(math.log10(min(errors, default=0.1))) - 1  # decades
    lowest = max(-9, min(-2, lowest))
    grid, labels = _axes(lowest)
    charts = tuple(_layer_chart(layer, lowest) for layer in layers)
    return LayerCharts(grid, labels, charts, all(layer.curve_sparsity for layer in layers))


def _power(decade: int) -> str:
    """A power of ten as the label of an axis."""
    if decade > -3:
        return f"{10.0**decade:g}"
    return "10⁻" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(-decade))


def _across(sparsity: float) -> float:
    return _X0 + (_X1 - _X0) * min(1.0, max(0.0, sparsity))


def _down(error: float, lowest: int) -> float:
    """Logarithmic, from one at the top; what lies beyond the axis is drawn at its end."""
    decades = math.log10(error) if error > 0 else -math.inf
    return _Y0 + (_Y1 - _Y0) * max(0.0, min(1.0, decades / lowest))


def _layer_chart(layer: LayerReport, lowest: int) -> LayerChart:
    trace = ""
    if layer.curve_sparsity and layer.curve_error and layer.energy:
        errors = [error / layer.energy for error in layer.curve_error]
        points = list(zip(layer.curve_sparsity, errors, strict=True))
        # Points below the axis are left out, except the last one before the line rises above it.
        first = next((k for k, (_, y) in enumerate(points) if y > 10.0**lowest), len(points) - 1)
        trace = _path((_across(x), _down(y, lowest)) for x, y in points[max(0, first - 1) :])
    disc = None
    if math.isfinite(layer.relative_error):
        disc = _across(layer.sparsity), _down(layer.relative_error, lowest)
    return LayerChart(
        layer.name, number(layer.relative_error), percent(layer.sparsity), trace, disc
    )


def _axes(lowest: int) -> tuple[str, tuple[Label, ...]]:
    """The grid as a path, and the labels of both axes."""
    grid, labels = "", []
    for decade in range(0, lowest - 1, -1 if lowest >= -4 else -2):
        y = _down(10.0**decade, lowest)
        grid += f"M{_X0:g} {y:.1f}H{_X1:g}"
        labels.append(Label(_X0 - 4, y + 3, _power(decade), "end"))
    for k, text in enumerate(("0", "50", "100 %")):
        x = _across(k / 2)
        grid += f"M{x:.1f} {_Y0:g}V{_Y1:g}"
        labels.append(Label(x, _Y1 + 12, text, "middle" if k < 2 else "end"))
    return grid, tuple(labels)


# ---- test error against sparsity -----------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 68.0, 700.0, 16.0, 330.0  # the axes, in units of the drawing
_LEGEND = 22.0  # from one entry of the legend to the next


@dataclass(frozen=True)
class Curve:
    """One method of the demo's comparison."""

    name: str
    points: tuple[tuple[float, float], ...]  # (sparsity, test error), both fractions in [0, 1]


@dataclass(frozen=True)
class Series:
    """A curve as it is drawn, with its entry in the legend at the upper left."""

    line: str  # the path of the curve and of the legend's sample
    marks: tuple[Point, ...]
    label: Label


@dataclass(frozen=True)
class MethodChart:
    """Test error against sparsity, both in percent."""

    methods: str
    grid: str
    axis_labels: tuple[Label, ...]
    vertical_title: Label  # to be turned about its point
    before: str  # the path of the test error before pruning
    series: tuple[Series, ...]
    before_label: Label
    width: int = 720
    height: int = 380


def method_chart(curves: Sequence[Curve], before: float) -> MethodChart:
    """The chart of all curves; ``before`` is the test error before pruning, a fraction."""
    points = [point for curve in curves for point in curve.points]
    lowest, highest = min(x for x, _ in points), max(x for x, _ in points)
    largest = max(before, *(y for _, y in points))
    step = _step(largest)
    steps = max(1, math.ceil(largest / step))

    def across(sparsity: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (sparsity - lowest) / ((highest - lowest) or 1.0)

    def down(error: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * error / (step * steps)

    def horizontal(error: float) -> str:
        return f"M{_LEFT:g} {down(error):.1f}H{_RIGHT:g}"

    heights = [k * step for k in range(steps + 1)]
    labels = [Label(_LEFT - 8, down(y) + 4, f"{100 * y:g}", "end") for y in heights]
    labels += [
        Label(across(x), _BOTTOM + 24, f"{100 * x:g}") for x in sorted({x for x, _ in points})
    ]
    labels.append(Label((_LEFT + _RIGHT) / 2, _BOTTOM + 46, "sparsity of every layer (%)"))
    return MethodChart(
        methods=", ".join(curve.name for curve in curves),
        grid="".join(map(horizontal, heights)),
        axis_labels=tuple(labels),
        vertical_title=Label(12, (_TOP + _BOTTOM) / 2, "test error (%)"),
        before=horizontal(before),
        series=tuple(
            _series(k, curve.name, [(across(x), down(y)) for x, y in curve.points])
            for k, curve in enumerate(curves)
        ),
        before_label=Label(
            _LEFT + 14, _TOP + 18 + _LEGEND * len(curves), "no marks: before pruning", "start"
        ),
    )


def _step(largest: float) -> float:
    """A round distance between grid lines that gives at most six of them."""
    return next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1) if largest <= 6 * s), 0.2)


def _series(k: int, name: str, points: Sequence[Point]) -> Series:
    y = _TOP + 14 + _LEGEND * k
    sample = f"M{_LEFT + 14:.1f} {y:.1f}h34"
    label = Label(_LEFT + 56, y + 4, name, "start")
    return Series(_path(points) + sample, (*points, (_LEFT + 31, y)), label)
