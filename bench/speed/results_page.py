"""One page of results, docs/benchmarks.md with a picture, from what paired.py measured.

    python bench/speed/results_page.py docs bench/results/NAME.json [...]

Nothing is measured here: ``paired.py --json FILE --page docs`` does both. Several files make
several sections, each with its machine, its date and its load.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]

INTRODUCTION = """# Benchmarks

Made by `bench/speed/results_page.py` from the files named below; nothing here was typed in by hand.

    # measure and write this page; some operations only, as a table; by group; from saved files
    python bench/speed/paired.py --json bench/results/NAME.json --page docs
    python bench/speed/paired.py --only host_obc sweep
    python -m pytest bench --benchmark-enable
    python bench/speed/results_page.py docs bench/results/NAME.json [...]

The ratio is the rival's time over ours, above 1 where ours is faster: the median of interleaved
pairs (A, B, B, A, ...), with its bootstrap 95 % interval. "published" is what the field's programs
do, imitated with its habits; "torch" is the best that we could do with torch alone. Both sides have
the same threads and inputs of the same type. Answers are checked in the same run before anything is
timed, and a wrong one ends it. Where the rival does other work, its note says so. The load tells
how busy the machine was: above its number of cores, trust neither times nor small differences.

![ratios](benchmarks.svg)
"""

LEFT, WIDTH, LINE, HEAD = 620, 1180, 18, 44  # of the picture, in pixels
RIGHT = 130


def write_page(folder: Path, results: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Write ``benchmarks.md`` and ``benchmarks.svg`` from (name, JSON of paired.py) pairs."""
    rows = [row for _, result in results for row in result["rows"]]
    sections = [section(name, result) for name, result in results]
    slower = losses(rows)
    (folder / "benchmarks.svg").write_text(picture(rows))
    (folder / "benchmarks.md").write_text("\n".join([INTRODUCTION, *sections, slower]))


def plain(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def section(name: str, result: dict[str, Any]) -> str:
    """A heading, the machine, and the table of one file."""
    about = result["machine"]
    level = next((detail for kind, _, detail in about["backends"] if kind == "cpu"), "")
    loads = [f"{about[key][0]:.1f}" for key in ("load_at_start", "load_at_end") if key in about]
    clock = "; seconds of the processor" if about.get("clock") == "processor" else ""
    small = " **Small shapes (--quick): this checks the program, and measures nothing.**"
    lines = [
        f"## {name}",
        "",
        f"{about['cpu']}, {about['cores']} cores; {level}; torch {about['torch']}; load "
        f"{' to '.join(loads)}{clock}{'; ' + about['date'] if 'date' in about else ''}."
        + (small if result["quick"] else ""),
        "",
        "| case | rival | rival, ms | ours, ms | ratio [95 %] | error rival, ours | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        low, high = row["interval"]
        cells = (
            row["case"],
            row["rival"],
            plain(row["rival_seconds"] * 1e3),
            plain(row["ours_seconds"] * 1e3),
            f"**{plain(row['ratio'])}** [{plain(low)}, {plain(high)}], {row['pairs']} pairs",
            f"{row['rival_error']:.1e}, {row['ours_error']:.1e}",
            row["note"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def losses(rows: Sequence[Row]) -> str:
    """The rows in which a rival is at least as fast, by name."""
    lost = [row for row in rows if row["interval"][0] <= 1]
    lines = ["## Where ours is not faster", ""]
    for row in sorted(lost, key=lambda row: float(row["ratio"])):
        low, high = row["interval"]
        rival = f"{row['case']}, against {row['rival']}"
        lines.append(f"- {plain(row['ratio'])} [{plain(low)}, {plain(high)}]: {rival}")
    return "\n".join([*lines, *([] if lost else ["Nowhere in these files."]), ""])


# ---- picture -------------------------------------------------------------------------------------


def picture(rows: Sequence[Row]) -> str:
    """An SVG: one line per case and rival, its ratio and interval on a logarithmic axis."""
    values = [value for row in rows for value in (row["ratio"], *row["interval"]) if value > 0]
    first = math.floor(math.log10(min([1.0, *values])))
    last = max(first + 1, math.ceil(math.log10(max([1.0, *values]))))
    height = HEAD + LINE * len(rows) + 12

    def x(value: float) -> float:
        share = (math.log10(max(value, 10.0**first)) - first) / (last - first)
        return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="14">the rival\'s time over ours (median, 95 % interval); right of '
        "1, ours is faster</text>",
    ]
    for power in range(first, last + 1):
        colour = "#c03030" if power == 0 else "#d8d8d8"
        at = x(10.0**power)
        parts.append(f'<line x1="{at}" x2="{at}" y1="34" y2="{height - 8}" stroke="{colour}"/>')
        parts.append(f'<text x="{at}" y="30" text-anchor="middle">{10.0**power:g}</text>')
    for i, row in enumerate(rows):
        y = HEAD + LINE * i + 6
        low, high = map(x, row["interval"])
        colour = "#1f6fb4" if row["interval"][0] > 1 else "#c03030"
        label = escape(f"{row['case']}: {row['rival']}")
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{label}</text>',
            f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(row["ratio"])}" cy="{y}" r="4" fill="{colour}"/>',
            f'<text x="{max(high, x(row["ratio"])) + 8}" y="{y + 4}">{plain(row["ratio"])}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Read the files, write the page."""
    parser = argparse.ArgumentParser(description="One page from what paired.py measured.")
    parser.add_argument("folder", type=Path, help="where benchmarks.md and benchmarks.svg go")
    parser.add_argument("results", type=Path, nargs="+", help="what paired.py --json wrote")
    arguments = parser.parse_args()
    write_page(
        arguments.folder, [(path.name, json.loads(path.read_text())) for path in arguments.results]
    )


if __name__ == "__main__":
    main()
