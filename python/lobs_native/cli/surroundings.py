"""What surrounds the work of a command: signals, warnings, progress, and its record in a run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lobs_native.cli import torchrun
from lobs_native.report.text import visible
from lobs_native.rundir import ledger
from lobs_native.rundir.underway import stop

__all__ = ["TerminatedError", "around_models", "at_work", "heeding_sigterm"]


class TerminatedError(BaseException):
    """SIGTERM came. Not an Exception, like KeyboardInterrupt."""


@contextlib.contextmanager
def around_models() -> Iterator[None]:
    """While models' code runs: its modules are found, and what it prints and the warnings of this
    package go to standard error, not between the lines of a result."""
    with contextlib.redirect_stdout(sys.stderr), _importable_here(), _plain_warnings():
        yield


@contextlib.contextmanager
def _importable_here() -> Iterator[None]:
    """Modules of the current folder can be imported, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings of this package as one line each, without a line of source."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plain(message: Warning | str, *details: Any, **more: Any) -> None:
            function, _, text = str(message).partition(": ")
            if function.startswith("lobs_native."):
                print(f"lobs-native: warning: {visible(text)}", file=sys.stderr)
            else:
                show(message, *details, **more)

        warnings.showwarning = plain
        yield


class _Visible(logging.Formatter):
    """One line, whatever the names of layers hold."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def _telling(progress: bool) -> Iterator[None]:
    """Where progress bars cannot be seen, write a line on standard error for every block."""
    if not progress or sys.stderr.isatty():
        yield
        return
    log = logging.getLogger("lobs_native")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("lobs-native: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


@contextlib.contextmanager
def at_work(options: argparse.Namespace) -> Iterator[None]:
    """While ``prune`` or ``shrink`` works, with a run directory or without."""
    with (
        heeding_sigterm(options.run_dir is not None),
        _remembered(options.arguments),
        _telling(not (options.no_progress or options.json) and torchrun.rank() == 0),
    ):
        yield


@contextlib.contextmanager
def _remembered(arguments: Sequence[str]) -> Iterator[None]:
    """A run that begins records the command, for ``lobs-native resume``."""
    command = {"folder": os.getcwd(), "name": arguments[0], "arguments": list(arguments[1:])}
    token = ledger.command.set(command)
    try:
        yield
    finally:
        ledger.command.reset(token)


@contextlib.contextmanager
def heeding_sigterm(kept: bool) -> Iterator[None]:
    """With a run directory, SIGTERM lets the current layer or batch finish; without one it ends the
    run cleanly, so that no half-written folder stays."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    def heed(*_: object) -> None:
        if not kept:
            raise TerminatedError
        stop.set()

    stop.clear()
    before = signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        stop.clear()
