"""Stand-ins for ``lobs_native.fs.call``: the k-th call fails, falls short, or is only counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lobs_native.errors import CheckpointError
from lobs_native.files import fs


class Counter:
    """Does every call, counts them, and at number ``at`` (from 1) does ``fault`` instead; without
    one, a write there falls short.

    A close is done all the same before its fault: the kernel frees a descriptor whatever it
    answers.
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
        """A write of half of what was given, rounded up; any other call is done."""
        if operation == "write":
            handle, data = args
            return function(handle, data[: (len(data) + 1) // 2])
        return function(*args, **kw)


def failing(code: int) -> Callable[[], Any]:
    """A fault that raises OSError with this errno."""

    def fault() -> Any:
        raise OSError(code, os.strerror(code))

    return fault


@contextlib.contextmanager
def installed(counter: Callable[..., Any]) -> Iterator[None]:
    """Put a stand-in in the place of ``fs.call`` for the length of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "call", counter)
        yield


def refusal(action: Callable[[], Any]) -> str | None:
    """What the CheckpointError of an action says; None where it ends well."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None
