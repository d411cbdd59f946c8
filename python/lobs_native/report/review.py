"""What to look at in a report before its results are trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lobs_native.solvers.problem import OPTIMAL

if TYPE_CHECKING:  # report imports this module
    from lobs_native.report.records import LayerReport
    from lobs_native.report.report import Report

__all__ = ["Check", "Note", "notes_of", "review"]

_SLACK = 1e-4  # of the predicted error, for rounding in float32


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in every layer."""

    name: str
    good: bool
    said: str
    layers: tuple[str, ...] = ()  # that it is about, where not about all


@dataclass(frozen=True)
class Note:
    """Something that was done differently from what was asked, or is to be known, and where."""

    text: str
    layers: tuple[str, ...]


def notes_of(layers: Iterable[LayerReport]) -> tuple[Note, ...]:
    """The notes of all layers, each text once, in the order they come up in."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        for text in dict.fromkeys(layer.notes):
            found.setdefault(text, []).append(layer.name)
    return tuple(Note(text, tuple(names)) for text, names in found.items())


def review(report: Report) -> tuple[Check, ...]:
    """Completeness, damping, data, dead inputs, kept weights, and predictions."""
    layers = report.layers
    checks = [
        _done(report),
        _of_layers(
            "Damping",
            layers,
            lambda x: x.status != "ok" or x.damping not in (0.0, x.damping_asked),
            "as asked in every layer",
            "more than asked, or another status than ok, in",
        ),
        _of_layers(
            "Data",
            layers,
            lambda x: x.rows < x.columns,
            "every layer saw at least as many rows as it has columns",
            "fewer rows than columns, so that the damping decides along unseen directions, in",
        ),
        _of_layers(
            "Dead inputs",
            layers,
            lambda x: x.dead_columns > 0,
            "none: no input was zero in every row",
            "inputs that were zero in every row, whose weights cost nothing, in",
            neutral=True,
        ),
    ]
    solved = [x for x in layers if x.method == "exact" or x.swaps]
    if solved:
        checks.append(
            _of_layers(
                "Kept weights",
                solved,
                lambda x: not x.optimality <= OPTIMAL,
                "the best for their mask, as far as rounding can tell, wherever the method says so",
                "not the best for their mask in",
            )
        )
    known = [x for x in layers if x.predicted is not None and math.isfinite(x.predicted)]
    if known:
        checks.append(
            _of_layers(
                "Prediction",
                known,
                lambda x: x.error > (x.predicted or 0.0) * (1 + _SLACK) + _SLACK * (x.energy or 0),
                "no measured error is above the predicted one, which has the damping in it",
                "the measured error is above the predicted one in",
            )
        )
    return tuple(checks)


def _done(report: Report) -> Check:
    count = len(report.layers)
    if report.missing:
        whole = count + len(report.missing)
        return Check("Layers", False, f"unfinished: {count} of {whole} are done")
    left = len(report.skipped)
    alone = f"; {left} left alone, see below" if left else ""
    return Check("Layers", True, f"all {count} are pruned{alone}")


def _of_layers(
    name: str,
    layers: Sequence[LayerReport],
    wrong: Callable[[LayerReport], bool],
    good: str,
    bad: str,
    *,
    neutral: bool = False,
) -> Check:
    """``neutral`` is for what is no fault."""
    hit = tuple(layer.name for layer in layers if wrong(layer))
    if not hit:
        return Check(name, True, good)
    return Check(name, neutral, f"{bad} {len(hit)} of {len(layers)} layers", hit)
