"""Time and memory of the stages of a run, measured from outside: the package does not know of it.

Memory is the resident set of the process, on Linux. A stage within another one is not counted
twice.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lobs_native.errors import LobsError
from lobs_native.network import peak

__all__ = ["Spent", "Stages", "memory"]


@dataclass
class Spent:
    """What one stage took, all its parts together."""

    seconds: float = 0.0  # that passed
    core_seconds: float = 0.0  # of all threads: other programs on the machine hardly change them
    peak: int = 0  # bytes resident, the most at any time

    def add(self, seconds: float, core_seconds: float, peak: int) -> None:
        """Add one more part."""
        self.seconds += seconds
        self.core_seconds += core_seconds
        self.peak = max(self.peak, peak)


class Stages:
    """Stages by name; ``with stages("inverse"):`` measures a part of one."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}
        self._open: list[str] = []
        self._since = _now()
        _forget_peak()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a part of the stage ``name``; an enclosing stage pauses."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    @contextlib.contextmanager
    def replacing(self, *functions: tuple[ModuleType, str, Callable[..., Any]]) -> Iterator[None]:
        """Redirect calls of ``module.name`` to another function.

        That function gets the original as its first argument.
        """
        with contextlib.ExitStack() as undo:
            for module, name, other in functions:
                original = getattr(module, name)
                undo.callback(setattr, module, name, original)
                setattr(module, name, functools.partial(other, original))
            yield

    def _settle(self) -> None:
        """Assign the time and the peak since the last change to the open stage."""
        now = _now()
        if self._open:
            spent = self.spent.setdefault(self._open[-1], Spent())
            spent.add(now[0] - self._since[0], now[1] - self._since[1], memory("VmHWM"))
        self._since = now
        _forget_peak()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def memory(what: str = "VmRSS") -> int:
    """As :func:`lobs_native.network.peak.resident`; 0 where the system does not say."""
    with contextlib.suppress(OSError, LobsError):
        return peak.resident(what)
    return 0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        peak.forget_peak()
