"""The work of ``lobs-native speed``: networks' times here, against their dense counterpart."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lobs_native import checks
from lobs_native.cli import job
from lobs_native.cli.arguments import flag, with_flags
from lobs_native.cli.tables import aligned
from lobs_native.errors import ArgumentError, LobsError
from lobs_native.files.atomic import write_file
from lobs_native.network.inference.engines import ENGINES
from lobs_native.network.inference.speed import compare_speed, measure_speed
from lobs_native.network.inference.speed_report import (
    EngineSpeed,
    LayerSpeed,
    SpeedComparison,
    SpeedReport,
)
from lobs_native.report.text import visible

__all__ = ["add_command", "add_sizes", "batch_of", "by_option", "run", "table"]

_AS_IN_PYTHON = ("pairs", "processor_time")

_SPEED = """Time pruned networks on this machine, against their dense counterpart.

MODEL is a folder, a GGUF file or module:function, as for prune. A folder is run on random tokens,
a function's network on its first batch. Several networks made from the same dense one go into one
table. Runs alternate between all networks; each ratio has its 95 % interval.
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """The ``speed`` command with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "speed",
        help="time a pruned network against its dense counterpart in the runtimes installed here",
        description=_SPEED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    help_ = "a folder, a GGUF file, or module:function"
    add("models", metavar="MODEL", nargs="+", help=help_)
    help_ = "the dense network; default, for one MODEL: it with its zeros filled"
    add("--against", metavar="DENSE", help=help_)
    help_ = f"one of {', '.join(ENGINES)}; may be repeated; default: all that are installed"
    add("--runtime", action="append", metavar="NAME", help=help_)
    add_sizes(command)
    add("--pairs", type=int, default=7, metavar="N", help="pairs of runs; default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: those of torch")
    help_ = "seconds of the processor, for a machine that is not quiet; with --threads 1"
    add("--processor-time", action="store_true", help=help_)
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--picture", type=Path, metavar="FILE.png", help="draw the table; needs matplotlib")
    return command


def add_sizes(command: argparse.ArgumentParser) -> None:
    """The options that :func:`batch_of` reads."""
    add = command.add_argument
    add("--batch", type=int, default=1, metavar="N", help="sequences; default: %(default)s")
    add("--length", type=int, default=128, metavar="N", help="tokens in each; default: %(default)s")


def by_option(message: str) -> str:
    """An error's message that begins with an argument of Python, with the option in its place."""
    flags = {name: flag(name) for name in _AS_IN_PYTHON}
    return with_flags(message, {"runtimes": "--runtime", **flags})


def run(options: argparse.Namespace) -> str:
    """Find the networks, time them, draw the picture; the table or JSON."""
    if options.picture is not None:
        _check_matplotlib()
    if options.threads is not None:
        torch.set_num_threads(checks.positive_int(options.threads, "--threads"))
    names: list[str] = options.models
    if len(names) > 1 and options.against is None:
        raise ArgumentError("--against: several networks are compared with one dense network")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ArgumentError(f"MODEL: {twice[0]} is given more than once")
    found = {name: job.find(name, None, {}, planning=True) for name in names}
    batch = batch_of(found[names[0]], options)
    models = {name: each.model for name, each in found.items()}
    how = {name: getattr(options, name) for name in _AS_IN_PYTHON}
    how["runtimes"] = options.runtime
    if options.against is not None:
        how["against"] = job.find(options.against, None, {}, planning=True).model
    report: SpeedReport | SpeedComparison
    if len(names) == 1:
        report = measure_speed(models[names[0]], batch, **how)
        reports = {names[0]: report}
    else:
        report = compare_speed(models, batch, **how)
        reports = report.networks
    if options.picture is not None:
        write_file(options.picture, _png(reports))
    if options.json:
        return json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return table(reports, report.advice)


def batch_of(found: job.Job, options: argparse.Namespace) -> Any:
    """The first batch of a function, or random tokens for a folder."""
    if found.batches is not None:
        if found.forward is not None:
            raise ArgumentError(
                "MODEL: its function returns a forward function, but here the network is called"
            )
        for batch in found.batches:
            return batch
        raise ArgumentError("MODEL: its function returns no batch to run the network on")
    vocabulary = getattr(found.model.config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ArgumentError(
            "MODEL: it does not read tokens; pass module:function, which returns a batch"
        )
    shape = [checks.positive_int(getattr(options, n), f"--{n}") for n in ("batch", "length")]
    tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def table(reports: Mapping[str, SpeedReport], advice: str) -> str:
    """The reports for a terminal, and the advice about all of them."""
    several = len(reports) > 1

    def labelled(label: str, cells: Sequence[str]) -> tuple[str, ...]:
        return (*cells[:1], visible(label), *cells[1:]) if several else tuple(cells)

    head: tuple[str, ...]
    head = ("runtime", "version", "dense, ms", "pruned, ms", "times as fast [95 %]")
    rows = [
        labelled(name, (e.engine, e.version, *_cells(e)))
        for engine in ENGINES
        for name, report in reports.items()
        for e in report.engines
        if e.engine == engine
    ]
    parts = [aligned([labelled("network", head), *rows])]
    head = ("layer, as SparseLinear", "zeros", "rows", "dense, ms", "sparse, ms", "times")
    layers = [
        labelled(name, (visible(e.name), f"{e.sparsity:.0%}", str(e.rows), *_cells(e)))
        for name, report in reports.items()
        for e in report.layers
    ]
    if layers:
        parts.append(aligned([labelled("network", head), *layers]))
    for name, report in reports.items():
        which = f"{visible(name)}: " if several else ""
        left = report.left.items()
        parts += [f"{which}{engine}: not measured: {visible(why)}" for engine, why in left]
        (before, after), threads = report.parameters, report.machine["threads"]
        parts.append(
            f"{which}{report.sparsity:.1%} of the linear weights are zero; {after:,} parameters "
            f"against {before:,}; dense is {report.counterpart}; {threads} threads"
        )
        if several:
            parts.append(which + report.advice)
    parts.append(visible(advice))
    return "\n".join(parts)


def _cells(row: EngineSpeed | LayerSpeed) -> tuple[str, str, str]:
    low, high = row.interval
    times = f"{row.ratio:.2f} [{low:.2f}, {high:.2f}]"
    return f"{row.dense_seconds * 1e3:.3f}", f"{row.pruned_seconds * 1e3:.3f}", times


def _check_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise LobsError(
            f"--picture: matplotlib does not import: {error}; pip install matplotlib"
        ) from error


def _png(reports: Mapping[str, SpeedReport]) -> bytes:
    """A bar for every runtime and network: how many times as fast as dense the network is."""
    from matplotlib.figure import Figure

    measured = [e.engine for report in reports.values() for e in report.engines]
    names = [name for name in ENGINES if name in measured]
    figure = Figure(figsize=(7, 1 + 0.5 * len(measured)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    high = 0.8 / len(reports)
    for i, (label, report) in enumerate(reports.items()):
        rows = report.engines
        places = [names.index(e.engine) + (i - (len(reports) - 1) / 2) * high for e in rows]
        ratios = [e.ratio for e in rows]
        lows = [e.ratio - e.interval[0] for e in rows]
        highs = [e.interval[1] - e.ratio for e in rows]
        shown = f"{Path(label).name}, {report.sparsity:.0%} zeros"
        axes.barh(
            places,
            ratios,
            0.9 * high,
            xerr=(lows, highs),
            label=shown,
            color=str(0.75 - 0.5 * i / len(reports)),
        )
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as dense")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
