"""Line and bar plots as SVG files without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_COLORS = (
    *("#1f5fae", "#8c5a00", "#7b3f98", "#2e7d32", "#c0392b", "#5b6670", "#0f8b8d", "#b8860b"),
)
_DASHES = ("", "7 4", "2 3", "10 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 560.0, 34.0, 330.0  # the axes, in units of the drawing
_WIDTH, _HEIGHT = 780, 385


@dataclass(frozen=True)
class Line:
    """A named curve, or with ``line=False`` only its marks."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """The label of an axis, and whether it is logarithmic."""

    label: str
    log: bool = False


class _Scale:
    """Maps values to positions, and has the ticks."""

    def __init__(self, values: Sequence[float], axis: Axis, begin: float, end: float) -> None:
        low, high = min(values), max(values)
        if axis.log:
            self._of = math.log10
            self.ticks = _log_ticks(low, high)
            low, high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        else:
            self._of = float
            step = _step(high - min(0.0, low))
            low = min(0.0, step * math.floor(low / step))
            count = max(1, math.ceil((high - low) / step - 1e-9))
            self.ticks = [low + k * step for k in range(count + 1)]
            high = self.ticks[-1]
        self._low, self._high = self._of(low), self._of(high)
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        across = (self._of(value) - self._low) / ((self._high - self._low) or 1.0)
        return self._begin + (self._end - self._begin) * across


def line_plot(
    title: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    *,
    level: tuple[str, float] | None = None,
    uprights: Mapping[str, float] | None = None,
) -> str:
    """A whole SVG document.

    Parameters
    ----------
    title : str
    x, y : Axis
    lines : sequence of Line
        Points must be positive along a logarithmic axis.
    level : (name, y), optional
        A horizontal line, such as the error before pruning.
    uprights : {name: x}, optional
        Vertical lines, such as where a curve bends.
    """
    xs = [p[0] for line in lines for p in line.points] + list((uprights or {}).values())
    ys = [p[1] for line in lines for p in line.points] + ([level[1]] if level else [])
    across, down = _Scale(xs, x, _LEFT, _RIGHT), _Scale(ys, y, _BOTTOM, _TOP)
    parts = _axes(title, x, y, across, down)
    entry = 0
    for k, line in enumerate(lines):
        place = [(across(a), down(b)) for a, b in line.points]
        parts += _series(k, line, place, entry)
        entry += 1
    if level is not None:
        height = down(level[1])
        parts.append(f'<path d="M{_LEFT} {height:.1f}H{_RIGHT}" stroke="#333" fill="none"/>')
        parts.append(_text(_RIGHT + 16, _legend(entry) + 4, f"line: {level[0]}", "start"))
        entry += 1
    for name, value in (uprights or {}).items():
        at = across(value)
        parts.append(
            f'<path d="M{at:.1f} {_TOP}V{_BOTTOM}" stroke="#333" stroke-dasharray="3 3"/>'
            + _text(at + 4, _TOP + 12, name, "start")
        )
    return _document(title, parts)


def bar_plot(
    title: str, labels: Sequence[str], y: Axis, bars: Mapping[str, Sequence[float]]
) -> str:
    """Groups of bars: one group per label, one bar per name; a whole SVG document.

    Along a logarithmic axis a bar of zero height is left out.
    """
    values = [v for series in bars.values() for v in series if v > 0 or not y.log] or [1.0]
    foot = [min(values) / 2] if y.log else []  # so that the smallest bar has a height
    down = _Scale([*values, *foot], y, _BOTTOM, _TOP)
    parts = _axes(title, Axis(""), y, None, down)
    group = (_RIGHT - _LEFT) / len(labels)
    width = 0.8 * group / len(bars)
    for k, (name, series) in enumerate(bars.items()):
        color = _COLORS[k % len(_COLORS)]
        for g, value in enumerate(series):
            if value > 0:
                left, top = _LEFT + group * (g + 0.1) + width * k, down(value)
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.9 * width:.1f}" '
                    f'height="{_BOTTOM - top:.1f}" fill="{color}"/>'
                )
        parts.append(
            f'<rect x="{_RIGHT + 16}" y="{_legend(k) - 5}" width="24" height="10" fill="{color}"/>'
            + _text(_RIGHT + 48, _legend(k) + 4, name, "start")
        )
    for g, label in enumerate(labels):
        at = _LEFT + group * (g + 0.5)
        if len(labels) <= 8:
            parts.append(_text(at, _BOTTOM + 18, label))
        else:
            turned = f' transform="rotate(-40 {at:.1f} {_BOTTOM + 14})"'
            parts.append(_text(at, _BOTTOM + 14, label, "end", turned))
    return _document(title, parts)


def _document(title: str, parts: Sequence[str]) -> str:
    label = html.escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{label}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _axes(title: str, x: Axis, y: Axis, across: _Scale | None, down: _Scale) -> list[str]:
    parts = [_text((_LEFT + _RIGHT) / 2, 18, title)]
    for tick in down.ticks:
        height = down(tick)
        parts.append(f'<path d="M{_LEFT} {height:.1f}H{_RIGHT}" stroke="#ddd" fill="none"/>')
        parts.append(_text(_LEFT - 8, height + 4, f"{tick:.6g}", "end"))
    for tick in across.ticks if across else ():
        at = across(tick) if across else 0.0
        parts.append(f'<path d="M{at:.1f} {_BOTTOM}v5" stroke="#888" fill="none"/>')
        parts.append(_text(at, _BOTTOM + 20, f"{tick:.6g}"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, x.label))
    middle = (_TOP + _BOTTOM) / 2
    parts.append(_text(16, middle, y.label, extra=f' transform="rotate(-90 16 {middle})"'))
    return parts


def _series(k: int, line: Line, place: Sequence[tuple[float, float]], entry: int) -> list[str]:
    """A curve with its marks, and its entry in the legend."""
    color, dash = _COLORS[k % len(_COLORS)], _DASHES[k // 2 % len(_DASHES)]
    height = _legend(entry)
    parts = []
    if line.line and place:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in place)
        key = f"M{_RIGHT + 16} {height}h26"
        parts.append(
            f'<path d="{path}{key}" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}" '
            'fill="none"/>'
        )
    few = place if len(place) <= 40 else ()  # marks would hide a long curve
    for a, b in [*few, (_RIGHT + 29, height)]:
        if k % 2 == 0:
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{color}"/>')
        else:
            parts.append(
                f'<rect x="{a - 3:.1f}" y="{b - 3:.1f}" width="6" height="6" fill="{color}"/>'
            )
    parts.append(_text(_RIGHT + 50, height + 4, line.name, "start"))
    return parts


def _legend(entry: int) -> float:
    return _TOP + 10 + 20 * entry


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    escaped = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escaped}</text>'


def _step(span: float) -> float:
    """A round distance that divides the span into four to nine pieces."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    return max((m * power for m in (1, 2, 5) if m * power <= span / 4), default=power)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; only the powers if these are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]
