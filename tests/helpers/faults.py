"""Replacements for ``lobs_native.files.fs.call``: the k-th call fails, is short, or is counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lobs_native.errors import CheckpointError
from lobs_native.files import fs


class Counter:
    """Makes and counts all calls. Call number ``at`` (from 1) is replaced by ``fault``; without a
    fault, it is a short write.

    A close is made before its fault: the kernel frees the descriptor even if it reports an error.
    """

    def __init__(self, at: int = 0, fault: Callable[[], Any] | None = None) -> None:
        self.at, self.fault = at, fault
        self.calls: list[str] = []

    @property
    def fired(self) -> bool:
        return 0 < self.at <= len(self.calls)

    def __call__(self, operation: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        self.calls.append(operation)
        if len(self.calls) != self.at:
            return function(*args, **kw)
        if self.fault is None:
            return self.short(operation, function, *args, **kw)
        if operation == "close":
            function(*args, **kw)
        return self.fault()

    @staticmethod
    def short(operation: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Write half of the bytes, rounded up; make any other call unchanged."""
        if operation == "write":
            handle, data = args
            return function(handle, data[: (len(data) + 1) // 2])
        return function(*args, **kw)


def failing(code: int) -> Callable[[], Any]:
    """A fault that raises OSError with an errno."""

    def fault() -> Any:
        raise OSError(code, os.strerror(code))

    return fault


@contextlib.contextmanager
def installed(counter: Callable[..., Any]) -> Iterator[None]:
    """Replace ``fs.call`` inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "call", counter)
        yield


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the CheckpointError that an action raises; None if it succeeds."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None
