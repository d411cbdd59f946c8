"""Writing a file so that its final name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from lobs_native.errors import CheckpointError

__all__ = ["write_file"]


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
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(
            temporary, 0o666 & ~mask
        )  # mkstemp made it private; give it what open() would have
        os.replace(temporary, target)
        temporary = None
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({len(data)} bytes): {error}"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target
