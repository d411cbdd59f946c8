"""Output of all experiments: tables in Markdown, spreads, numbers as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lobs_native.files.atomic import write_file
from lobs_native.report.records import plain


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with a final line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the lowest and the highest in brackets if there are several; "-" for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def save(folder: Path, stem: str, page: str, numbers: Any) -> list[Path]:
    """Write ``<stem>.md`` and ``<stem>.json``, each atomically, and return the paths."""
    content = json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n"
    return [write_file(folder / f"{stem}.md", page), write_file(folder / f"{stem}.json", content)]
