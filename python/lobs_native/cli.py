"""The command line: ``lobs-native`` and ``python -m lobs_native``. Parses and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lobs_native
from lobs_native import demo, doctor
from lobs_native.errors import LobsError
from lobs_native.html import visible

__all__ = ["main"]

OK, FAILED, INTERRUPTED, READER_GONE = 0, 1, 130, 141

_EPILOG = """exit codes:
  0    done
  1    a check failed, or the command could not be carried out (one line on standard error)
  2    wrong usage
  130  interrupted by Ctrl-C
  141  whatever read the output went away
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
        As listed by ``lobs-native --help``. A LobsError becomes one line on standard error.
    """
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
        sys.stdout.flush()  # here, so that a reader who is gone is noticed here
    except SystemExit as stop:  # argparse: --help, --version, wrong usage
        return stop.code if isinstance(stop.code, int) else FAILED
    except LobsError as error:
        print(f"lobs-native: {visible(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("lobs-native: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more when it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return code


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
    command.set_defaults(run=_demo)

    said = "show versions, processor level, threads and devices, and check the kernels"
    command = commands.add_parser("doctor", help=said, description=said)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)
    return parser


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
