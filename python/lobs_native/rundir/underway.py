"""Checkpoints of unfinished work between two layers, and the request to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.rundir.directory import RunDirectory

__all__ = ["StoppedError", "UnderWay", "stop"]

stop = threading.Event()  # once it is set, pruning with a run directory ends at the next safe point


class StoppedError(BaseException):
    """Pruning ended on request; no work is lost. Like KeyboardInterrupt, it is not an Exception."""


class UnderWay:
    """The states of unfinished work between two layers, saved when it is worthwhile. Implements
    :class:`lobs_native.calibration.partial.States`.

    A state is saved when saving it is estimated to take at most ``SHARE`` of the time since it was
    last saved, and the disk has room for it besides the layers. A state that cannot be written does
    not end the run.
    """

    SHARE = 0.05

    def __init__(self, run: RunDirectory, *, trusted: bool) -> None:
        self.run = run
        self.trusted = trusted  # whether the existing states belong to the same run
        self.reserved = 0  # bytes on the disk that layers still need
        self.largest: int | None = None  # limit on the bytes of a copy in memory
        self.given_up: str | None = None  # why no more states are saved
        self.seconds = 0.0  # time spent writing, layers included
        self._rate = 100e6  # bytes/s
        self._last: dict[str, float] = {}
        self._begun = time.monotonic()

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and info last saved under ``key``; None if there are none."""
        return self.run.state(key) if self.trusted else None

    def info(self, key: str) -> dict[str, Any] | None:
        """The info last saved under ``key``, without the tensors."""
        return self.run.state_info(key) if self.trusted else None

    def due(self, key: str, size: int) -> bool:
        """Whether to save a state of ``size`` bytes now. Raises StoppedError if the run is to stop
        and saving would take longer than repeating the work."""
        since = time.monotonic() - self._last.get(key, self._begun)
        cost = 0.02 + size / self._rate
        fits = self.largest is None or size <= self.largest
        possible = fits and self.given_up is None
        if stop.is_set() and not (possible and cost < since):
            raise StoppedError
        if not possible or not (stop.is_set() or cost <= self.SHARE * since):
            return False
        return self.run.free_bytes() > self.reserved + 1.1 * size

    def save(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Save a state under ``key``. Then raises StoppedError if the run is to stop."""
        begun = time.monotonic()
        try:
            self.run.put_state(key, tensors, info)
        except (CheckpointError, ArgumentError) as error:  # ArgumentError: info is too large
            self.given_up = str(error)
        self._last[key] = time.monotonic()
        took = self._last[key] - begun
        self.seconds += took
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        if size > 1 << 20:
            self._rate = size / took
        if stop.is_set():
            raise StoppedError

    def drop(self, key: str) -> None:
        """Remove the state under ``key``."""
        self.run.drop_state(key)

    def clear(self) -> None:
        """Remove all states, when the work that they belong to is done."""
        for key in self.run.state_keys():
            self.run.drop_state(key)

    def summary(self) -> dict[str, Any]:
        """The entries for ``report.settings``."""
        entries: dict[str, Any] = {"seconds of keeping": round(self.seconds, 3)}
        if self.given_up is not None:
            entries["not kept"] = f"unfinished work between two layers: {self.given_up}"
        return entries
