"""The context in which one layer is pruned: backend, memory limit and notes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from lobs_native.solvers.rows import WHOLE, Rows

__all__ = ["Workspace"]


@dataclass
class Workspace:
    """Where a layer's kernels run and within what limits, and what is noted meanwhile."""

    backend: str
    memory: int | None = None  # bytes of kernel scratch at most
    notes: list[str] = field(default_factory=list)  # what was done differently from the request
    widened: set[int] = field(default_factory=set)  # rows (of G * R) that were redone in float64
    rows: Rows = WHOLE  # of a layer of one group, where processes share them

    def note(self, text: str) -> None:
        """Record something that was done differently from the request."""
        self.notes.append(text)

    @contextlib.contextmanager
    def passing_notes(self) -> Iterator[None]:
        """Drop the notes that are taken inside when it is left."""
        before = len(self.notes)
        try:
            yield
        finally:
            del self.notes[before:]

    def summary(self) -> list[str]:
        """All notes, the rows that were redone included."""
        if not self.widened:
            return list(self.notes)
        return [
            *self.notes,
            f"{len(self.widened)} rows were redone in float64: float32 was too narrow",
        ]
