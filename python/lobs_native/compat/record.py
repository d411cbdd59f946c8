"""The record of a patch: the names replaced, and the number, time and deviation of calls."""

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
    failures: int = 0  # calls of our function that raised
    seconds: float = 0.0  # wall-clock time in our function, without verification
    verified: int = 0
    values: float = 0.0  # the largest ``Difference.values``
    mask: int = 0  # the largest ``Difference.mask``
    mask_share: float = 0.0  # the largest ``Difference.mask`` per entry compared
    exceeded: int = 0  # verified calls beyond the host's tolerance
    unverified: list[str] = field(default_factory=list)  # why calls could not be verified

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
    """The record that ``patch`` yields: ``lines``, one for each timed function, and ``places``, the
    names that were replaced. ``str(record)`` shows all of it."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.places: list[str] = []
        self._lock = threading.Lock()

    def line(self, host: str, name: str) -> Line:
        """The line of a function, which is added at the first call."""
        with self._lock:
            for line in self.lines:
                if (line.host, line.name) == (host, name):
                    return line
            self.lines.append(Line(host, name))
            return self.lines[-1]

    def begin(self, line: Line) -> int:
        """Count a call. Returns its number, from 1."""
        with self._lock:
            line.calls += 1
            return line.calls

    def end(self, line: Line, seconds: float, *, failed: bool) -> None:
        """Add the time of a call."""
        with self._lock:
            line.seconds += seconds
            line.failures += failed

    def compared(self, line: Line, difference: Difference, tolerance: Tolerance) -> None:
        """Add the result of a verification, and warn beyond the tolerance."""
        exceeded = tolerance.exceeded_by(difference)
        share = difference.mask / difference.entries if difference.entries else 0.0
        with self._lock:
            line.verified += 1
            line.values = _larger(line.values, difference.values)
            line.mask = max(line.mask, difference.mask)
            line.mask_share = max(line.mask_share, share)
            line.exceeded += exceeded
        if exceeded:
            warnings.warn(
                f"lobs_native: {line.host}: {line.name}, call {line.calls}: differs from the "
                f"host's own code by {difference.values:.2e} of the values (tolerance "
                f"{tolerance.values:.0e}) and {share:.2e} of the mask ({tolerance.mask:.0e})",
                RuntimeWarning,
                stacklevel=4,
            )

    def not_compared(self, line: Line, reason: str) -> None:
        """Note that a call could not be verified, and warn."""
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
        lines += [f"  {line}" for line in called] or ["  none of them was called"]
        return "\n".join(lines)


def _larger(a: float, b: float) -> float:
    """The larger number. A NaN, which max() could lose, counts as the largest."""
    return a if math.isnan(a) or a > b else b
