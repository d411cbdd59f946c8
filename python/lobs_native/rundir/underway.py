"""What a run directory keeps of work between two layers, and how a run is asked to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.rundir.directory import RunDirectory

__all__ = ["StoppedError", "UnderWay", "stop"]

stop = threading.Event()  # set it, and pruning with a run directory ends at the next safe place


class StoppedError(BaseException):
    """Pruning was asked to end, and nothing is lost. No Exception, like KeyboardInterrupt."""


class UnderWay:
    """Work between two layers, kept as states of a run directory where that is worth it: see
    :class:`lobs_native.partial.States`.

    A state is saved when saving it, judged by the last ones, takes at most ``SHARE`` of the time
    since it was saved last, and the disk has room for it besides the layers. One that cannot be
    written is no reason to end a run.
    """

    SHARE = 0.05

    def __init__(self, run: RunDirectory, *, trusted: bool) -> None:
        self.run = run
        self.trusted = trusted  # whether what is there belongs to this very run
        self.reserved = 0  # bytes that layers will take
        self.largest: int | None = None  # bytes that a copy may take in memory
        self.given_up: str | None = None  # why nothing is saved any more
        self.seconds = 0.0  # spent on writing, layers included
        self._rate = 100e6  # bytes/s
        self._last: dict[str, float] = {}
        self._begun = time.monotonic()

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved under ``key`` last."""
        return self.run.state(key) if self.trusted else None

    def info(self, key: str) -> dict[str, Any] | None:
        """Of what :meth:`load` gives."""
        return self.run.state_info(key) if self.trusted else None

    def due(self, key: str, size: int) -> bool:
        """Whether to save so many bytes now. Raises StoppedError if the run is to end, and saving
        would take longer than what it spares."""
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
        """Keep this under ``key``. Raises StoppedError afterwards if the run is to end."""
        begun = time.monotonic()
        try:
            self.run.put_state(key, tensors, info)
        except (CheckpointError, ArgumentError) as error:  # too large a description, as well
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
        """Forget what is there."""
        self.run.drop_state(key)

    def clear(self) -> None:
        """Forget everything: the run is done."""
        for key in self.run.state_keys():
            self.run.drop_state(key)

    def said(self) -> dict[str, Any]:
        """For the report."""
        told: dict[str, Any] = {"seconds of keeping": round(self.seconds, 3)}
        if self.given_up is not None:
            told["not kept"] = f"what is under way between two layers: {self.given_up}"
        return told
