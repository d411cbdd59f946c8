"""The command ``python -m lobs_native.run [options] script.py args...``.

It runs an unmodified script as ``python script.py args...`` would, but inside
``lobs_native.compat.patch``, so that this package's solvers replace those of the known hosts. When
the script ends, in whatever way, a record of what was replaced and called goes to standard error.
The exit code is the script's, or 2 for wrong options.
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
    """Run a script. Its exceptions, ``SystemExit`` included, propagate."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    hosts = [name for name in (arguments.hosts or "").split(",") if name]
    options: dict[str, Any] = {}
    for name in ("numerics", "method"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if not os.path.exists(arguments.script):
        parser.error(f"script: there is no file {arguments.script!r}")
    with contextlib.ExitStack() as stack:
        try:
            record = stack.enter_context(compat.patch(*hosts, verify=arguments.verify, **options))
        except LobsError as error:
            parser.error(str(error))
        try:
            _run(arguments.script, arguments.arguments)
        finally:
            sys.stdout.flush()
            print(record, file=sys.stderr)


def _run(script: str, arguments: Sequence[str]) -> None:
    """Run as ``python script arguments...`` does: the script's folder leads ``sys.path``."""
    sys.argv = [script, *arguments]
    if os.path.isfile(script) and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lobs_native.run",
        description="Run an unmodified script with lobs_native's solvers in place of its own.",
    )
    parser.add_argument(
        "--hosts",
        metavar="A,B",
        help=f"the hosts to replace (default: all, {','.join(compat.HOSTS)})",
    )
    parser.add_argument(
        "--verify",
        metavar="N",
        type=int,
        default=0,
        help="repeat every N-th call with the host's own code on copies, and compare the results",
    )
    parser.add_argument(
        "--numerics",
        choices=("host", "ours"),
        help="follow the host's rules (the default) or those of lobs_native.prune_weight",
    )
    parser.add_argument(
        "--method", choices=("exact", "sweep"), help="with --numerics ours (default: exact)"
    )
    parser.add_argument("script", help="a Python file; everything after it is passed to it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")
    return parser


if __name__ == "__main__":
    main()
