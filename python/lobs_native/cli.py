"""The command line: ``lobs-native`` and ``python -m lobs_native``. Parses and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lobs_native
from lobs_native import demo, doctor, files, job, ledger
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    LobsError,
    PatternError,
)
from lobs_native.html import visible
from lobs_native.ledger import RESUMES
from lobs_native.pruner import INPUTS
from lobs_native.report import Report
from lobs_native.underway import StoppedError, stop
from lobs_native.weight import METHODS, REFINES, SCOPES

__all__ = ["main"]

OK, FAILED, USAGE, IO_FAILED, STOPPED = 0, 1, 2, 74, 75
INTERRUPTED, READER_GONE, TERMINATED = 130, 141, 143

# Options of "prune" that lobs_native.prune takes, and those that concern a folder's text and files.
_ARGUMENTS = (
    *("sparsity", "threshold", "max_error", "method", "pattern", "scope", "damping", "prune_bias"),
    *("spread", "sensitivity", "budget", "refine", "include", "exclude", "inputs", "blocks"),
    *("token_mask", "device", "memory", "backend", "run_dir", "resume", "seed"),
)
_TEXT = ("lines", "min_words", "length", "batch_size", "shard_size")

_EPILOG = """exit codes:
  0    done
  1    a check failed, or the command could not be carried out (one line on standard error)
  2    wrong usage: an argument is missing, unknown, out of its range, or does not fit
  74   with a run directory: a file could not be read or written, or is damaged; finished layers
       are kept
  75   with a run directory: ended by SIGTERM after the layer or the calibration batch it was at,
       and can be resumed
  130  interrupted by Ctrl-C, in the middle of a layer; with a run directory finished ones are kept
  141  whatever read the output went away
  143  without a run directory: ended by SIGTERM at once; nothing is written
"""


class _TerminatedError(BaseException):
    """SIGTERM came. No Exception, like KeyboardInterrupt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name. Default: those of the process.

    Returns
    -------
    int
        As listed by ``lobs-native --help``. A LobsError, OSError or MemoryError becomes one line on
        standard error.
    """
    kept = False
    try:
        options = _parser().parse_args(argv)
        options.arguments = list(sys.argv[1:] if argv is None else argv)
        kept = getattr(options, "run_dir", None) is not None
        code: int = options.run_command(options)
        sys.stdout.flush()  # here, so that a reader who is gone is noticed here
    except SystemExit as end:  # argparse: --help, --version, wrong usage
        return end.code if isinstance(end.code, int) else FAILED
    except BrokenPipeError:
        # Python flushes standard output once more when it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except (LobsError, OSError, MemoryError) as error:
        _complain(str(error), error)
        if isinstance(error, (ArgumentError, BackendError, PatternError)):
            return USAGE
        return IO_FAILED if kept and isinstance(error, (CheckpointError, OSError)) else FAILED
    except KeyboardInterrupt as error:
        _complain("interrupted", error)
        return INTERRUPTED
    except (StoppedError, _TerminatedError) as error:
        _complain("ended by SIGTERM", error)
        return STOPPED if isinstance(error, StoppedError) else TERMINATED
    return code


def _complain(said: str, error: BaseException) -> None:
    """One line on standard error, with what was added to the error on its way."""
    notes = "; ".join([said, *getattr(error, "__notes__", [])])
    print(f"lobs-native: {visible(notes)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lobs-native",
        description=(lobs_native.__doc__ or "").splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"lobs-native {lobs_native.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    said = "train a small network on real digits, prune it five ways and compare"
    command = commands.add_parser("demo", help=said, description=said)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("lobs-demo"),
        metavar="DIR",
        help="folder for demo.json, report.html and demo.png (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    command.add_argument("--quiet", action="store_true", help="no progress bars, no table")
    command.set_defaults(run_command=_demo)

    _add_prune(commands)

    said = "go on with a run that lobs-native prune --run-dir began, by the same command"
    more = "A MODEL of the form module:function is imported again; resume only runs you trust."
    command = commands.add_parser("resume", help=said, description=f"{said}. {more}")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    said = "also if model, data, versions or threads are no longer the same"
    command.add_argument("--anyway", action="store_true", help=said)
    command.set_defaults(run_command=_resume)

    said = (
        "show the state of a run directory, of a run that goes on as well; exit code 1 if damaged"
    )
    command = commands.add_parser("inspect", help=said, description=said)
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    command.add_argument("--json", action="store_true", help="print JSON")
    said = "drop what is damaged and all that follows it, and go on from there later; says what"
    command.add_argument("--repair", action="store_true", help=said)
    command.set_defaults(run_command=_inspect)

    said = "write the report of a run directory, finished or not"
    command = commands.add_parser("report", help=said, description=said)
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    said = "the page to write; or FILE.json"
    command.add_argument("--html", type=Path, metavar="FILE", required=True, help=said)
    command.set_defaults(run_command=_report)

    said = "show versions, processor level, threads and devices, and check the kernels"
    command = commands.add_parser("doctor", help=said, description=said)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run_command=_doctor)
    return parser


_PRUNE = """Prune a network and write it into a new folder.

