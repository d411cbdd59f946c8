"""The work of ``lobs-native shrink``: shrink the network of a job, and write a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobs_native.cli.arguments import add_options, add_text, flag, with_flags
from lobs_native.cli.job import Job
from lobs_native.cli.tables import aligned
from lobs_native.errors import ArgumentError
from lobs_native.files.atomic import new_folder
from lobs_native.network.shrinking.shrink import shrink
from lobs_native.network.shrinking.shrink_plan import BUDGETS
from lobs_native.network.shrinking.shrink_report import ShrinkReport
from lobs_native.network.shrinking.units import BY_DEFAULT, KINDS
from lobs_native.report.text import visible
from lobs_native.solvers.methods import COLUMNS

__all__ = ["add_shrink", "by_option", "run", "table"]

# Those of prune that mean the same here.
_AS_PRUNE = (
    "damping",
    "inputs",
    "token_weights",
    "device",
    "memory",
    "held_back",
    "run_dir",
    "resume",
    "seed",
)
_OPTIONS = (*BUDGETS, "kinds", "latency_table", "multiple", "method", "pairs", *_AS_PRUNE)
# Of the report about the repair, what belongs to the whole command.
_OF_RUN = ("run_dir", "resumed layers", "resumed despite")

_SHRINK = """Make a network smaller: remove neurons, heads, channels, experts or blocks, and repair.

MODEL is as for prune. The new folder holds the smaller weights and the configuration with the new
sizes, so that stock transformers loads it; everything else in the old folder; report.json, and
report.html about the repaired layers. Kinds of units that the configuration cannot count stay.
"""


def add_shrink(commands: Any) -> argparse.ArgumentParser:
    """The ``shrink`` command with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "shrink",
        help="make a network smaller and faster: fewer neurons, heads, channels, experts, blocks",
        description=_SHRINK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder, a GGUF file, or module:function")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--overwrite", action="store_true", help="replace DIR if it holds an earlier result")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--no-progress", action="store_true", help="no progress bars (only on a terminal anyway)")
    title = "how far (one of the first three, or some of the others)"
    far = command.add_argument_group(title).add_argument
    for budget in BUDGETS:
        help_ = f"largest share of the {budget} of the layers concerned that may stay"
        far(f"--{budget}", type=float, metavar="X", help=help_)
    help_ = "JSON file of times for --latency, read and written; default: none"
    far("--latency-table", metavar="FILE", help=help_)
    for kind in KINDS:
        help_ = f"share of the {kind} that stays; default: all"
        far(f"--{kind}", type=float, metavar="X", help=help_)
    help_ = "with a budget: what may be removed, of %(choices)s; default: all but blocks"
    far("--kinds", nargs="+", choices=KINDS, default=BY_DEFAULT, metavar="KIND", help=help_)
    group = command.add_argument_group("how (see lobs_native.shrink)")
    how = group.add_argument
    help_ = "numbers of neurons and channels become multiples of N; default: %(default)s"
    how("--multiple", type=int, default=8, metavar="N", help=help_)
    how("--method", choices=tuple(COLUMNS), default="exact", help="default: %(default)s")
    help_ = "pairs of runs, before and after, to time the first batch; default: %(default)s"
    how("--pairs", type=int, default=5, metavar="N", help=help_)
    add_options(group, _AS_PRUNE)
    add_text(command)
    return command


def by_option(message: str) -> str:
    """An error's message that begins with an argument of Python, with the options in its place."""
    flags = {name: flag(name) for name in _OPTIONS}
    flags |= {f"keep[{kind!r}]": flag(kind) for kind in KINDS}
    flags["keep"] = ", ".join(map(flag, KINDS))
    return with_flags(message, flags)


def run(job: Job, options: argparse.Namespace, out: Path) -> tuple[ShrinkReport, dict[str, Any]]:
    """Shrink the job's network and write it; the report, and the content of report.json."""
    keep = {kind: share for kind in KINDS if (share := getattr(options, kind)) is not None}
    budgets = [name for name in BUDGETS if getattr(options, name) is not None]
    if bool(keep) + len(budgets) != 1:
        names = ", ".join(f"--{name}" for name in (*BUDGETS, *KINDS))
        raise ArgumentError(f"{names}: give one of the first three, or some of the others")
    with new_folder(out, overwrite=options.overwrite) as folder:
        before = None if job.measure is None else job.measure()
        report = shrink(
            job.model,
            job.batches,
            keep=keep or None,
            latency_table=options.latency_table,
            **{name: getattr(options, name) for name in budgets},
            kinds=options.kinds,
            multiple=options.multiple,
            method=options.method,
            pairs=options.pairs,
            forward=job.forward,
            progress=not options.no_progress,
            **{name: getattr(options, name) for name in _AS_PRUNE},
        )
        of_repair = {} if report.pruning is None else report.pruning.settings
        settings = {k: v for k, v in of_repair.items() if k in _OF_RUN}
        result = {**report.to_dict(), "settings": settings | job.settings}
        if job.measure is not None:
            result["settings"] |= {"perplexity before": before, "perplexity after": job.measure()}
        result["settings"] |= job.save(folder, {}, None, None)
        text = json.dumps(result, indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        if report.pruning is not None:
            report.pruning.save(folder / "report.html")
    return report, result


def table(report: ShrinkReport, settings: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    repaired = () if report.pruning is None else report.pruning.layers
    errors = {layer.name: layer.relative_error for layer in repaired}
    rows = [("before", "units", "stay", "relative error")]
    for family in report.layers:
        units, stay = f"{family.units} {family.kind}", str(len(family.kept))
        if family.error is None:
            of_family = {name: errors[name] for name in family.readers}
        else:
            of_family = dict.fromkeys(family.producers, family.error)
        for name, error in of_family.items():
            rows.append((visible(name), units, stay, f"{error:.4g}"))
    lines = [aligned(rows), *map(visible, report.notes), str(report)]
    if settings.get("perplexity before") is not None:
        lines.append(
            f"perplexity {settings['perplexity before']:.2f} -> {settings['perplexity after']:.2f}"
        )
    return "\n".join(lines)
