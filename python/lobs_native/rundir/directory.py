"""The folder of a run: what a long run has done so far, so that it can go on after any end.

::

    run.json        what the run is: {"format": 1, ..., "check"}; written once
    manifest.jsonl  one line for each committed record, appended
    layers/         00017-<12 hex of sha256(name)>.safetensors; written once
    state/          what the next step needs; replaceable
    LOCK            held by the one process that writes

**A record is committed** when its line in the manifest is on the disk: temporary file, fsync,
rename, fsync of the folder, line, fsync. A kill or a power cut at any moment leaves all records
before it and at most a file that no line names; the same commit made again replaces that. The last
line may be torn: it has no line break, does not count, and is cut off before the next one.

**Nothing is believed before its hash.** Each line carries the check of the one before it, the first
that of run.json, and its own (:func:`safefile.seal`), which also covers the last line; each file
its size and sha256. Records depend on those before them, so a repair drops all from the first
damaged one on.

**States** are replaced many times, and the manifest only grows: a state has a sealed record of its
own, ``state/<key>.json``, which names a file called by its content. Replacing that record is the
one step from the old state to the new, so no kill loses both. It also holds the check of the
manifest's last line at the time, so that a state which follows records that are gone is known to be
stale.

Tensors are safetensors, everything else is JSON; both are read by :mod:`safefile` within bounds.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs, safefile
from lobs_native.files.atomic import put
from lobs_native.files.safefile import Expected, shown
from lobs_native.rundir import manifest
from lobs_native.rundir.folder import (
    DROP,
    HEADER,
    LAYERS,
    MANIFEST,
    REPAIR,
    STATE,
    RunFolder,
    is_temporary,
)
from lobs_native.rundir.journal import Journal
from lobs_native.rundir.lock import LOCK, Lock
from lobs_native.rundir.manifest import Record
from lobs_native.rundir.states import StateStore
from lobs_native.rundir.upkeep import Problem, Upkeep

__all__ = ["Problem", "Record", "RunDirectory"]


class RunDirectory:
    """The folder of one run, open. Made by :meth:`create` or :meth:`open`; a context manager.

    All methods raise CheckpointError, which names the file, what is wrong with it and the way out,
    and ArgumentError for what the caller did wrong. One thread at a time may use it, and only the
    process that opened it may write.

    Attributes
    ----------
    path : Path
    messages : list of str
        What was found and put right while it was opened, one line each: a lock whose holder is
        gone, an unfinished line, files of an interrupted write that were removed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.messages: list[str] = []
        self._folder = RunFolder(self.path)
        self._lock = Lock()
        self._journal = Journal(self._folder)
        self._states = StateStore(self._folder, self._journal)
        self._upkeep = Upkeep(self._folder, self._journal, self._states)
        self._header: dict[str, Any] = {}

    # ---- opening and closing ---------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> RunDirectory:
        """Make the folder of a new run and open it for writing.

        Parameters
        ----------
        path : path
            Must not be there yet, or be empty or what an interrupted creation has left. Folders
            above it are made.
        header : dict
            What the run is (configuration, fingerprints, versions), in plain JSON values of 16 MB
            at most; "format" and "check" are added. Never changed afterwards.

        Raises
        ------
        ArgumentError
            ``path`` holds something else, or ``header`` is not plain JSON.
        CheckpointError
            It could not be written, or another process is writing there.
        """
        data, values, check = manifest.header_bytes(header)
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ArgumentError(
                f"{run._folder.what()}: not a folder; name one that is empty or not there yet"
            )
        folder = run._folder
        try:
            with folder.writing("", None):
                new = [p for p in (run.path, *run.path.parents) if not fs.exists(p)]
                fs.make_folder(run.path, parents=True)
                folder.root = fs.open_folder(run.path, follow=True)
                run._check_that_it_is_free()
                run._lock.take(folder)
                folder.open_parts(make=True)
                run._upkeep.clean()
                # Where there is a run.json, all else is on the disk: it comes last.
                fs.sync_folder(folder.root)
                for above in {run.path, *new}:
                    _sync_parent(above)
                put(folder.root, HEADER, [data])
        except BaseException:
            run.close()
            raise
        run._header, run._journal.checks[0] = values, check
        return run

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, write: bool, repair: bool = False
    ) -> RunDirectory:
        """Open the folder of a run.

        Parameters
        ----------
        path : path
        write : bool
            Take the lock, and remove what an interrupted write has left and states that are stale.
            Otherwise nothing is changed and no lock is needed.
        repair : bool
            Call :meth:`repair`, also where the manifest is damaged, which is an error otherwise.
            What was done is in ``messages``.

        Raises
        ------
        ArgumentError
            ``repair`` without ``write``.
        CheckpointError
            There is no run, another process is writing to it (its number and computer are named),
            run.json or a line of the manifest is damaged, or the format is one of another version.
        """
        if repair and not write:
            raise ArgumentError("repair: changes the run; open it with write=True")
        run = cls(path)
        try:
            folder, journal = run._folder, run._journal
            folder.open_root()
            if write:
                with folder.writing(LOCK, None):
                    run.messages += run._lock.take(folder)
            with folder.reading(""):
                what, most = folder.what(HEADER), safefile.MOST_JSON
                data = safefile.read_whole(HEADER, what, most=most, folder=folder.root)
                run._header, journal.checks[0] = manifest.parse_header(data, what)
            with folder.writing("", None):
                folder.open_parts(make=repair)
            damage = journal.read()
            if journal.torn:
                run.messages.append(f"{MANIFEST}: {journal.unfinished()}")
            if damage and not repair:
                raise CheckpointError(f"{folder.what()}/{damage}{REPAIR}")
            if repair:
                run.messages += run._upkeep.repair(damage)
            elif write:
                with folder.writing("", None):
                    run.messages += run._upkeep.clean()
            if write:
                with folder.writing("", None):
                    journal.settle()
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Give the lock back. May be called twice."""
        self._lock.give_back()
        self._folder.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- records ---------------------------------------------------------------------------------

    @property
    def header(self) -> dict[str, Any]:
        """A copy of what :meth:`create` was given."""
        return copy.deepcopy(self._header)

    @property
    def records(self) -> tuple[Record, ...]:
        """All that is committed, in order."""
        return tuple(self._journal.records)

    def find(self, name: str, *, kind: str = "layer") -> Record | None:
        """The record of this name and kind, if it is committed."""
        return self._journal.known.get((kind, name))

    def commit(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        info: Mapping[str, Any] | None = None,
        *,
        kind: str = "layer",
    ) -> Record:
        """Write tensors to a file of their own and a line about them to the manifest.

        When it returns, the record survives a power cut. After an exception it is not in
        ``records``, and the same commit may be made again.

        Parameters
        ----------
        name : str
            Any text of up to 1000 characters; not yet committed under this ``kind``.
        tensors : {str: Tensor}
            Of any shape on any device, bool, integer or floating. Not copied unless they must be.
        info : dict, optional
            Plain JSON values; with the rest of the line 1 MB at most.
        kind : str
            Lower-case letters, digits, "-" and "_".

        Raises
        ------
        ArgumentError, DtypeError, ShapeError
            An argument is wrong; nothing was written.
        CheckpointError
            It could not be written; the bytes that are needed are named.
        """
        self._check_writer()
        manifest.check_name(name, "name")
        manifest.check_kind(kind)
        if (kind, name) in self._journal.known:
            raise ArgumentError(f"name: {kind} {shown(name)} is committed already; choose another")
        seq = len(self._journal.records)
        file, size = manifest.layer_file(seq, name), safefile.size(tensors)
        draft = Record(seq, kind, name, file, size, "0" * 64, manifest.info_of(info))
        # What could not be read again is refused before anything is written.
        self._journal.check_room(draft)
        with self._folder.writing(file, size):
            _, digest = put(self._folder.layers, Path(file).name, safefile.pieces(tensors))
            record = replace(draft, sha256=digest)
            self._journal.append(record)
        return record

    def load(self, record: Record, expected: Expected | None = None) -> dict[str, Tensor]:
        """The tensors of a record, on the CPU.

        Size and sha256 are checked before anything in the file is interpreted, and with
        ``expected`` ({name: (shape, dtype)}, exactly those) a file that is larger than it could be
        is not read at all. The tensors share one buffer and are the caller's own.

        Raises CheckpointError.
        """
        self._check_open()
        return self._folder.load(record, expected, REPAIR)

    # ---- states ----------------------------------------------------------------------------------

    def put_state(
        self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        """Keep tensors under ``key`` until they are replaced or dropped. Until it returns, the
        state before is kept. Arguments and errors are those of :meth:`commit`."""
        self._check_writer()
        self._states.put(key, tensors, info)

    def state(
        self, key: str, expected: Expected | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and info under ``key``; None if there are none, or if they follow records
        that are gone. ``expected`` is that of :meth:`load`. Raises CheckpointError."""
        self._check_open()
        found = self._states.current(key)
        if found is None:
            return None
        return self._folder.load(found, expected, DROP), found.info

    def state_info(self, key: str) -> dict[str, Any] | None:
        """The info alone of what :meth:`state` gives; its file is not read."""
        self._check_open()
        found = self._states.current(key)
        return None if found is None else found.info

    def state_keys(self) -> list[str]:
        """The keys under which there are states, sorted. Raises CheckpointError."""
        self._check_open()
        return self._states.keys()

    def drop_state(self, key: str) -> None:
        """Remove the state under ``key``, whatever is left of it."""
        self._check_writer()
        self._states.drop(key)

    # ---- looking after it ------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        """Read everything and say what is damaged, missing or left over. Changes nothing.

        While another process writes, its temporary files are among the problems.
        """
        self._check_open()
        return self._upkeep.check()

    def repair(self) -> list[str]:
        """Drop all records from the first damaged one on, states that are damaged or follow them,
        and files that belong to nothing. What was done, one line each."""
        self._check_writer()
        return self._upkeep.repair(None)

    def differences(self, header: Mapping[str, Any]) -> list[str]:
        """How ``header`` differs from the one of the run: a line for each value, with its place and
        both values. Raises ArgumentError if it is not plain JSON."""
        return list(manifest.differences(self._header, safefile.plain(header, "header")))

    def free_bytes(self) -> int:
        """Bytes that may still be written where the run is."""
        self._check_open()
        with self._folder.reading(""):
            return fs.free_bytes(self._folder.root)

    # ---- opening ---------------------------------------------------------------------------------

    def _check_that_it_is_free(self) -> None:
        what = self._folder.what()
        names = [name for name in fs.listing(self._folder.root) if not is_temporary(name)]
        if HEADER in names:
            raise ArgumentError(f"{what}: holds a run already; open it, or name another folder")
        if strange := [name for name in names if name not in {MANIFEST, LAYERS, STATE, LOCK}]:
            raise ArgumentError(
                f"{what}: holds other things ({shown(strange[0])}); name a new folder"
            )
        for name in names:
            if name != LOCK and not self._is_empty(name):
                raise ArgumentError(
                    f"{what}: holds parts of a run ({name}) but no {HEADER}; name another folder"
                )

    def _is_empty(self, name: str) -> bool:
        """Whether a part is as an interrupted creation leaves it."""
        if name == MANIFEST:
            what, root = self._folder.what(name), self._folder.root
            handle = safefile.open_regular(name, what, folder=root)
            try:
                return fs.stat(handle).st_size == 0
            finally:
                fs.close(handle)
        folder = self._folder.part(name)
        try:
            return not fs.listing(folder)
        finally:
            fs.close(folder)

    # ---- writing ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._folder.root < 0:
            raise ArgumentError(f"{self._folder.what()}: is closed; open it again")

    def _check_writer(self) -> None:
        self._check_open()
        what, owner = self._folder.what(), self._lock.owner
        if owner is None:
            raise ArgumentError(f"{what}: was opened to read only; open it with write=True")
        if owner != os.getpid():
            raise ArgumentError(f"{what}: belongs to process {owner}; its children must not write")


def _sync_parent(path: Path) -> None:
    handle = fs.open_folder(path.parent, follow=True)
    try:
        fs.sync_folder(handle)
    finally:
        fs.close(handle)
