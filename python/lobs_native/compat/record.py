"""The record of a patch: what was replaced where, how often it ran, how long, how far off."""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass, field

from lobs_native.compat.hosts import Difference, Tolerance

__all__ = ["Line", "Record"]


@dataclass
class Line:
    """The calls of one function or method."""

    host: str
    name: str  # "SparseGPT.fasterprune"
    calls: int = 0
    failures: int = 0  # calls of ours that raised
    seconds: float = 0.0  # wall clock in ours; verification is not in it
    verified: int = 0
    values: float = 0.0  # largest of ``Difference.values``
    mask: int = 0  # largest of ``Difference.mask``
    mask_share: float = 0.0  # the same over the entries compared
    exceeded: int = 0  # verified calls beyond the host's tolerance
    unverified: list[str] = field(default_factory=list)  # why the host's own code gave nothing

    def __str__(self) -> str:
        text = f"{self.host}: {self.name}: {self.calls} calls, {self.seconds:.3f} s"
        if self.failures:
            text += f", {self.failures} raised"
        if self.verified:
            text += (
                f"; {self.verified} verified, largest difference {self.values:.2e} of the values, "
                f"{self.mask} entries of a mask ({self.mask_share:.2e})"
            )
        if self.exceeded:
            text += f"; {self.exceeded} BEYOND TOLERANCE"
        if self.unverified:
            text += f"; {len(self.unverified)} not verified, the last: {self.unverified[-1]}"
        return text


class Record:
    """What ``patch`` gives: ``lines``, one for every function that is timed, and ``places``, the
    names that were replaced. Its text is the whole record."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.places: list[str] = []
        self._lock = threading.Lock()

    def line(self, host: str, name: str) -> Line:
        """The line of a function, made when first asked for."""
        with self._lock:
            for line in self.lines:
                if (line.host, line.name) == (host, name):
                    return line
            self.lines.append(Line(host, name))
            return self.lines[-1]

    def begin(self, line: Line) -> int:
        """Count a call; its number, from 1."""
        with self._lock:
            line.calls += 1
            return line.calls

    def end(self, line: Line, seconds: float, *, failed: bool) -> None:
        """Add a call's time."""
        with self._lock:
            line.seconds += seconds
            line.failures += failed

    def compared(self, line: Line, found: Difference, tolerance: Tolerance) -> None:
        """Add what a verification found; warns beyond the tolerance."""
        exceeded = tolerance.exceeded_by(found)
        share = found.mask / found.entries if found.entries else 0.0
        with self._lock:
            line.verified += 1
            line.values = _larger(line.values, found.values)
            line.mask = max(line.mask, found.mask)
            line.mask_share = max(line.mask_share, share)
            line.exceeded += exceeded
        if exceeded:
            warnings.warn(
                f"lobs_native: {line.host}: {line.name}, call {line.calls}: differs from the "
                f"host's own code by {found.values:.2e} of the values (tolerance "
                f"{tolerance.values:.0e}) and {share:.2e} of the mask ({tolerance.mask:.0e})",
                RuntimeWarning,
                stacklevel=4,
            )

    def not_compared(self, line: Line, reason: str) -> None:
        """Note that a verification could not be made, and warn."""
        with self._lock:
            line.unverified.append(reason)
        warnings.warn(
            f"lobs_native: {line.host}: {line.name}, call {line.calls}: not verified: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )

    def __str__(self) -> str:
        if not self.places:
            return "lobs_native: nothing was replaced: no module of these hosts was imported"
        called = [line for line in self.lines if line.calls]
        lines = [f"lobs_native: replaced {', '.join(self.places)}"]
        lines += [f"  {line}" for line in called] or ["  none of it was called"]
        return "\n".join(lines)


def _larger(a: float, b: float) -> float:
    """The larger one; a NaN, which max() could lose, counts as largest."""
    return a if math.isnan(a) or a > b else b
