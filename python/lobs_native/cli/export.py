"""The work of ``lobs-native export``: a network in another format, with its zeros counted there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lobs_native.cli import job
from lobs_native.cli.arguments import flag, with_flags
from lobs_native.cli.speed import add_sizes, batch_of
from lobs_native.cli.tables import aligned
from lobs_native.files.atomic import new_folder
from lobs_native.network.inference.export import FORMATS, QUANTIZERS, REFUSED, ExportReport, export
from lobs_native.report.text import visible

__all__ = ["add_command", "by_option", "run", "table"]

_EXPORT = """Write a network in another format, by that program's converter, and count its zeros.

MODEL is a folder, a GGUF file or module:function, as for prune. Each weight with zeros is found in
the new files by its values, since converters rename and transpose. Nothing is written if a single
zero is lost. The sizes of the input are those of --batch and --length, or of a function's first
batch.
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """The ``export`` command with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a network for ONNX, OpenVINO, MNN, Core ML, ..., with its zeros counted there",
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder, a GGUF file, or module:function")
    add("--to", choices=FORMATS, default="onnx", help="default: %(default)s")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--overwrite", action="store_true", help="replace DIR if it holds an earlier result")
    help_ = f"{', '.join(QUANTIZERS)}; refused, with the reason, because they lose zeros: "
    add("--quantize", metavar="NAME", help=help_ + ", ".join(REFUSED))
    add_sizes(command)
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return command


def by_option(message: str) -> str:
    """An error's message that begins with an argument of Python, with the option in its place."""
    return with_flags(message, {name: flag(name) for name in ("out", "to", "quantize")})


def run(options: argparse.Namespace) -> str:
    """Find the network and write it; the table or JSON."""
    found = job.find(options.model, None, {}, planning=True)
    batch = batch_of(found, options)
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        report = export(found.model, batch, folder, to=options.to, quantize=options.quantize)
        text = json.dumps(report.to_dict(), indent=1)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        return text
    return f"{table(report)}\nwrote {visible(options.out)}"


def table(report: ExportReport) -> str:
    """The report for a terminal."""
    rows = [("layer", "in the file", "zeros", "zero there")]
    for weight in report.weights:
        name = visible(weight.tensor) + (" (transposed)" if weight.transposed else "")
        rows.append((visible(weight.layer), name, f"{weight.zeros:,}", f"{weight.kept:,}"))
    zeros = sum(weight.zeros for weight in report.weights)
    what = report.format + (f", {report.quantized}" if report.quantized else "")
    return "\n".join(
        (aligned(rows), f"{report.file} ({what}): all {zeros:,} zeros kept; {report.bytes:,} bytes")
    )
