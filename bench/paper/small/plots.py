"""The figures of the small networks, with the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paper.networks import Case
from paper.small import printed
from paper.small.curves import curve, inflection, sensitivities
from paper.small.figures import Axis, Line, bar_plot, line_plot
from paper.small.tables import Rows

CURVES = ("random", "magnitude", "L-OBS as printed", "exact")
ALONE = 0.05  # kept of one layer, all others as they are
_KEPT = Axis("weights kept, %", log=True)
_ERROR = Axis("error, %", log=True)


@dataclass(frozen=True)
class Picture:
    """One figure: its file's stem, the drawing, what it shows, and the numbers in it."""

    stem: str
    svg: str
    caption: str
    numbers: dict[str, Any] = field(default_factory=dict)


def draw(cases: Sequence[Case], shares: Sequence[float], rows: Rows) -> list[Picture]:
    """All figures; ``cases`` holds one network of each kind."""
    pictures = []
    first = cases[0]
    if "fc1" in first.shape.once:
        pictures.append(_first_layer(first, shares))
        pictures.append(_whole(cases, shares))
        pictures.append(_by_layer(cases))
        if first.shape.title == "LeNet-300-100":
            pictures.append(_histogram(first))
    for k, case in enumerate(cases):
        for table in ("once", "stages"):
            picture = _retraining(case, table, rows, k)
            if picture is not None:
                pictures.append(picture)
    return pictures


def _first_layer(case: Case, shares: Sequence[float]) -> Picture:
    """Figure 2 of the appendix: only fc1 is pruned."""
    dense = case.dense
    curves = {way: curve(case, way, ["fc1"], shares) for way in CURVES}
    bends = {way: inflection(points, dense) for way, points in curves.items() if way != "random"}
    lines = [Line(way, _in_percent(points)) for way, points in curves.items()]
    numbers: dict[str, Any] = {"dense": dense, "curves": curves, "inflection": bends}
    if "authors" in case.data:
        for name, points in printed.FIGURE2.items():
            lines.append(Line(f"{name}, printed", points, line=False))
            shares_of = [(k / 100, e) for k, e in points]
            bends[f"{name}, printed"] = inflection(shares_of, printed.FIGURE2_DENSE)
    uprights = {"inflection, exact": 100 * bends["exact"]}
    svg = line_plot(
        f"{case.name}: only fc1 pruned, no retraining", _KEPT, _ERROR, lines,
        level=("before pruning", dense), uprights=uprights,
    )  # fmt: skip
    caption = "Error against the kept share of fc1, all others as they were, no retraining."
    return Picture("figure2-fc1", svg, caption, numbers)


def _whole(cases: Sequence[Case], shares: Sequence[float]) -> Picture:
    """All layers together, one budget for the model."""
    lines, numbers, uprights = [], {}, {}
    for case in cases:
        points = curve(case, "exact, model, corrected", list(case.shape.once), shares)
        bend = inflection(points, case.dense)
        lines.append(Line(case.name, _in_percent(points)))
        uprights[case.shape.title if case.shape.title not in uprights else case.name] = 100 * bend
        numbers[case.name] = {"dense": case.dense, "points": points, "inflection": bend}
    svg = line_plot(
        "whole networks: exact, model, corrected; no retraining", _KEPT, _ERROR, lines,
        uprights=uprights,
    )  # fmt: skip
    caption = (
        "Error against the kept share of all weights; the upright lines are the inflection points."
    )
    return Picture("figure-whole", svg, caption, numbers)


def _by_layer(cases: Sequence[Case]) -> Picture:
    """Every layer alone."""
    labels: list[str] = []
    rises: dict[str, list[float]] = {way: [] for way in ("magnitude", "L-OBS as printed", "exact")}
    for case in cases:
        for layer in case.shape.once:
            labels.append(f"{_short(case)} {layer}")
            for way, values in rises.items():
                error = curve(case, way, [layer], [ALONE])[0][1]
                values.append(max(0.0, error - case.dense))
    svg = bar_plot(
        f"one layer alone at {100 * ALONE:g}% kept",
        labels,
        Axis("rise of the error, points"),
        rises,
    )
    caption = f"Rise of the error: one layer alone at {100 * ALONE:g}% kept, not retrained."
    return Picture("figure-layers", svg, caption, {"layers": labels, "rises": rises})


def _histogram(case: Case) -> Picture:
    """Figure 3: how many weights of fc1 have which sensitivity; and figure 5."""
    L = sensitivities(case, "fc1").flatten()
    bins = len(printed.FIGURE3)
    counts = torch.histc(L, bins, 0.0, float(L.max())).int().tolist()
    sorted_L = L.sort().values
    below = [float(sorted_L[max(0, round(share / 100 * len(L)) - 1)]) for share in printed.FIGURE5]
    bars = {"here": [float(c) for c in counts]}
    if "authors" in case.data:
        bars["printed"] = [float(c) for c in printed.FIGURE3]
    labels = [str(k + 1) for k in range(bins)]
    svg = bar_plot(f"{case.name}: L_q of fc1", labels, Axis("weights and biases", log=True), bars)
    caption = (
        f"Histogram of L_q of fc1 (weights and biases), {bins} bins of one width up to the largest."
    )
    numbers = {
        "counts": counts,
        "largest": float(L.max()),
        "below": below,
        "share below 1e-3": float((L < 1e-3).double().mean()),
    }
    return Picture("figure3-sensitivity", svg, caption, numbers)


def _retraining(case: Case, table: str, rows: Rows, number: int) -> Picture | None:
    """Figure 4: validation error while it is retrained, one line for each way."""
    lines = []
    for (t, network, way, seed), row in rows.rows.items():
        if (t, network, seed) == (table, case.name, case.seed) and row.curve and way != "random":
            points = [(p[0] + 1.0, max(p[1], 0.01)) for p in row.curve]
            lines.append(Line(way, points))
    if not lines:
        return None
    what = {"once": "pruned once", "stages": "after the second stage"}[table]
    svg = line_plot(
        f"{case.name}, {what}: retraining",
        Axis("1 + iterations", log=True), Axis("validation error, %", log=True), lines,
    )  # fmt: skip
    caption = (
        f"{case.name}, {what}: error on the validation images while it is retrained, one seed."
    )
    return Picture(f"figure4-{number}-{table}", svg, caption)


def _in_percent(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(100 * k, max(e, 0.01)) for k, e in points]


def _short(case: Case) -> str:
    short = {"LeNet-300-100": "300", "LeNet-5": "L5", "CIFAR-Net": "C"}[case.shape.title]
    return f"{short}*" if "authors" in case.data else short
