"""The command line: ``lobs-native`` and ``python -m lobs_native``. It parses and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lobs_native
from lobs_native.cli import demo, doctor, export, job, shrinking, speed, torchrun
from lobs_native.cli.arguments import TEXT, add_prune, by_option, settings_of
from lobs_native.cli.surroundings import (
    TerminatedError,
    around_models,
    at_work,
    heeding_sigterm,
)
from lobs_native.cli.tables import aligned, in_short, plan_table, report_table
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    LobsError,
    PatternError,
    RankError,
)
from lobs_native.files.atomic import check_new_folder
from lobs_native.report.text import visible
from lobs_native.rundir import inspection
from lobs_native.rundir.underway import StoppedError

__all__ = ["main"]

OK, FAILED, USAGE, IO_FAILED, STOPPED = 0, 1, 2, 74, 75
INTERRUPTED, READER_GONE, TERMINATED = 130, 141, 143
_LISTED = 4  # files and tensors named on standard error; report.json has all of them


_EPILOG = """exit codes:
  0    done
  1    a check failed, or the command could not be carried out (one line on standard error)
  2    wrong usage: an argument is missing, unknown, out of its range, or does not fit
  74   with a run directory: a file could not be read or written, or is damaged; finished layers
       are kept
  75   with a run directory: ended by SIGTERM after the current layer or calibration batch; can be
       resumed. Under torchrun: another process has ended; with a run directory, can be resumed
  130  interrupted by Ctrl-C, in the middle of a layer; with a run directory finished ones are kept
  141  the reader of the output went away
  143  without a run directory: ended by SIGTERM at once; nothing is written
"""


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
    options = argparse.Namespace()
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
        _complain(getattr(options, "by_option", str)(str(error)), error)
        if isinstance(error, (ArgumentError, BackendError, PatternError)):
            return USAGE
        if isinstance(error, RankError):
            return torchrun.LOST
        return IO_FAILED if kept and isinstance(error, (CheckpointError, OSError)) else FAILED
    except KeyboardInterrupt as error:
        _complain("interrupted", error)
        return INTERRUPTED
    except (StoppedError, TerminatedError) as error:
        _complain("ended by SIGTERM", error)
        return STOPPED if isinstance(error, StoppedError) else TERMINATED
    return code


def _complain(message: str, error: BaseException) -> None:
    """One line on standard error: the message, and the notes that were added to the error; of
    several ranks, from one of them."""
    if torchrun.is_told_elsewhere(error):
        return
    line = "; ".join([message, *getattr(error, "__notes__", [])])
    print(f"lobs-native: {visible(line)}", file=sys.stderr)


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

    help_ = "train a small network on real digits, prune it six ways and compare"
    command = commands.add_parser("demo", help=help_, description=help_)
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

    add_prune(commands).set_defaults(run_command=_prune, by_option=by_option)
    shrinking.add_shrink(commands).set_defaults(run_command=_shrink, by_option=shrinking.by_option)

    for also in (speed, export):
        command = also.add_command(commands)
        command.set_defaults(run_command=_printing(also.run), by_option=also.by_option)

    help_ = "resume a run that prune --run-dir or shrink --run-dir began, by the same command"
    more = "A MODEL of the form module:function is imported again; resume only runs you trust."
    command = commands.add_parser("resume", help=help_, description=f"{help_}. {more}")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    help_ = "also if model, data, versions or threads are no longer the same"
    command.add_argument("--anyway", action="store_true", help=help_)
    command.set_defaults(run_command=_resume, by_option=by_option)

    help_ = "show the state of a run directory, even while it is in use; exit code 1 if damaged"
    command = commands.add_parser("inspect", help=help_, description=help_)
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    command.add_argument("--json", action="store_true", help="print JSON")
    help_ = "drop damaged records and all that follow them, so that the run can resume; lists them"
    command.add_argument("--repair", action="store_true", help=help_)
    command.set_defaults(run_command=_inspect)

    help_ = "write the report of a run directory, finished or not"
    command = commands.add_parser("report", help=help_, description=help_)
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    help_ = "the page to write; or FILE.json"
    command.add_argument("--html", type=Path, metavar="FILE", required=True, help=help_)
    command.set_defaults(run_command=_report)

    help_ = "show versions, processor level, threads and devices, and check the kernels"
    command = commands.add_parser("doctor", help=help_, description=help_)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run_command=_doctor)
    return parser


def _prune(options: argparse.Namespace) -> int:
    with around_models():
        if not options.plan:
            out = _check_out(options)
        task = _task(options, planning=options.plan, fold=options.fold_weights)
        settings = settings_of(options)
        if options.plan:
            planned = job.plan(task, settings)
        else:
            with at_work(options), torchrun.joined(options.rank_timeout) as group:
                how = {"masks": options.masks, "mask_bits": options.mask_bits, "group": group}
                report = job.run(task, settings, out, overwrite=options.overwrite, **how)
    if torchrun.rank() > 0:
        return OK
    if options.plan:
        print(json.dumps(planned, indent=1) if options.json else plan_table(planned))
        return OK
    for what in ("tensors left out", "tensors pruned in another dtype", "files left out"):
        if some := report.settings.get(what):
            more = f", and {len(some) - _LISTED} more" if len(some) > _LISTED else ""
            listed = visible(", ".join(some[:_LISTED]))
            print(f"lobs-native: {what}: {listed}{more}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.to_dict(), "out": str(out)}, indent=1, allow_nan=False))
    else:
        print(report_table(report))
        print(f"wrote {visible(out)}")
    return OK


def _task(options: argparse.Namespace, **how: bool) -> job.Job:
    """The network of ``prune`` or ``shrink``, with its batches."""
    text = {name: getattr(options, name) for name in TEXT}
    return job.find(options.model, options.calibration, text, seed=options.seed, **how)


def _shrink(options: argparse.Namespace) -> int:
    torchrun.check_alone("shrink")
    with around_models():
        out = _check_out(options)
        task = _task(options)
        with at_work(options):
            report, result = shrinking.run(task, options, out)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print(shrinking.table(report, result["settings"]))
        print(f"wrote {visible(out)}")
    return OK


def _printing(work: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    """A command that prints what ``work`` returns, and nothing that a model's code prints."""

    def command(options: argparse.Namespace) -> int:
        torchrun.check_alone(options.arguments[0])
        with around_models():
            if "out" in options:
                options.out = _check_out(options)
            with heeding_sigterm(kept=False):
                text = work(options)
        print(text)
        return OK

    return command


