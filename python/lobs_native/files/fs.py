"""The file-system calls of this package's file formats and run directories.

Each goes through :func:`call`, which tests replace to make the k-th one fail, fall short or be the
last of the process, and to record the order in which things reach the disk. Nothing here knows what
the files mean. All functions raise OSError.

(Checks of paths before a run are the exception: :mod:`lobs_native.files.atomic` uses pathlib.)

Names are relative to ``folder``, the descriptor of an open folder, if it is passed. Python itself
repeats a call that a signal interrupts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = [
    "call",
    "change_mode",
    "close",
    "exists",
    "free_bytes",
    "listing",
    "lock",
    "make_folder",
    "open_file",
    "open_folder",
    "read",
    "read_into",
    "remove_empty",
    "remove_tree",
    "rename",
    "stat",
    "sync",
    "sync_folder",
    "temporary_folder",
    "tree",
    "truncate",
    "umask",
    "unlink",
    "write",
]

P = ParamSpec("P")
T = TypeVar("T")
Name = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview
_PIECE = 1 << 20  # bytes per read


def call(operation: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Make one call to the file system. ``operation`` is its name for a test's replacement."""
    return function(*args, **kwargs)


# ---- files ---------------------------------------------------------------------------------------


def open_file(name: Name, flags: int, *, folder: int | None = None) -> int:
    """Open a file; the descriptor is closed on exec. A new file gets mode 0666 less the umask."""
    return call("open", os.open, name, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)


def close(handle: int) -> None:
    call("close", os.close, handle)


def read(handle: int, most: int) -> bytes:
    """Up to ``most`` bytes; fewer only at the end of the file."""
    data = bytearray()
    while len(data) < most:
        piece = call("read", os.read, handle, min(most - len(data), _PIECE))
        if not piece:
            break
        data += piece
    return bytes(data)


def read_into(handle: int, buffer: memoryview) -> int:
    """Fill ``buffer``. Returns the number of bytes read: fewer only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = call("read_into", os.readv, handle, [buffer[done:]])
        if not count:
            break
        done += count
    return done


def write(handle: int, data: Buffer) -> None:
    """Write all of ``data``, however little the system accepts at a time."""
    left = memoryview(data)
    while len(left):
        count = call("write", os.write, handle, left)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing, without an error")
        left = left[count:]


def sync(handle: int) -> None:
    """Wait until a file's contents are on the disk."""
    call("fsync", os.fsync, handle)


def truncate(handle: int, size: int) -> None:
    call("truncate", os.ftruncate, handle, size)


def stat(handle: int) -> os.stat_result:
    return call("stat", os.fstat, handle)


def lock(handle: int) -> bool:
    """Take the exclusive lock of an open file without waiting; False if another process holds it.
    The system releases it when the last descriptor is closed, at the latest when the process ends.
    """
    try:
        call("lock", fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- folders -------------------------------------------------------------------------------------


def open_folder(name: Name, *, folder: int | None = None, follow: bool = False) -> int:
    """Open a folder. A symbolic link to one is refused unless ``follow``."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
    return open_file(name, flags, folder=folder)


def listing(folder: int) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(call("listing", os.listdir, folder))


def exists(name: Name, *, folder: int | None = None) -> bool:
    """Whether the name exists, even as a dangling link."""
    try:
        call("exists", os.stat, name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def make_folder(name: Name, *, folder: int | None = None, parents: bool = False) -> None:
    """Make a folder, unless it exists. ``parents`` makes those above it too, and ignores
    ``folder``."""
    if parents:
        call("make_folder", Path(name).mkdir, parents=True, exist_ok=True)
        return
    try:
        call("make_folder", os.mkdir, name, dir_fd=folder)
    except FileExistsError:
        return


def rename(source: Name, target: Name, *, folder: int | None = None) -> None:
    """Rename ``source`` to ``target``, replacing it atomically."""
    if folder is None:
        call("rename", os.rename, source, target)
    else:
        call("rename", os.rename, source, target, src_dir_fd=folder, dst_dir_fd=folder)


def unlink(name: Name, *, folder: int | None = None) -> None:
    call("unlink", os.unlink, name, dir_fd=folder)


def sync_folder(folder: int) -> None:
    """Wait until the names in a folder are on the disk. EINVAL is not a failure: the file system
    cannot sync folders."""
    try:
        call("fsync_folder", os.fsync, folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def free_bytes(where: Name | int) -> int:
    """The bytes that an unprivileged process may still write there."""
    info = call("free", os.statvfs, where)
    return info.f_bavail * info.f_frsize


def temporary_folder(prefix: str, parent: Path) -> Path:
    """A new private folder ``<prefix><random>.tmp`` in ``parent``."""
    return Path(call("make_folder", tempfile.mkdtemp, prefix=prefix, suffix=".tmp", dir=parent))


def tree(top: Name) -> list[tuple[str, list[str]]]:
    """``top`` and every folder below it, each with the names of its files."""
    return call("listing", lambda: [(folder, names) for folder, _, names in os.walk(top)])


def change_mode(name: Name, mode: int) -> None:
    call("mode", os.chmod, name, mode)


def umask() -> int:
    """The permission bits that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_empty(name: Name) -> None:
    call("unlink", os.rmdir, name)


def remove_tree(name: Name) -> None:
    """Remove a folder and its contents, as far as possible, without errors."""
    call("unlink", shutil.rmtree, name, ignore_errors=True)
