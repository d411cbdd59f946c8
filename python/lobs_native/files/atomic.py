"""Writing a file or a folder so that its final name never stands for half of it."""

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

SIGN = "report.json"  # a folder that holds it was written by this package and may be replaced
_BEGINNING = 60  # characters of a name in a temporary one, which may have 255 bytes


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to ``path``: temporary file in the same folder, fsync, rename, fsync of the
    folder.

    A kill at any moment leaves the old file, the new one, or none under that name, never a part; it
    may leave a file ``.<name>.<random>.tmp`` beside it. Missing folders are made. Raises
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
    """Write ``pieces``, one after another, as the file ``name`` of an open folder: temporary file,
    fsync, rename, fsync of the folder. ``name`` may be a function of the content's sha256.

    Returns the number of bytes and their sha256. After any exception the temporary file is gone and
    what had the name still has it, unless the last step failed. Raises OSError.
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
        raise CheckpointError(f"{path}: cannot tell what is free there: {error}") from error
    if free < needed:
        raise CheckpointError(
            f"{path}: needs {needed} bytes, and {free} are free there; make room or name another "
            "folder"
        )


def check_new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The resolved ``path``, if :func:`new_folder` may write there. Changes nothing.

    Raises ArgumentError if something is there that must stay: a file, or a folder that is not empty
    and is not an earlier result (it holds no report.json) or not to be overwritten.
    """
    try:
        target = Path(path).resolve()
        if not target.exists():
            return target
        if not target.is_dir():
            raise ArgumentError(f"out: {target} is a file; name a folder that is not there yet")
        if not any(target.iterdir()):
            return target
    except OSError as error:
        raise CheckpointError(f"out: {os.fspath(path)} cannot be looked at: {error}") from error
    if not overwrite:
        raise ArgumentError(
            f"out: {target} is there and not empty; name another folder, or say overwrite"
        )
    if not (target / SIGN).is_file():
        raise ArgumentError(
            f"out: {target} holds no {SIGN}, so it is no earlier result and is not overwritten; "
            "name another folder"
        )
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; when the block ends well, it is ``path``.

    Everything in it is synced to disk, then the folder is renamed. After any exception it is
    removed, with the parents that were made for it. A kill leaves ``.<name>.<random>.tmp`` beside
    ``path``. Raises as :func:`check_new_folder`, and CheckpointError with the path and the cause.
    An earlier result is moved aside before, and removed after, the new one has the name; a kill
    between the two leaves both complete under temporary names.
    """
    target = check_new_folder(path, overwrite=overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
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
                    fs.change_mode(Path(folder) / name, 0o666 & ~mask)  # safetensors: private
                    _sync(Path(folder) / name)
                fs.change_mode(folder, 0o777 & ~mask)
                _sync_folder(Path(folder))
            _rename(temporary, target, overwrite)
    except BaseException:
        if temporary is not None:
            fs.remove_tree(temporary)
        for parent in made:
            with contextlib.suppress(OSError):
                fs.remove_empty(parent)
        raise


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Failures of the file system and of safetensors become CheckpointError with ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written: {error}") from error


def _beside(target: Path) -> Path:
    return fs.temporary_folder(f".{target.name[:_BEGINNING]}.", target.parent)


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    check_new_folder(target, overwrite=overwrite)  # again: time has passed
    old = None
    if target.exists() and any(target.iterdir()):
        old = _beside(target)
        fs.rename(target, old)  # onto the empty one
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