def _resume(options: argparse.Namespace) -> int:
    arguments = inspection.command_of(options.run_dir)
    again = _parser().parse_args(arguments)
    again.arguments = arguments
    options.by_option = again.by_option
    again.run_dir = options.run_dir  # it may have been moved
    again.resume = "anyway" if options.anyway else "auto"
    if (done := _finished(again)) is not None:
        print(done)
        return OK
    code: int = again.run_command(again)
    return code


def _finished(options: argparse.Namespace) -> str | None:
    """A line to print if a run has written its result; None if there is something left to do."""
    state = inspection.inspect(options.run_dir)
    if state["missing"] or state["problems"] or options.out is None:
        return None
    try:
        report = json.loads((options.out / "report.json").read_text(encoding="utf-8"))
        of_run = Path(report["settings"]["run_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if of_run.resolve() != Path(state["path"]).resolve():
        return None
    return (
        f"nothing is left to do: all {state['layers']} layers in {visible(state['path'])} are "
        f"done, and the result is in {visible(options.out)}"
    )


def _check_out(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise ArgumentError("--out: it is missing; name a folder to write, or pass --plan")
    try:
        out = check_new_folder(options.out, overwrite=options.overwrite)
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("pass overwrite", "pass --overwrite")) from error
    source = Path(options.model).resolve()
    if source.is_dir() and (source in (out, *out.parents) or out in source.parents):
        raise ArgumentError(f"--out: {out} and the model's folder {source} must lie apart")
    return out


def _inspect(options: argparse.Namespace) -> int:
    repaired = inspection.repair(options.run) if options.repair else []
    state = {
        **inspection.inspect(options.run),
        **({"repaired": repaired} if options.repair else {}),
    }
    if options.json:
        print(json.dumps(state, indent=1))
        return FAILED if state["problems"] else OK
    rows = [("layer", "sparsity", "relative error")]
    for layer in state["done"]:
        error = f"{float(layer['relative_error']):.4g}"
        rows.append((visible(layer["name"]), f"{layer['sparsity']:.4f}", error))
    print(aligned(rows))
    print(visible(in_short(state["config"], state["versions"])))
    print(f"{len(state['done'])} of {state['layers']} layers are done in {visible(state['path'])}")
    for line in (*repaired, *state["problems"]):
        print(visible(line))
    return FAILED if state["problems"] else OK


def _report(options: argparse.Namespace) -> int:
    print(f"wrote {visible(inspection.report_of(options.run).save(options.html))}")
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
    good, summary = doctor.self_check()
    rows.append(("self-check", summary))
    print(json.dumps({"ok": good, **dict(rows)}, indent=1) if options.json else doctor.table(rows))
    return OK if good else FAILED
