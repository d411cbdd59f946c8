"""Native kernels against their rivals, in interleaved pairs.

    python bench/speed/paired.py [--quick] [--json FILE] [--page FOLDER] [--pairs N] [--threads N]
                                 [--only OPERATION ...] [--processor-time]

A shared machine changes its speed from second to second, so two series taken one after the other
cannot be compared. Here every ratio comes from one pair of runs taken back to back, in the order
A, B, B, A, ... Reported is the median over the pairs with its bootstrap 95 % interval. The ratio is
the rival's time over ours. Where the rival does other work, its note says so, and the ratio is our
rate over the rival's. No pair is discarded. All answers are checked against float64 before anything
is timed, and a wrong one ends the program. ``host_*`` are whole jobs of other programs, the others
single operations: see ``cases``. Both sides have the same number of threads and inputs of the same
type. Cases that take long have fewer pairs than asked for.
"""

from __future__ import annotations

import os

# Threads that spin while they wait would slow down whichever side runs next. torch reads this once,
# when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import lobs_native as lobs
from speed import case as timing
from speed import results_page
from speed.case import Case
from speed.cases import (
    admm,
    columns,
    conjugate,
    exact,
    hessian,
    host_jobs,
    inverse,
    inversion,
    saliency,
    sliced,
    solve,
    static_order,
    sweep,
)

GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "hessian": hessian.cases,
    "inversion": inversion.cases,
    "inverse": inverse.cases,
    "saliency": saliency.cases,
    "static_order": static_order.cases,
    "exact": exact.cases,
    "columns": columns.cases,
    "sweep": sweep.cases,
    "solve": solve.cases,
    "admm": admm.cases,
    "conjugate": conjugate.cases,
    "sliced": sliced.cases,
    "host_sparsegpt": host_jobs.sparsegpt_cases,
    "host_obc": host_jobs.obc_cases,
    "host_fisher": host_jobs.fisher_cases,
}

PAIRS = 15
QUICK_PAIRS = 5
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """The result of pairing ours with one rival."""

    case: str
    rival: str
    pairs: int
    ours_seconds: float  # medians
    rival_seconds: float
    ratio: float  # median over the pairs of our rate over the rival's: above 1, ours is faster
    interval: tuple[float, float]
    unit: str
    ours_rate: float
    rival_rate: float
    ours_error: float
    rival_error: float
    note: str


# ---- measuring ---------------------------------------------------------------------------------


