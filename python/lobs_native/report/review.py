"""Checks of a report: what to look at before its results are trusted."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lobs_native.report.records import NEAR, LayerReport, ReportRecord, Skipped
from lobs_native.report.text import percent
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.result import OPTIMAL

__all__ = ["FEW_MISSED", "Cause", "Check", "Note", "causes_of", "notes_of", "review"]

FEW_MISSED = 0.02  # of the weights to be pruned: so many may be left alone without a warning
_NUMBER = re.compile(r"\d[\d.,e+-]*")
_SLACK = 1e-4  # of the predicted error, for rounding in float32


@dataclass(frozen=True)
class Check:
    """One property that was checked in every layer. The fields are keys of the JSON report."""

    name: str
    good: bool
    said: str  # the outcome
    layers: tuple[str, ...] = ()  # the layers concerned, unless it is about all of them


@dataclass(frozen=True)
class Note:
    """A deviation from what was requested, or something worth knowing, and its layers. Where notes
    of several layers differ in numbers alone, the text is that of one of them, as an example."""

    text: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Cause:
    """Why some weights were left alone, and which."""

    reason: str
    on_purpose: bool
    weights: int
    names: tuple[str, ...]


def causes_of(skipped: Iterable[Skipped]) -> tuple[Cause, ...]:
    """What was left alone, by its reason: first what was not on purpose, the most weights first."""
    layers: dict[tuple[str, bool], list[Skipped]] = {}
    for layer in skipped:
        layers.setdefault((layer.reason, layer.on_purpose), []).append(layer)
    causes = [
        Cause(reason, on_purpose, sum(x.weights for x in some), tuple(x.name for x in some))
        for (reason, on_purpose), some in layers.items()
    ]
    return tuple(sorted(causes, key=lambda cause: (cause.on_purpose, -cause.weights)))


def notes_of(layers: Iterable[LayerReport]) -> tuple[Note, ...]:
    """The notes of all layers, in the order of their first occurrence. Notes that differ in numbers
    alone are one."""
    kinds: dict[str, dict[str, str]] = {}  # text without its numbers -> layer -> text
    for layer in layers:
        for text in layer.notes:
            kinds.setdefault(_NUMBER.sub("0", text), {}).setdefault(layer.name, text)
    notes = []
    for of_kind in kinds.values():
        first, *others = dict.fromkeys(of_kind.values())
        notes.append(Note(f"for example, {first}" if others else first, tuple(of_kind)))
    return tuple(notes)


def review(report: ReportRecord) -> tuple[Check, ...]:
    """Check completeness, damping, data, dead inputs, kept weights, predictions, and what was held
    back."""
    layers = report.layers
    checks = [
        _completeness(report),
        _check(
            "Damping",
            layers,
            lambda x: x.status != "ok" or x.damping not in (0.0, x.damping_asked),
            "as requested in every layer",
            "more than requested, or a status other than ok, in",
        ),
        _check(
            "Data",
            layers,
            lambda x: x.rows < x.columns,
            "every layer saw at least as many rows as it has columns",
            "fewer rows than columns, so the damping decides along the directions not seen, in",
        ),
        _check(
            "Dead inputs",
            layers,
            lambda x: x.dead_columns > 0,
            "none: no input was zero in every row",
            "inputs that were zero in every row, whose weights cost nothing to remove, in",
            neutral=True,
        ),
    ]
    if measured := [x for x in layers if x.held_back_error is not None]:
        checks.append(_held_back(measured))
    optimal = {name for name, method in TABLE.items() if method.optimal}
    solved = [x for x in layers if x.method in optimal or x.swaps]
    if solved:
        checks.append(
            _check(
                "Kept weights",
                solved,
                lambda x: not x.optimality <= OPTIMAL,
                "the best for their mask, as far as rounding can tell, wherever the method "
                "promises that",
                "not the best for their mask in",
            )
        )
    predicted = [x for x in layers if x.predicted is not None and math.isfinite(x.predicted)]
    if predicted:
        checks.append(
            _check(
                "Prediction",
                predicted,
                lambda x: x.error > (x.predicted or 0.0) * (1 + _SLACK) + _SLACK * (x.energy or 0),
                "no measured error is above the predicted one, which includes the damping",
                "the measured error is above the predicted one in",
            )
        )
    return tuple(checks)


def _completeness(report: ReportRecord) -> Check:
    count = len(report.layers)
    if report.missing:
        total = count + len(report.missing)
        return Check("Layers", False, f"unfinished: {count} of {total} are done")
    purpose = sum(layer.on_purpose for layer in report.skipped)
    others = len(report.skipped) - purpose
    said = f"all {count} are pruned" if not others else f"{count} are pruned"
    if others:
        said += f"; {others} could not be, see below"
    if purpose:
        said += f"; {purpose} left alone on purpose, see below"
    if (coverage := report.coverage) is None:
        return Check("Layers", True, said)
    said += f"; {percent(1 - coverage.missed)} of the weights that were to be pruned"
    return Check("Layers", coverage.missed <= FEW_MISSED, said)


def _held_back(layers: Sequence[LayerReport]) -> Check:
    """Whether the data sufficed, by the errors on rows that were held back."""
    ratios = [
        (x.held_back_error or 0.0) / x.relative_error if x.relative_error > 0 else 1.0
        for x in layers
    ]
    few = tuple(x.name for x in layers if (x.rows_enough or 0.0) > x.rows)
    said = (
        f"on rows that were held back, errors are {statistics.median(ratios):.2f} times those on "
        f"the rows used (median), {max(ratios):.2f} times at most"
    )
    if not few:
        return Check("Held back", True, f"{said}: the rows sufficed in every layer")
    enough = max(x.rows_enough or 0.0 for x in layers)
    used = max(x.rows for x in layers)
    said += (
        f"; {enough:,.0f} rows instead of {used:,.0f} would bring all of them within "
        f"{percent(NEAR)} of the least on other data; so far they were too few in {len(few)} of "
        f"{len(layers)} layers"
    )
    return Check("Held back", False, said, few)


def _check(
    name: str,
    layers: Sequence[LayerReport],
    stands_out: Callable[[LayerReport], bool],
    good: str,
    bad: str,
    *,
    neutral: bool = False,
) -> Check:
    """The check that no layer stands out. ``neutral``: a layer that does is not at fault."""
    hit = tuple(layer.name for layer in layers if stands_out(layer))
    if not hit:
        return Check(name, True, good)
    return Check(name, neutral, f"{bad} {len(hit)} of {len(layers)} layers", hit)
