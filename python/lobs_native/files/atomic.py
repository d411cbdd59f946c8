"""Atomic writes of files and folders: a name never refers to a part of the new contents."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs

__all__ = ["check_new_folder", "need_space", "new_folder", "put", "write_file", "writing"]

SIGN = "report.json"  # marks a folder that this package wrote, and that may be replaced
_BEGINNING = 60  # characters of the name in a temporary name, which may have 255 bytes


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to ``path`` atomically: temporary file in the same folder, fsync, rename,
    fsync of the folder.

    A kill at any moment leaves the old file, the new one, or neither, but never a part of one; a
    file ``.<name>.<random>.tmp`` may remain beside it. Missing folders are made. Raises
    CheckpointError with the path and the cause.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        fs.make_folder(target.parent, parents=True)
        folder = fs.open_folder(target.parent, follow=True)
        try:
            put(folder, target.name, [data])
        finally:
            fs.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({len(data)} bytes): {error}"
        ) from error
    return target


def put(
    folder: int, name: str | Callable[[str], str], pieces: Iterable[fs.Buffer]
) -> tuple[int, str]:
    """Write ``pieces`` in order to the file ``name`` of an open folder, atomically: temporary file,
    fsync, rename, fsync of the folder. ``name`` may be a function of the content's sha256.

    Returns the number of bytes and their sha256. After any exception the temporary file is removed,
    and an earlier file of that name is still there, unless the last step failed. Raises OSError.
    """
    beginning = name[:_BEGINNING] if isinstance(name, str) else "content"
    temporary = f".{beginning}.{secrets.token_hex(4)}.tmp"
    size, digest = 0, hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = fs.open_file(temporary, flags, folder=folder)
    try:
        try:
            for piece in pieces:
                fs.write(handle, piece)
                digest.update(piece)
                size += len(piece)
            fs.sync(handle)
        finally:
            fs.close(handle)
        final = name if isinstance(name, str) else name(digest.hexdigest())
        fs.rename(temporary, final, folder=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(temporary, folder=folder)
        raise
    fs.sync_folder(folder)
    return size, digest.hexdigest()


def need_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raise CheckpointError unless ``needed`` bytes are free where ``path`` is or will be."""
    where = Path(path).absolute()
    while not where.exists() and where != where.parent:
        where = where.parent
    try:
        free = fs.free_bytes(where)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot determine the free space there: {error}") from error
    if free < needed:
        raise CheckpointError(
            f"{path}: needs {needed} bytes, but {free} are free there; free some space or name "
            "another folder"
        )


def check_new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The resolved ``path``, if :func:`new_folder` may write there. Changes nothing.

    Raises ArgumentError if something is there that must not be replaced: a file, or a folder that
    is not empty, unless it is an earlier result (it has a report.json) and ``overwrite`` is True.
    """
    try:
        target = Path(path).resolve()
        if not target.exists():
            return target
        if not target.is_dir():
            raise ArgumentError(f"out: {target} is a file; name a new folder")
        if not any(target.iterdir()):
            return target
    except OSError as error:
        raise CheckpointError(f"out: {os.fspath(path)} cannot be examined: {error}") from error
    if not overwrite:
        raise ArgumentError(
            f"out: {target} exists and is not empty; name another folder, or pass overwrite"
        )
    if not (target / SIGN).is_file():
        raise ArgumentError(
            f"out: {target} has no {SIGN}, so it is not an earlier result and is not overwritten; "
            "name another folder"
        )
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which becomes ``path`` when the block succeeds.

    Its contents are synced to disk, then it is renamed. After any exception it is removed, with the
    parents that were made for it. A kill leaves ``.<name>.<random>.tmp`` beside ``path``. An
    earlier result is moved aside before the rename and removed after it; a kill in between leaves
    both complete, under temporary names.

    Raises as :func:`check_new_folder` does, and CheckpointError with the path and the cause.
    """
    target = check_new_folder(path, overwrite=overwrite)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        with writing(target):
            fs.make_folder(target.parent, parents=True)
            temporary = _beside(target)
        yield temporary
        with writing(target):
            mask = fs.umask()
            for folder, names in fs.tree(temporary):
                for name in names:
                    # The safetensors library writes private files.
                    fs.change_mode(Path(folder) / name, 0o666 & ~mask)
                    _sync(Path(folder) / name)
                fs.change_mode(folder, 0o777 & ~mask)
                _sync_folder(Path(folder))
            _rename(temporary, target, overwrite)
    except BaseException:
        if temporary is not None:
            fs.remove_tree(temporary)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                fs.remove_empty(parent)
        raise


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of the file system and of safetensors into a CheckpointError about ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written: {error}") from error


def _beside(target: Path) -> Path:
    return fs.temporary_folder(f".{target.name[:_BEGINNING]}.", target.parent)


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    check_new_folder(target, overwrite=overwrite)  # again, since it may have changed
    old = None
    if target.exists() and any(target.iterdir()):
        old = _beside(target)
        fs.rename(target, old)  # replaces the empty folder
    try:
        fs.rename(temporary, target)
    except OSError:
        if old is not None:
            fs.rename(old, target)
        raise
    _sync_folder(target.parent)
    if old is not None:
        fs.remove_tree(old)


def _sync(path: Path) -> None:
    handle = fs.open_file(path, os.O_RDONLY)
    try:
        fs.sync(handle)
    finally:
        fs.close(handle)


def _sync_folder(path: Path) -> None:
    handle = fs.open_folder(path, follow=True)
    try:
        fs.sync_folder(handle)
    finally:
        fs.close(handle)
