"""Open descriptors of a run's folder and its two subfolders: verified reads, and errors that name
the files."""

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
from lobs_native.files import fs, regular, safefile
from lobs_native.files.atomic import put
from lobs_native.files.safefile import Expected
from lobs_native.rundir.manifest import ManifestRecord, State

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
_TEMPORARY = re.compile(r"(.*/)?\.[^/]*\.[0-9a-f]{8}\.tmp")  # see lobs_native.files.atomic.put
_PIECE = 1 << 20  # bytes
_WRONG_CONTENT = "does not have the sha256 in its record"


class RunFolder:
    """Descriptors of a run's folder, ``layers/`` and ``state/``; -1 if not open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = self.layers = self.states = -1

    def open_root(self) -> None:
        """Open the folder of an existing run."""
        with self.reading(""):
            try:
                self.root = fs.open_folder(self.path, follow=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise CheckpointError(
                    f"{self.label()}: is not a folder; create a run there"
                ) from error
            if not fs.exists(HEADER, folder=self.root):
                raise CheckpointError(
                    f"{self.label(HEADER)}: is missing, so there is no run; create one"
                )

    def open_parts(self, *, make: bool) -> None:
        """Open layers/ and state/, and check that there is a manifest. ``make`` creates what is
        missing."""
        if make:
            for name in (LAYERS, STATE):
                fs.make_folder(name, folder=self.root)
        self.layers, self.states = self.part(LAYERS), self.part(STATE)
        if not fs.exists(MANIFEST, folder=self.root):
            if not make:
                raise CheckpointError(f"{self.label(MANIFEST)}: is missing{REPAIR}")
            put(self.root, MANIFEST, [b""])

    def part(self, name: str) -> int:
        """Open a subfolder."""
        try:
            return fs.open_folder(name, folder=self.root)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.label(name)}: is missing{REPAIR}") from error
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{self.label(name)}: is a link or not a folder; put the folder itself there"
            ) from error

    def close(self) -> None:
        """Close all descriptors."""
        handles = (self.states, self.layers, self.root)
        self.root = self.layers = self.states = -1
        for handle in handles:
            if handle >= 0:
                with contextlib.suppress(OSError):
                    fs.close(handle)

    def location(self, file: str) -> tuple[int, str]:
        """The descriptor of a file's folder, and the file's name in it."""
        part, _, name = file.rpartition("/")
        return {"": self.root, LAYERS: self.layers, STATE: self.states}[part], name

    # ---- files with tensors ----------------------------------------------------------------------

    def load(
        self, item: ManifestRecord | State, expected: Expected | None, way_out: str
    ) -> dict[str, Tensor]:
        """The tensors of a file, once its size and hash are verified."""
        label = self.label(item.file)
        try:
            raw = self._read_verified(item, expected, label)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{way_out}") from error
        return safefile.tensors_of(raw, label, expected)

    def _read_verified(
        self, item: ManifestRecord | State, expected: Expected | None, label: str
    ) -> Tensor:
        """(bytes,) uint8: the verified contents of a file."""
        if expected is not None and item.size > (most := safefile.largest(expected)):
            raise CheckpointError(
                f"{label}: has {item.size} bytes, but the tensors expected take at most {most}"
            )
        folder, name = self.location(item.file)
        with self.reading(item.file):
            handle = regular.open_regular(name, label, folder=folder)
            try:
                size = fs.stat(handle).st_size
                if size != item.size:
                    raise CheckpointError(f"{label}: {_wrong_size(size, item.size)}")
                raw = _buffer(size, label)
                if fs.read_into(handle, raw.numpy().data) < size:
                    raise CheckpointError(f"{label}: was truncated while it was read")
            finally:
                fs.close(handle)
        if hashlib.sha256(raw.numpy().data).hexdigest() != item.sha256:
            raise CheckpointError(f"{label}: {_WRONG_CONTENT}")
        return raw

    def damage(self, item: ManifestRecord | State) -> str | None:
        """What is wrong with a file, which is read piece by piece; None if nothing."""
        folder, name = self.location(item.file)
        try:
            handle = regular.open_regular(name, item.file, folder=folder)
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

    def label(self, file: str = "") -> str:
        """The full path of a file of the run, for messages."""
        return printable(str(self.path / file))

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Turn OSError into a CheckpointError that names the file."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.label(file)}: cannot be read: {error.strerror or error}"
            ) from error

    @contextlib.contextmanager
    def writing(self, file: str, needed: int | None) -> Iterator[None]:
        """Turn OSError into a CheckpointError that names the file and, if known, the bytes
        ``needed``."""
        try:
            yield
        except OSError as error:
            size = "" if needed is None else f" ({needed} bytes)"
            text = f"{self.label(file)}: could not be written{size}: {error.strerror or error}"
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                text += "; free some space"
                with contextlib.suppress(OSError):
                    text += f" ({fs.free_bytes(self.root)} bytes are free)"
            raise CheckpointError(
                f"{text}; what is committed is safe, and the run can resume from there"
            ) from error


def printable(text: str) -> str:
    """``text``, or its ``ascii`` if it has unprintable characters."""
    return text if text.isprintable() else ascii(text)


def is_temporary(file: str) -> bool:
    """Whether a file is left over from an interrupted write."""
    return _TEMPORARY.fullmatch(file) is not None


def _wrong_size(size: int, expected: int) -> str:
    return f"has {size} bytes, but its record has {expected}"


def _buffer(size: int, label: str) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"{label}: needs {size} bytes of memory, which are not available"
        ) from error
