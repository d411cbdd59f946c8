"""The folder of a run and its two subfolders, open: reading what is in them, and errors that name
their files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, safefile
from lobs_native.files.atomic import put
from lobs_native.files.safefile import Expected
from lobs_native.rundir.manifest import Record, State

__all__ = [
    "DROP",
    "HEADER",
    "LAYERS",
    "MANIFEST",
    "REPAIR",
    "STATE",
    "RunFolder",
    "is_temporary",
    "printable",
]

HEADER, MANIFEST, LAYERS, STATE = "run.json", "manifest.jsonl", "layers", "state"
REPAIR = "; repair the run"
DROP = "; repair the run, or drop the state"
_TEMPORARY = re.compile(r"(.*/)?\.[^/]*\.[0-9a-f]{8}\.tmp")  # see files.put
_PIECE = 1 << 20
_WRONG_CONTENT = "has another sha256 than its record says"


class RunFolder:
    """Open handles on a run's folder, ``layers/`` and ``state/``; -1 where not open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = self.layers = self.states = -1

    def open_root(self) -> None:
        """Open the folder of a run that exists."""
        with self.reading(""):
            try:
                self.root = fs.open_folder(self.path, follow=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise CheckpointError(f"{self.what()}: is no folder; create a run there") from error
            if not fs.exists(HEADER, folder=self.root):
                raise CheckpointError(
                    f"{self.what(HEADER)}: is missing, so no run was begun there; create one"
                )

    def open_parts(self, *, make: bool) -> None:
        """Open layers/ and state/, and see that there is a manifest; ``make`` what is missing."""
        if make:
            for name in (LAYERS, STATE):
                fs.make_folder(name, folder=self.root)
        self.layers, self.states = self.part(LAYERS), self.part(STATE)
        if not fs.exists(MANIFEST, folder=self.root):
            if not make:
                raise CheckpointError(f"{self.what(MANIFEST)}: is missing{REPAIR}")
            put(self.root, MANIFEST, [b""])

    def part(self, name: str) -> int:
        """Open a folder in it."""
        try:
            return fs.open_folder(name, folder=self.root)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.what(name)}: is missing{REPAIR}") from error
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{self.what(name)}: is a link or no folder; put the folder itself there"
            ) from error

    def close(self) -> None:
        """Close all handles."""
        handles = (self.states, self.layers, self.root)
        self.root = self.layers = self.states = -1
        for handle in handles:
            if handle >= 0:
                with contextlib.suppress(OSError):
                    fs.close(handle)

    def holder(self, file: str) -> tuple[int, str]:
        """The open folder of a file, and its name there."""
        part, _, name = file.rpartition("/")
        return {"": self.root, LAYERS: self.layers, STATE: self.states}[part], name

    # ---- files with tensors ----------------------------------------------------------------------

    def load(
        self, item: Record | State, expected: Expected | None, way_out: str
    ) -> dict[str, Tensor]:
        """The tensors of a file, after its size and hash have been found right."""
        what = self.what(item.file)
        try:
            raw = self._read_verified(item, expected, what)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{way_out}") from error
        return safefile.tensors_of(raw, what, expected)

    def _read_verified(self, item: Record | State, expected: Expected | None, what: str) -> Tensor:
        """(bytes,) uint8: the content of a file, which is what was written."""
        if expected is not None and item.size > (most := safefile.largest(expected)):
            raise CheckpointError(
                f"{what}: has {item.size} bytes, but what is expected makes {most} at most"
            )
        folder, name = self.holder(item.file)
        with self.reading(item.file):
            handle = safefile.open_regular(name, what, folder=folder)
            try:
                size = fs.stat(handle).st_size
                if size != item.size:
                    raise CheckpointError(f"{what}: {_wrong_size(size, item.size)}")
                raw = _buffer(size, what)
                if fs.read_into(handle, raw.numpy().data) < size:
                    raise CheckpointError(f"{what}: was cut while it was read")
            finally:
                fs.close(handle)
        if hashlib.sha256(raw.numpy().data).hexdigest() != item.sha256:
            raise CheckpointError(f"{what}: {_WRONG_CONTENT}")
        return raw

    def damage(self, item: Record | State) -> str | None:
        """What is wrong with a file, read piece by piece."""
        folder, name = self.holder(item.file)
        try:
            handle = safefile.open_regular(name, item.file, folder=folder)
        except CheckpointError as error:
            return str(error).removeprefix(f"{item.file}: ")
        try:
            size = fs.stat(handle).st_size
            if size != item.size:
                return _wrong_size(size, item.size)
            digest = hashlib.sha256()
            while piece := fs.read(handle, _PIECE):
                digest.update(piece)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        finally:
            fs.close(handle)
        return None if digest.hexdigest() == item.sha256 else _WRONG_CONTENT

    # ---- messages --------------------------------------------------------------------------------

    def what(self, file: str = "") -> str:
        """The whole path of a file of the run, for messages."""
        return printable(str(self.path / file))

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """OSError becomes a CheckpointError that names the file."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.what(file)}: cannot be read: {error.strerror or error}"
            ) from error

    @contextlib.contextmanager
    def writing(self, file: str, needed: int | None) -> Iterator[None]:
        """OSError becomes a CheckpointError that names the file; ``needed``: its bytes, where they
        are known."""
        try:
            yield
        except OSError as error:
            size = "" if needed is None else f" ({needed} bytes)"
            text = f"{self.what(file)}: could not be written{size}: {error.strerror or error}"
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                text += "; make room"
                with contextlib.suppress(OSError):
                    text += f" ({fs.free_bytes(self.root)} bytes are free)"
            raise CheckpointError(
                f"{text}; what is committed is safe, and the run can go on from there"
            ) from error


def printable(text: str) -> str:
    """``text``, or its ``ascii`` where it would not stay on its line."""
    return text if text.isprintable() else ascii(text)


def is_temporary(file: str) -> bool:
    """Whether a write that was interrupted has left it."""
    return _TEMPORARY.fullmatch(file) is not None


def _wrong_size(size: int, right: int) -> str:
    return f"has {size} bytes, its record says {right}"


def _buffer(size: int, what: str) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"{what}: needs {size} bytes of memory; they are not there"
        ) from error
