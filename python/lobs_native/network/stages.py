"""How long the stages of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Stages"]


class Stages:
    """A clock that begins now and knows what its time was spent on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the end of the context for a stage. Stages are not nested."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def total(self) -> tuple[float, dict[str, float]]:
        """The seconds since the beginning, and those of every stage, whose sum they are: what is
        left is "other"."""
        whole = time.perf_counter() - self._begun
        return whole, {**self._seconds, "other": whole - sum(self._seconds.values())}