MODEL is a folder in the style of Hugging Face (config.json, *.safetensors, tokenizer), which needs
pip install "lobs-native[hf]" and --calibration; or module:function, where the function returns
(model, batches) or (model, batches, forward) and modules of the current folder can be imported.
The new folder holds the weights, dense with zeros in them, in the dtype they had; of a folder also
everything else in it; and report.json and report.html. It is there whole or not at all. Nothing is
downloaded. For a folder the layer that makes the logits is left alone unless --include names it.
"""


def _add_prune(commands: Any) -> None:
    command = commands.add_parser(
        "prune",
        help="prune a network in a folder, or one that a function returns",
        description=_PRUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder, or module:function")
    add("--out", type=Path, metavar="DIR", help="the folder to write; needed unless --plan")
    add("--overwrite", action="store_true", help="replace DIR if it holds an earlier result")
    add("--masks", action="store_true", help="write masks.safetensors too (True = kept)")
    add("--plan", action="store_true", help="say what would be pruned, with memory, and stop")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--no-progress", action="store_true", help="no progress bars (only on a terminal anyway)")

    group = command.add_argument_group("how far (one of them, or an N:M pattern)")
    target = group.add_mutually_exclusive_group()
    said = "share of the weights to remove, 0 to 1"
    target.add_argument("--sparsity", type=float, metavar="X", help=said)
    said = "the paper's epsilon on sqrt(L_q)"
    target.add_argument("--threshold", type=float, metavar="X", help=said)
    said = "largest error of a layer's output"
    target.add_argument("--max-error", type=float, metavar="X", help=said)

    add = command.add_argument_group("how (see lobs_native.prune)").add_argument
    add("--method", choices=METHODS, default="exact", help="default: %(default)s")
    add("--pattern", default="unstructured", help='"N:M", "1xB" or (default) %(default)s')
    add("--scope", choices=(*SCOPES, "model"), default="layer", help="default: %(default)s")
    said = "scope model: how far a layer may be from --sparsity (1: any); default: %(default)s"
    add("--spread", type=float, default=0.2, metavar="X", help=said)
    said = "weigh rows and layers by how much the output depends on them; auto: with scope model"
    add("--sensitivity", type=_choice, default="auto", metavar="auto|output|bound|none", help=said)
    said = "with scope model, what --sparsity is a share of; default: %(default)s"
    add("--budget", choices=("weights", "flops"), default="weights", help=said)
    add("--refine", choices=REFINES, help="repair the kept weights further; default: not")
    add("--inputs", choices=INPUTS, default="pruned", help="default: %(default)s")
    said = "run stacks of blocks block by block, or the whole model for every layer"
    add("--blocks", type=_choice, default="auto", metavar="auto|none", help=said)
    said = "leave out what the batches' attention_mask leaves out, or count it"
    add("--token-mask", type=_choice, default="auto", metavar="auto|none", help=said)
    said = "glob on layer names; may be repeated; default: all linear and convolution layers"
    add("--include", action="append", metavar="GLOB", help=said)
    add("--exclude", action="append", metavar="GLOB", help="likewise, to leave layers out")
    add("--damping", type=float, default=0.01, metavar="X", help="default: %(default)s")
    add("--prune-bias", action="store_true", help="biases may be removed, too")
    add("--device", help="move the model and each batch there, for example cuda")
    said = "limit on what pruning takes besides the model and its forward pass, for example 4GB"
    add("--memory", type=_size, metavar="SIZE", help=said)
    add("--backend", help="a name from lobs-native doctor; default: the fastest")
    said = "keep every finished layer there; the same command goes on after any end"
    add("--run-dir", type=Path, metavar="DIR", help=said)
    said = "where --run-dir holds a run: go on if it is this one (auto, the default), or anyway"
    add("--resume", choices=RESUMES, default="auto", help=said)
    add("--seed", type=int, default=0, help="default: %(default)s")

    add = command.add_argument_group("for folders").add_argument
    add("--calibration", type=Path, metavar="FILE", help="UTF-8 text to calibrate on")
    add("--lines", type=int, metavar="N", help="lines of it at most; default 600")
    add("--min-words", type=int, metavar="N", help="shorter lines are left out; default 20")
    said = "tokens per line, or per block for causal language models; default 128"
    add("--length", type=int, metavar="N", help=said)
    add("--batch-size", type=int, metavar="N", help="default 8")
    add("--shard-size", type=_size, metavar="SIZE", help="largest weight file; default 5GB")
    command.set_defaults(run_command=_prune)


def _choice(text: str) -> str | None:
    """An argument of prune that may be None."""
    return None if text == "none" else text


def _size(text: str) -> int:
    """Bytes from "4000000000", "4GB" or "4GiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT])(i?)B?|B)?", text, re.IGNORECASE)
    size = 0
    if found:
        number, prefix, binary = found.groups()
        power = " kmgt".index(prefix.lower()) if prefix else 0
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size in bytes; write for example 4000000000, 4GB or 4GiB"
        )
    return size


