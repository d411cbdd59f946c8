"""Opening and reading regular files, and nothing but regular files."""

from __future__ import annotations

import errno
import os
import stat

from lobs_native.errors import CheckpointError
from lobs_native.files import fs

__all__ = ["check_regular", "open_regular", "read_whole"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(
    name: fs.Name, label: str, *, folder: int | None = None, follow: bool = False
) -> int:
    """Open a regular file for reading.

    Anything else is closed as soon as its type is known, without waiting for the other end of a
    pipe. A symbolic link is refused, or followed with ``follow``. Raises CheckpointError, which
    calls the file ``label``.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = fs.open_file(name, flags, folder=folder)
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{label}: is not a file name: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{label}: is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise CheckpointError(f"{label}: is a link; put the file itself there") from error
        raise CheckpointError(f"{label}: cannot be opened: {error.strerror}") from error
    try:
        check_regular(handle, label)
    except OSError as error:
        fs.close(handle)
        raise CheckpointError(f"{label}: cannot be examined: {error.strerror}") from error
    except CheckpointError:
        fs.close(handle)
        raise
    return handle


def check_regular(handle: int, label: str) -> None:
    """Raise CheckpointError unless this is a regular file, or OSError if that cannot be told."""
    mode = fs.stat(handle).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise CheckpointError(f"{label}: is {kind}, not a file; remove it")


def read_whole(
    name: fs.Name, label: str, *, most: int, folder: int | None = None, follow: bool = False
) -> bytes:
    """The contents of a small regular file. Raises CheckpointError; if the file has more than
    ``most`` bytes, before reading any."""
    handle = open_regular(name, label, folder=folder, follow=follow)
    try:
        size = fs.stat(handle).st_size
        if size > most:
            raise CheckpointError(f"{label}: has {size} bytes; the limit is {most}")
        return fs.read(handle, most)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror}") from error
    finally:
        fs.close(handle)
