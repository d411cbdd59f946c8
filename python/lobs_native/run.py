"""``python -m lobs_native.run [options] script.py args...``: an unmodified script with our solvers.

The script runs as ``python script.py args...`` would run it, inside ``lobs_native.compat.patch``:
what it uses of the known hosts is replaced by ours. At the end, however it ends, the record of what
was replaced and called goes to standard error. The exit code is the script's; 2 for wrong options.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from lobs_native import compat
from lobs_native.errors import LobsError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script; what it raises, ``SystemExit`` included, comes through."""
    parser = _parser()
    given = parser.parse_args(argv)
    hosts = [name for name in (given.hosts or "").split(",") if name]
    options: dict[str, Any] = {}
    for name in ("numerics", "method"):
        if getattr(given, name) is not None:
            options[name] = getattr(given, name)
    if not os.path.exists(given.script):
        parser.error(f"script: there is no file {given.script!r}")
    with contextlib.ExitStack() as stack:
        try:
            record = stack.enter_context(compat.patch(*hosts, verify=given.verify, **options))
        except LobsError as error:
            parser.error(str(error))
        try:
            _run(given.script, given.arguments)
        finally:
            sys.stdout.flush()
            print(record, file=sys.stderr)


def _run(script: str, arguments: Sequence[str]) -> None:
    """As ``python script arguments...``: its folder comes first on the path in place of ours."""
    sys.argv = [script, *arguments]
    if os.path.isfile(script) and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lobs_native.run",
        description="Run an unmodified script with the solvers of lobs_native in its hosts' place.",
    )
    parser.add_argument(
        "--hosts", metavar="A,B", help=f"which to replace; default all: {','.join(compat.HOSTS)}"
    )
    parser.add_argument(
        "--verify",
        metavar="N",
        type=int,
        default=0,
        help="repeat every N-th call with the host's own code on copies, and compare",
    )
    parser.add_argument(
        "--numerics",
        choices=("host", "ours"),
        help="the host's rules (the default), or those of lobs_native.prune_weight",
    )
    parser.add_argument(
        "--method", choices=("exact", "sweep"), help="with --numerics ours; default exact"
    )
    parser.add_argument("script", help="a Python file; everything after it is handed to it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    return parser


if __name__ == "__main__":
    main()