def _prune(options: argparse.Namespace) -> int:
    given = vars(options)
    arguments = {name: given[name] for name in _ARGUMENTS}
    text = {name: given[name] for name in _TEXT}
    # What the model's code prints must not get between the lines of a result.
    with contextlib.redirect_stdout(sys.stderr), job.importable_here():
        if not options.plan:
            out = _check_out(options)
        found = job.find(options.model, options.calibration, text, planning=options.plan)
        if options.plan:
            planned = job.plan(found, arguments)
        else:
            arguments["progress"] = not options.no_progress
            with _heeding_sigterm(options.run_dir is not None), _remembered(options.arguments):
                report = job.run(
                    found, arguments, out, overwrite=options.overwrite, masks=options.masks
                )
    if options.plan:
        print(json.dumps(planned, indent=1) if options.json else _plan_table(planned))
        return OK
    for what in ("tensors left out", "tensors converted", "files left out"):
        if some := report.settings.get(what):
            print(f"lobs-native: {what}: {visible(', '.join(some))}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.to_dict(), "out": str(out)}, indent=1, allow_nan=False))
    else:
        print(_report_table(report))
        print(f"wrote {visible(out)}")
    return OK


def _resume(options: argparse.Namespace) -> int:
    arguments = ledger.command_of(options.run_dir)
    again = _parser().parse_args(["prune", *arguments])
    again.arguments = ["prune", *arguments]
    again.run_dir = options.run_dir  # it may have been moved
    again.resume = "anyway" if options.anyway else "auto"
    return _prune(again)


@contextlib.contextmanager
def _remembered(arguments: Sequence[str]) -> Iterator[None]:
    """A run that begins keeps the command, for :func:`_resume`."""
    told = {"folder": os.getcwd(), "arguments": list(arguments[1:])}
    token = ledger.command.set(told)
    try:
        yield
    finally:
        ledger.command.reset(token)


@contextlib.contextmanager
def _heeding_sigterm(kept: bool) -> Iterator[None]:
    """With a run directory, SIGTERM lets the present layer or batch finish; without one it ends the
    run in an orderly way, so that no half-written folder stays."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    def heed(*_: object) -> None:
        if not kept:
            raise _TerminatedError
        stop.set()

    stop.clear()
    before = signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        stop.clear()


def _check_out(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise ArgumentError("--out: it is missing; name a folder to write, or ask for a --plan")
    out = files.check_new_folder(options.out, overwrite=options.overwrite)
    source = Path(options.model).resolve()
    if source.is_dir() and (source in (out, *out.parents) or out in source.parents):
        raise ArgumentError(f"--out: {out} and the model's folder {source} must lie apart")
    return out


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _plan_table(planned: dict[str, Any]) -> str:
    rows = [("layer", "kind", "shape", "asked", "memory of exact")]
    for layer in planned["layers"]:
        size = "-" if layer["bytes"] is None else f"{layer['bytes'] / 1e6:,.1f} MB"
        shape = " x ".join(map(str, layer["shape"]))
        rows.append((visible(layer["name"]), layer["kind"], shape, layer["asked"], size))
    skipped = [f"skipped {visible(s['name'])}: {s['reason']}" for s in planned["skipped"]]
    weights = sum(layer["weights"] for layer in planned["layers"])
    last = [f"{len(planned['layers'])} layers with {weights:,} weights"]
    if planned["run"] is not None:
        last.append(visible(planned["run"]["text"]))
    return "\n".join([_aligned(rows), *skipped, *last])


def _report_table(report: Report) -> str:
    rows = [("layer", "sparsity", "relative error", "damping")]
    for layer in report.layers:
        error, damping = f"{layer.relative_error:.4g}", f"{layer.damping:g}"
        rows.append((visible(layer.name), f"{layer.sparsity:.4f}", error, damping))
    notes = [f"{visible(r.name)}: {visible(note)}" for r in report.layers for note in r.notes]
    notes += [f"skipped {visible(s.name)}: {visible(s.reason)}" for s in report.skipped]
    last = (
        f"removed {report.removed:,} of {report.weights:,} weights ({report.sparsity:.4f}) in "
        f"{report.seconds:.1f} s"
    )
    return "\n".join([_aligned(rows), *notes, last])


def _inspect(options: argparse.Namespace) -> int:
    repaired = ledger.repair(options.run) if options.repair else []
    found = {**ledger.inspect(options.run), **({"repaired": repaired} if options.repair else {})}
    if options.json:
        print(json.dumps(found, indent=1))
        return FAILED if found["problems"] else OK
    rows = [("layer", "sparsity", "relative error")]
    for layer in found["done"]:
        error = f"{float(layer['relative_error']):.4g}"
        rows.append((visible(layer["name"]), f"{layer['sparsity']:.4f}", error))
    print(_aligned(rows))
    print(visible(_in_short(found["config"], found["versions"])))
    print(f"{len(found['done'])} of {found['layers']} layers are done in {visible(found['path'])}")
    for line in (*repaired, *found["problems"]):
        print(visible(line))
    return FAILED if found["problems"] else OK


def _in_short(config: dict[str, Any], versions: dict[str, Any]) -> str:
    """What a run is, in one line."""
    targets = ("sparsity", "threshold", "max_error", "pattern", "inputs")
    told = [f"{name} {config[name]}" for name in targets if config.get(name) is not None]
    made_by = [f"{name} {version}" for name, version in versions.items()]
    return f"{', '.join([str(config.get('method')), *told])}; {', '.join(made_by)}"


def _report(options: argparse.Namespace) -> int:
    print(f"wrote {visible(ledger.report_of(options.run).save(options.html))}")
    return OK


def _demo(options: argparse.Namespace) -> int:
    demo.check_folder(options.out)
    result = demo.compare(progress=not options.quiet)
    paths = demo.save(result, options.out)
    if options.json:
        print(json.dumps(result.to_dict(), indent=1))
    elif not options.quiet:
        print(demo.table(result))
        print(f"\nwrote {', '.join(map(str, paths))} after {result.seconds:.1f} s")
    return OK


def _doctor(options: argparse.Namespace) -> int:
    rows = doctor.examine()
    good, said = doctor.self_check()
    rows.append(("self-check", said))
    print(json.dumps({"ok": good, **dict(rows)}, indent=1) if options.json else doctor.table(rows))
    return OK if good else FAILED
