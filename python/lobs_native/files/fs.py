"""The calls to the file system that :mod:`files`, :mod:`safefile` and :mod:`rundir` are made of.

Each of them is one call of :func:`call`, which tests replace: to let the k-th one fail, fall short
or be the last of the process, and to write down in which order things reach the disk. Nothing here
knows what the files mean. All raise OSError.

Looking whether a path is there before a start is left to pathlib in :mod:`files`.

Names are relative to ``folder``, the descriptor of an open folder, where one is given. A call that
is interrupted by a signal is repeated by Python itself.
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
_PIECE = 1 << 20  # bytes read together


def call(operation: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Do one call to the file system; ``operation`` is its name for those that stand in."""
    return function(*args, **kwargs)


# ---- files ---------------------------------------------------------------------------------------


def open_file(name: Name, flags: int, *, folder: int | None = None) -> int:
    """A descriptor, closed on exec. A new file gets the mode that the process's umask leaves."""
    return call("open", os.open, name, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)


def close(handle: int) -> None:
    call("close", os.close, handle)


def read(handle: int, most: int) -> bytes:
    """Up to ``most`` bytes; fewer only where the file ends."""
    found = bytearray()
    while len(found) < most:
        piece = call("read", os.read, handle, min(most - len(found), _PIECE))
        if not piece:
            break
        found += piece
    return bytes(found)


def read_into(handle: int, buffer: memoryview) -> int:
    """Fill ``buffer`` (bytes); how many there were, fewer only where the file ends."""
    done = 0
    while done < len(buffer):
        count = call("read_into", os.readv, handle, [buffer[done:]])
        if not count:
            break
        done += count
    return done


def write(handle: int, data: Buffer) -> None:
    """Write all of ``data``, however little the system takes at a time."""
    left = memoryview(data)
    while len(left):
        count = call("write", os.write, handle, left)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        left = left[count:]


def sync(handle: int) -> None:
    """Wait until a file's content is on the disk."""
    call("fsync", os.fsync, handle)


def truncate(handle: int, size: int) -> None:
    call("truncate", os.ftruncate, handle, size)


def stat(handle: int) -> os.stat_result:
    return call("stat", os.fstat, handle)


def lock(handle: int) -> bool:
    """Take the exclusive lock of an open file without waiting; False where another holds it. The
    system gives it back when the last descriptor is closed, by the end of the process at latest."""
    try:
        call("lock", fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- folders -------------------------------------------------------------------------------------


def open_folder(name: Name, *, folder: int | None = None, follow: bool = False) -> int:
    """A descriptor of a folder; a symbolic link to one only with ``follow``."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
    return open_file(name, flags, folder=folder)


def listing(folder: int) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(call("listing", os.listdir, folder))


def exists(name: Name, *, folder: int | None = None) -> bool:
    """Whether the name is there, be it a link to nothing."""
    try:
        call("exists", os.stat, name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def make_folder(name: Name, *, folder: int | None = None, parents: bool = False) -> None:
    """Make a folder; one that is there already is left as it is. With ``parents`` those above it
    too, and ``folder`` does not count."""
    if parents:
        call("make_folder", Path(name).mkdir, parents=True, exist_ok=True)
        return
    try:
        call("make_folder", os.mkdir, name, dir_fd=folder)
    except FileExistsError:
        return


def rename(source: Name, target: Name, *, folder: int | None = None) -> None:
    """Give ``source`` the name ``target``, in place of what has it, in one step."""
    if folder is None:
        call("rename", os.rename, source, target)
    else:
        call("rename", os.rename, source, target, src_dir_fd=folder, dst_dir_fd=folder)


def unlink(name: Name, *, folder: int | None = None) -> None:
    call("unlink", os.unlink, name, dir_fd=folder)


def sync_folder(folder: int) -> None:
    """Wait until the names in a folder are on the disk. Where a file system cannot do that for
    folders, it says so with EINVAL, which is no failure."""
    try:
        call("fsync_folder", os.fsync, folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def free_bytes(where: Name | int) -> int:
    """Bytes that a process without privileges may still write there."""
    found = call("free", os.statvfs, where)
    return found.f_bavail * found.f_frsize


def temporary_folder(prefix: str, parent: Path) -> Path:
    """A new private folder ``<prefix><random>.tmp`` in ``parent``."""
    return Path(call("make_folder", tempfile.mkdtemp, prefix=prefix, suffix=".tmp", dir=parent))


def tree(top: Name) -> list[tuple[str, list[str]]]:
    """``top`` and every folder below it, each with the names of its files."""
    return call("listing", lambda: [(folder, names) for folder, _, names in os.walk(top)])


def change_mode(name: Name, mode: int) -> None:
    call("mode", os.chmod, name, mode)


def umask() -> int:
    """The bits that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_empty(name: Name) -> None:
    call("unlink", os.rmdir, name)


def remove_tree(name: Name) -> None:
    """Remove a folder with all that is in it, as far as that is possible."""
    call("unlink", shutil.rmtree, name, ignore_errors=True)
