"""The work of ``lobs-native speed``: a network's time here, against its dense counterpart."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lobs_native import checks
from lobs_native.cli import job
from lobs_native.cli.tables import aligned
from lobs_native.errors import ArgumentError, LobsError
from lobs_native.files.atomic import write_file
from lobs_native.network.inference.engines import ENGINES
from lobs_native.network.inference.speed import EngineSpeed, LayerSpeed, SpeedReport, measure_speed
from lobs_native.report.text import visible

__all__ = ["add_command", "add_sizes", "batch_of", "by_option", "run", "table"]

_SPEED = """Time a pruned network on this machine, against its dense counterpart.

MODEL is a folder, a GGUF file or module:function, as for prune. A folder is run on random tokens,
a function's network on its first batch. Runs alternate between both networks; each ratio has its
95 % interval.
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
    add("model", metavar="MODEL", help="a folder, a GGUF file, or module:function")
    help_ = "the dense network; default: MODEL with its zeros filled"
    add("--against", metavar="DENSE", help=help_)
    help_ = f"one of {', '.join(ENGINES)}; may be repeated; default: all that are installed"
    add("--runtime", action="append", metavar="NAME", help=help_)
    add_sizes(command)
    add("--pairs", type=int, default=7, metavar="N", help="pairs of runs; default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: those of torch")
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
    name, colon, rest = message.partition(": ")
    option = {"runtimes": "--runtime", "pairs": "--pairs"}.get(name)
    return option + colon + rest if option else message


def run(options: argparse.Namespace) -> str:
    """Find the networks, time them, draw the picture; the table or JSON."""
    if options.picture is not None:
        _check_matplotlib()
    if options.threads is not None:
        torch.set_num_threads(checks.positive_int(options.threads, "--threads"))
    pruned = job.find(options.model, None, {}, planning=True)
    dense = None if options.against is None else job.find(options.against, None, {}, planning=True)
    batch = batch_of(pruned, options)
    report = measure_speed(
        pruned.model,
        batch,
        against=None if dense is None else dense.model,
        runtimes=options.runtime,
        pairs=options.pairs,
    )
    if options.picture is not None:
        write_file(options.picture, _png(report))
    if options.json:
        return json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return table(report)


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


def table(report: SpeedReport) -> str:
    """The report for a terminal."""
    head = ("runtime", "version", "dense, ms", "pruned, ms", "times as fast [95 %]")
    parts = [aligned([head, *((e.engine, e.version, *_cells(e)) for e in report.engines)])]
    of_layers = [("layer, as SparseLinear", "zeros", "rows", "dense, ms", "sparse, ms", "times")]
    for layer in report.layers:
        zeros, rows = f"{layer.sparsity:.0%}", str(layer.rows)
        of_layers.append((visible(layer.name), zeros, rows, *_cells(layer)))
    if report.layers:
        parts.append(aligned(of_layers))
    parts += [f"{name}: not measured: {visible(why)}" for name, why in report.left.items()]
    before, after = report.parameters
    parts.append(
        f"{report.sparsity:.1%} of the linear weights are zero; {after:,} parameters against "
        f"{before:,}; dense is {report.counterpart}; {report.machine['threads']} threads"
    )
    parts.append(report.advice)
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


def _png(report: SpeedReport) -> bytes:
    """A bar for every runtime: how many times as fast the pruned network is."""
    from matplotlib.figure import Figure

    names: Iterable[str] = [e.engine for e in report.engines]
    ratios = [e.ratio for e in report.engines]
    lows = [e.ratio - e.interval[0] for e in report.engines]
    highs = [e.interval[1] - e.ratio for e in report.engines]
    figure = Figure(figsize=(7, 1 + 0.5 * len(ratios)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(names), ratios, xerr=(lows, highs), color="0.6")
    axes.axvline(1, color="0.2", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as dense, {report.sparsity:.0%} zeros")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
