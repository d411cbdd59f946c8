"""Runtimes that a sparsity makes faster, and those that it does not.

The statements are in ``runtimes.json``, each with its source and the month in which it was looked
up. A runtime whose source says nothing about a pattern is said to need another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from lobs_native.report.records import LayerReport

__all__ = ["Runtime", "RuntimeFacts", "as_of", "markdown", "runtimes_for", "table"]


@dataclass(frozen=True)
class Runtime:
    """One way to run a pruned network. The fields are keys of the JSON report."""

    where: str
    faster: str  # "yes", "with conditions" or "no"
    why: str


@dataclass(frozen=True)
class RuntimeFacts:
    """What is known about a runtime, for any report: one entry of ``runtimes.json``."""

    where: str
    faster: str  # where ``condition`` is met; "no" everywhere else
    condition: str | None  # "2:4" in every layer, "1 x 1 convolutions" in one; None: always met
    text: str
    source: str
    date: str  # "2026-11": the month in which the source was read
    if_met: str = ""  # more text, where the condition is met
    if_not_met: str = ""
    multiples_in_float16: Sequence[int] = ()  # that the (rows, columns) of a weight must be of


def table() -> tuple[RuntimeFacts, ...]:
    """What is known about every runtime, independent of any report.

    Returns
    -------
    tuple of RuntimeFacts
        The entries of ``runtimes.json``, in the order of the report's page.
    """
    path = resources.files(__package__) / "runtimes.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    return tuple(RuntimeFacts(**entry) for entry in entries)


def as_of() -> str:
    """The month of the oldest entry, "2026-11": the table is to be read as of then."""
    return min(entry.date for entry in table())


def markdown() -> str:
    """The table as Markdown, for the documentation.

    Returns
    -------
    str
        A heading row and one row per runtime, with sources and dates. Ends with a line break.
    """
    lines = ["| Where | Faster? | Needs | Why | Source |", "| --- | --- | --- | --- | --- |"]
    for entry in table():
        cells = (
            entry.where,
            entry.faster,
            entry.condition or "",
            f"{entry.text} {entry.if_met}".rstrip(),
            f"{entry.source}; {entry.date}",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def runtimes_for(layers: Sequence[LayerReport], pattern: str) -> tuple[Runtime, ...]:
    """What is known for these layers.

    Parameters
    ----------
    layers : sequence of LayerReport
        The pruned layers.
    pattern : str
        The pattern of layers that name none.

    Returns
    -------
    tuple of Runtime
        One per entry of :func:`table`, in its order.
    """
    patterns = {layer.pattern or pattern for layer in layers} or {pattern}
    met = {
        None: True,
        "2:4": all(_within_two_of_four(name) for name in patterns),
        "1 x 1 convolutions": any(_pointwise(layer) for layer in layers),
    }
    return tuple(_runtime(entry, met[entry.condition], layers) for entry in table())


def _runtime(entry: RuntimeFacts, met: bool, layers: Sequence[LayerReport]) -> Runtime:
    if not met:
        return Runtime(entry.where, "no", f"{entry.text} {entry.if_not_met}".rstrip())
    parts = [entry.text]
    if entry.multiples_in_float16:
        rows, columns = entry.multiples_in_float16
        linear = [layer for layer in layers if layer.kind == "Linear"]
        fit = sum(x.shape[0] % rows == 0 and x.shape[1] % columns == 0 for x in linear)
        parts.append(f"Layers of such a shape in float16: {fit} of {len(layers)}.")
    return Runtime(entry.where, entry.faster, " ".join([*parts, entry.if_met]).rstrip())


def _within_two_of_four(pattern: str) -> bool:
    """Whether a pattern keeps at most 2 of every 4 neighbouring weights."""
    keep, colon, size = pattern.partition(":")
    if not colon or not keep.isdecimal() or not size.isdecimal():
        return False
    return size in ("1", "2", "4") and int(keep) * 2 <= int(size)


def _pointwise(layer: LayerReport) -> bool:
    return layer.kind == "Conv2d" and layer.shape[2:] == (1, 1)
