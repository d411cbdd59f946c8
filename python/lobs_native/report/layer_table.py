"""The table of layers, cell by cell, as the page shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lobs_native.report.records import LayerReport
from lobs_native.report.review import Note
from lobs_native.report.text import DASH, number, percent

__all__ = ["LayerTable", "layer_table"]


@dataclass(frozen=True)
class Cell:
    """A cell: what is read, and what it is sorted by."""

    text: str
    exact: str | None = None  # the number, "" if it is unknown; None: sorted by its text
    small: str = ""  # a second line
    bar: str | None = None  # length of a bar below the text, in percent


@dataclass(frozen=True)
class Row:
    """One layer."""

    name: str
    kind: str  # with the shape
    cells: tuple[Cell, ...]  # of the columns between "Layer" and "Events"
    status: str  # "" where all went well
    note_numbers: str  # of the notes below the table, "1, 3"
    notes: str


@dataclass(frozen=True)
class LayerTable:
    """All layers in the order in which they were pruned."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    in_common: str  # method, scope and backend, where they are the same everywhere
    inherited: bool  # whether some layer has an inherited error


def layer_table(
    layers: Sequence[LayerReport], notes: Sequence[Note], parts: Mapping[str, float] | None
) -> LayerTable:
    """The table of these layers. Columns that would say nothing new are left out.

    Parameters
    ----------
    layers : sequence of LayerReport
        The rows.
    notes : sequence of Note
        The notes of these layers, as they are numbered from 1 on the page.
    parts : mapping of str to float, optional
        What each layer contributes to the bound of the network.
    """
    largest = max(
        (x.relative_error for x in layers if math.isfinite(x.relative_error)), default=0.0
    )
    numbers: dict[str, list[str]] = {}
    for k, note in enumerate(notes, 1):
        for name in note.layers:
            numbers.setdefault(name, []).append(str(k))
    cells = [_cells(layer, largest, parts) for layer in layers]
    if len({row["Method"] for row in cells}) == 1:
        for row in cells:
            del row["Method"]
    rows = tuple(
        Row(
            name=layer.name,
            kind=f"{layer.kind} {' × '.join(map(str, layer.shape))}",
            cells=tuple(row.values()),
            status="" if layer.status == "ok" else layer.status,
            note_numbers=", ".join(numbers.get(layer.name, [])),
            notes="; ".join(layer.notes),
        )
        for layer, row in zip(layers, cells, strict=True)
    )
    columns = ["Layer", *(cells[0] if cells else [])]
    if notes or any(row.status for row in rows):
        columns.append("Events")
    methods = {f"{x.method}, scope {x.scope}, backend {x.backend}" for x in layers}
    return LayerTable(
        columns=tuple(columns),
        rows=rows,
        in_common=methods.pop() if len(methods) == 1 else "",
        inherited=any(x.inherited is not None for x in layers),
    )


def _cells(
    layer: LayerReport, largest: float, parts: Mapping[str, float] | None
) -> dict[str, Cell]:
    """A row, by the names of its columns."""
    device = layer.peak_memory_device
    damping_changed = layer.damping not in (0.0, layer.damping_asked)
    condition = DASH if layer.condition is None else f"{layer.condition:.1e}".replace("e+0", "e")
    return {
        "Sparsity": Cell(percent(layer.sparsity), repr(layer.sparsity), _target(layer)),
        "Relative error": Cell(
            number(layer.relative_error),
            repr(layer.relative_error),
            bar=_share(layer.relative_error, largest),
        ),
        "Error measured": _number(
            layer.error, "" if layer.inherited is None else f"inherited {number(layer.inherited)}"
        ),
        "Error predicted": _number(layer.predicted),
        **({} if parts is None else {"Part of bound": _number(parts.get(layer.name))}),
        "Optimality": _number(layer.optimality, f"{layer.swaps:,} swaps" if layer.swaps else ""),
        "Damping": Cell(
            f"{layer.damping:g}",
            repr(layer.damping),
            f"requested {layer.damping_asked:g}" if damping_changed else "",
        ),
        "Condition": Cell(condition, _exact(layer.condition)),
        "Rows seen": _number(layer.rows, f"of {layer.columns:,} columns"),
        "Dead inputs": _number(layer.dead_columns),
        "Calibrate, s": _number(layer.seconds_calibrating),
        "Prune, s": _number(layer.seconds_pruning),
        "Memory, MB": Cell(
            DASH if layer.peak_memory is None else f"{layer.peak_memory / 1e6:,.0f}",
            _exact(layer.peak_memory),
            "" if device is None else f"{device / 1e6:,.0f} on device",
        ),
        "Method": Cell(layer.method, small=f"{layer.scope}; {layer.backend}"),
    }


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _number(value: float | None, small: str = "") -> Cell:
    return Cell(number(value), _exact(value), small)


def _target(layer: LayerReport) -> str:
    """What was requested: "target 90.00 %", or as the report has it."""
    name, _, value = layer.asked.partition(" ")
    try:
        return f"target {percent(float(value))}" if name == "sparsity" else f"target {layer.asked}"
    except ValueError:
        return f"target {layer.asked}"


def _share(value: float, largest: float) -> str:
    """``value`` in percent of ``largest``; an infinity is all of it."""
    share = min(1.0, value / largest) if largest > 0 else 0.0
    return f"{100.0 * share if math.isfinite(value) else 100.0:.2f}"
