"""The lock of a run: one process writes, and others learn which one."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, regular, strict_json
from lobs_native.rundir.folder import RunFolder

__all__ = ["LOCK", "Lock"]

LOCK = "LOCK"
_HOLDER = re.compile(r"[A-Za-z0-9._:+-]{1,253}")


class Lock:
    """Held from :meth:`take` to :meth:`release`, or until the process ends.

    ``owner`` is the process that took it, or None.
    """

    def __init__(self) -> None:
        self.owner: int | None = None
        self._handle = -1

    def take(self, folder: RunFolder) -> list[str]:
        """Take the lock. Returns a message if its last holder ended without releasing it. Raises
        CheckpointError, with the holder's number and host, if it is held."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        self._handle = fs.open_file(LOCK, flags, folder=folder.root)
        regular.check_regular(self._handle, folder.label(LOCK))
        free = fs.lock(self._handle)
        who, elsewhere = _holder(fs.read(self._handle, 4096))
        if not free:
            raise CheckpointError(
                f"{folder.label()}: {who or 'another process'} is writing there; wait until it has "
                "ended, or name another folder"
            )
        self.owner = os.getpid()
        own = {
            "pid": self.owner,
            "host": os.uname().nodename,
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        fs.truncate(self._handle, 0)
        fs.write(self._handle, json.dumps(own).encode())
        if not who:
            return []
        return [
            f"{LOCK}: {who} ended without releasing it; taken over"
            + ("; that is another computer: make sure that it has ended" if elsewhere else "")
        ]

    def release(self) -> None:
        """Release the lock. It may be called twice. In a child of the process that took the lock,
        it does not affect that process."""
        if self.owner is not None and self.owner == os.getpid():
            with contextlib.suppress(OSError):
                fs.truncate(self._handle, 0)
        handle, self._handle, self.owner = self._handle, -1, None
        if handle >= 0:
            with contextlib.suppress(OSError):
                fs.close(handle)


def _holder(data: bytes) -> tuple[str, bool]:
    """The process that wrote ``data`` into the lock file ("" if none), and whether it was on
    another computer."""
    if not data:
        return "", False
    unknown = "an unknown process", False
    try:
        values = strict_json.parse_json(data, LOCK)
    except CheckpointError:
        return unknown
    if not isinstance(values, dict):
        return unknown
    process, host, since = (str(values.get(key)) for key in ("pid", "host", "since"))
    if not all(_HOLDER.fullmatch(text) for text in (process, host, since)):
        return unknown
    return f"process {process} on {host} (since {since})", host != os.uname().nodename
