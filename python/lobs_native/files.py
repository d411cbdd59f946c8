"""Writing a file or a folder so that its final name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lobs_native.errors import ArgumentError, CheckpointError

__all__ = ["check_new_folder", "new_folder", "write_file", "writing"]

SIGN = "report.json"  # a folder that holds it was written by this package and may be replaced


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to ``path``: temporary file in the same folder, fsync, rename, fsync of the
    folder.

    A kill at any moment leaves the old file, the new one, or none under that name, never a part; it
    may leave a file ``.<name>.<random>.tmp`` beside it. Missing folders are made. Raises
    CheckpointError with the path and the cause.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private; as open() would have it
        os.replace(temporary, target)
        temporary = None
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({len(data)} bytes): {error}"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target


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
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _beside(target)
        yield temporary
        with writing(target):
            for folder, _, names in os.walk(temporary):
                for name in names:
                    os.chmod(Path(folder) / name, 0o666 & ~_umask())  # safetensors makes it private
                    _sync(Path(folder) / name)
                os.chmod(folder, 0o777 & ~_umask())
                _sync(Path(folder))
            _rename(temporary, target, overwrite)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Failures of the file system and of safetensors become CheckpointError with ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written: {error}") from error


def _beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    check_new_folder(target, overwrite=overwrite)  # again: time has passed
    old = None
    if target.exists() and any(target.iterdir()):
        old = _beside(target)
        os.rename(target, old)  # onto the empty one
    try:
        os.rename(temporary, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
