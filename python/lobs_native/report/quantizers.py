"""What ways to quantise leave of the zeros of a pruned network.

The statements are in ``quantizers.json``, each with its source and the month of the measurement.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

__all__ = ["Quantizer", "markdown", "sentences", "table"]


@dataclass(frozen=True)
class Quantizer:
    """One way to quantise: an entry of ``quantizers.json``."""

    way: str
    kept: float  # share of the zeros that are zero afterwards
    source: str
    date: str  # "2026-12"


def table() -> tuple[Quantizer, ...]:
    """All ways that were measured."""
    path = resources.files(__package__) / "quantizers.json"
    return tuple(Quantizer(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))


def sentences() -> tuple[str, str]:
    """For reports: which ways keep every zero, and which lose some and how many."""
    entries = table()
    keeping = "; ".join(entry.way for entry in entries if entry.kept == 1)
    losing = "; ".join(f"{e.way} ({e.kept:.1%} stay)" for e in entries if e.kept < 1)
    return (
        f"Quantised afterwards, it keeps every zero with {keeping}.",
        f"It loses zeros with {losing}; apply_masks puts them back where weights can be written.",
    )


def markdown() -> str:
    """The table as Markdown, for the documentation; those that lose zeros first."""
    lines = ["| way to quantize | zeros that stay | source |", "| --- | --- | --- |"]
    for entry in sorted(table(), key=lambda entry: entry.kept):
        share = "all" if entry.kept == 1 else f"{entry.kept:.1%}"
        lines.append(f"| {entry.way} | {share} | {entry.source}; {entry.date} |")
    return "\n".join(lines) + "\n"