def interleaved(
    one: Callable[[], float], other: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """What two clocks say that are called in the order A, B, B, A, A, B, ..."""
    seconds: tuple[list[float], list[float]] = ([], [])
    both = list(zip((one, other), seconds, strict=True))
    for pair in range(pairs):
        for timed, into in both if pair % 2 == 0 else reversed(both):
            into.append(timed())
    return seconds


def bootstrap_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by resampling the pairs; the same at every call."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def run_case(case: Case, pairs: int) -> Iterator[Row]:
    """Check all sides of a case, which also warms them up, then pair ours with each rival."""
    ours, rivals = case.ours, list(case.rivals.values())
    errors = {side.label: case.error_of(side, case.answer(side)) for side in (ours, *rivals)}
    pairs = min(pairs, case.most_pairs or pairs)
    for label, error in errors.items():
        if not error <= case.tolerance or math.isinf(error):
            raise SystemExit(
                f"{case.name}: {label} is wrong: error {error:.3g}, above {case.tolerance:g}"
            )
    for rival in rivals:
        clocks = (partial(case.seconds, side) for side in (ours, rival))
        ours_seconds, rival_seconds = interleaved(*clocks, pairs)
        work = rival.work or case.work
        each = zip(ours_seconds, rival_seconds, strict=True)
        ratios = [(case.work / a) / (work / b) for a, b in each]
        ours_median = statistics.median(ours_seconds)
        rival_median = statistics.median(rival_seconds)
        yield Row(
            case=case.name,
            rival=rival.label,
            pairs=pairs,
            ours_seconds=ours_median,
            rival_seconds=rival_median,
            ratio=statistics.median(ratios),
            interval=bootstrap_interval(ratios),
            unit=case.unit,
            ours_rate=case.work / ours_median / 1e9,
            rival_rate=work / rival_median / 1e9,
            ours_error=errors[ours.label],
            rival_error=errors[rival.label],
            note=rival.note,
        )


# ---- report ------------------------------------------------------------------------------------

HEADINGS = (
    "case",
    "rival",
    "ours, ms",
    "rival, ms",
    "ratio [95 %]",
    "error ours",
    "error rival",
    "rate ours",
    "rate rival",
    "note",
)


def machine() -> dict[str, Any]:
    """Everything about this machine that a time depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if timing.now is time.process_time else "wall",
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "lobs_native": lobs.__version__,
        "backends": backends(),
        "date": datetime.date.today().isoformat(),
        "load_at_start": os.getloadavg(),
    }


def backends() -> list[tuple[str, bool, str]]:
    """``lobs_native.backends()`` without reasons, which name folders of this machine."""
    return [(name, ready, text if ready else "") for name, ready, text in lobs.backends()]


def _cpu_model() -> str:
    """The processor's name, and its family and model: virtual machines leave the rest out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    said = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    if "model name" not in said:
        return platform.processor()
    family, model = said.get("cpu family", "?"), said.get("model", "?")
    return f"{said['model name']} (family {family}, model {model})"


def table_row(row: Row) -> str:
    """One line of the markdown table."""
    low, high = row.interval
    cells = (
        row.case,
        row.rival,
        f"{row.ours_seconds * 1e3:,.2f}",
        f"{row.rival_seconds * 1e3:,.2f}",
        f"{row.ratio:.3g} [{low:.3g}, {high:.3g}]",
        f"{row.ours_error:.1e}",
        f"{row.rival_error:.1e}",
        f"{row.ours_rate:.3g} {row.unit}",
        f"{row.rival_rate:.3g} {row.unit}",
        row.note,
    )
    return "| " + " | ".join(cells) + " |"


def print_table(cases: Iterable[Case], pairs: int) -> list[Row]:
    """Run the cases and print the table as it grows."""
    print("| " + " | ".join(HEADINGS) + " |")
    print("|" + " --- |" * len(HEADINGS))
    rows = []
    for case in cases:
        for row in run_case(case, pairs):
            print(table_row(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Run the cases, print the table as it grows, and write the JSON."""
    parser = argparse.ArgumentParser(description="Native kernels against their rivals, in pairs.")
    parser.add_argument("--quick", action="store_true", help="small shapes and few pairs")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--pairs", type=int, help=f"default {PAIRS}, or {QUICK_PAIRS} with --quick")
    parser.add_argument("--threads", type=int, help="for both sides; default torch's")
    help_ = "seconds of the processor, not of the clock; with --threads 1"
    parser.add_argument("--processor-time", action="store_true", help=help_)
    parser.add_argument("--page", type=Path, help="write benchmarks.md and its picture there")
    parser.add_argument("--only", choices=GROUPS, nargs="+", help="some of the operations")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.processor_time:
        if torch.get_num_threads() > 1:
            parser.error("--processor-time adds up the time of all threads: pass --threads 1")
        timing.now = time.process_time
    pairs = arguments.pairs or (QUICK_PAIRS if arguments.quick else PAIRS)

    about = machine()
    level = next(detail for name, _, detail in about["backends"] if name == "cpu")
    print(f"{about['cpu']}: {level}; torch {about['torch']}; {pairs} pairs\n")
    names = arguments.only or GROUPS
    rows = print_table((case for name in names for case in GROUPS[name](arguments.quick)), pairs)
    about["load_at_end"] = os.getloadavg()
    result = {"machine": about, "quick": arguments.quick, "rows": [asdict(row) for row in rows]}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.page:
        title = arguments.json.name if arguments.json else "measured now"
        results_page.write_page(arguments.page, [(title, result)])


if __name__ == "__main__":
    main()
