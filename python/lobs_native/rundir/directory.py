"""The run directory: the results of a long run so far, from which it can resume after any end.

::

    run.json        a description of the run: {"format": 1, ..., "check"}; written once
    manifest.jsonl  one line for each committed record; appended to
    layers/         00017-<12 hex of sha256(name)>.safetensors; written once
    state/          what the next step needs; replaceable
    LOCK            held by the one process that writes

**A record is committed** when its line in the manifest is on the disk: temporary file, fsync,
rename, fsync of the folder, line, fsync. A kill or power cut at any moment keeps all earlier
records, and leaves at most one file that no line refers to; repeating the commit replaces it. The
last line may be torn: without a line break, it does not count and is cut off before the next one.

**Nothing is trusted before its hash is verified.** Each line contains the check of the line before
it (the first line that of run.json) and its own (:func:`lobs_native.files.strict_json.seal`). The
line also has the size and sha256 of its file. Records depend on earlier ones, so a repair drops
all from the first damaged one on.

**States** are replaced many times, but the manifest only grows. So each state has a sealed record
of its own, ``state/<key>.json``, which refers to a file named by its content. Replacing that record
is the single step from the old state to the new, so no kill loses both. The record also contains
the check of the manifest's last line at that time, which tells that a state is stale if the records
before it are gone.

Tensors are stored as safetensors, everything else as JSON; :mod:`lobs_native.files` reads both in
bounded time and memory.
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
from lobs_native.files import fs, regular, safefile, strict_json
from lobs_native.files.atomic import put
from lobs_native.files.safefile import Expected
from lobs_native.files.strict_json import shown
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
from lobs_native.rundir.manifest import ManifestRecord
from lobs_native.rundir.states import StateStore
from lobs_native.rundir.upkeep import Damage, Upkeep

__all__ = ["Damage", "ManifestRecord", "RunDirectory"]


class RunDirectory:
    """An open run directory. Use :meth:`create` or :meth:`open`; it is a context manager.

    All methods raise CheckpointError, whose message names the file, the damage and the way out, and
    ArgumentError for a mistake of the caller. One thread at a time may use it, and only the process
    that opened it may write.

    Attributes
    ----------
    path : Path
    messages : list of str
        What was corrected on opening, one line each: a lock whose holder is gone, an unfinished
        line, files of an interrupted write that were removed.
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
        """Create the directory of a new run and open it for writing.

        Parameters
        ----------
        path : path
            A folder that does not exist, is empty, or is left over from an interrupted creation.
            Missing parents are made.
        header : dict
            A description of the run (configuration, fingerprints, versions): plain JSON values of
            at most 16 MB. "format" and "check" are added. It is never changed afterwards.

        Raises
        ------
        ArgumentError
            ``path`` contains something else, or ``header`` is not plain JSON.
        CheckpointError
            It could not be written, or another process is writing there.
        """
        data, values, check = manifest.header_bytes(header)
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ArgumentError(
                f"{run._folder.label()}: not a folder; name a new or an empty folder"
            )
        folder = run._folder
        try:
            with folder.writing("", None):
                new = [p for p in (run.path, *run.path.parents) if not fs.exists(p)]
                fs.make_folder(run.path, parents=True)
                folder.root = fs.open_folder(run.path, follow=True)
                run._check_unused()
                run._lock.take(folder)
                folder.open_parts(make=True)
                run._upkeep.clean()
                # run.json comes last: where it exists, everything else is on the disk.
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
        """Open the directory of a run.

        Parameters
        ----------
        path : path
        write : bool
            Take the lock, and remove stale states and the remains of an interrupted write. If
            False, nothing is changed and no lock is needed.
        repair : bool
            Call :meth:`repair`, even if the manifest is damaged, which is otherwise an error. Its
            actions are in ``messages``.

        Raises
        ------
        ArgumentError
            ``repair`` without ``write``.
        CheckpointError
            There is no run, another process is writing to it, run.json or a line of the manifest is
            damaged, or the format is from another version.
        """
        if repair and not write:
            raise ArgumentError("repair: it changes the run; open it with write=True")
        run = cls(path)
        try:
            folder, journal = run._folder, run._journal
            folder.open_root()
            if write:
                with folder.writing(LOCK, None):
                    run.messages += run._lock.take(folder)
            with folder.reading(""):
                label, most = folder.label(HEADER), strict_json.MOST_JSON
                data = regular.read_whole(HEADER, label, most=most, folder=folder.root)
                run._header, journal.checks[0] = manifest.parse_header(data, label)
            with folder.writing("", None):
                folder.open_parts(make=repair)
            damage = journal.read()
            if journal.torn:
                run.messages.append(f"{MANIFEST}: {journal.unfinished()}")
            if damage and not repair:
                raise CheckpointError(f"{folder.label()}/{damage}{REPAIR}")
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
        """Release the lock. It may be called twice."""
        self._lock.release()
        self._folder.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- records ---------------------------------------------------------------------------------

    @property
    def header(self) -> dict[str, Any]:
        """A copy of the header passed to :meth:`create`."""
        return copy.deepcopy(self._header)

    @property
    def records(self) -> tuple[ManifestRecord, ...]:
        """All committed records, in order."""
        return tuple(self._journal.records)

    def find(self, name: str, *, kind: str = "layer") -> ManifestRecord | None:
        """The committed record of this name and kind; None if there is none."""
        return self._journal.known.get((kind, name))

    def commit(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        info: Mapping[str, Any] | None = None,
        *,
        kind: str = "layer",
    ) -> ManifestRecord:
        """Write tensors to a file of their own, and a line about them to the manifest.

        Once it has returned, the record survives a power cut. After an exception it is not in
        ``records``, and the commit may be repeated.

        Parameters
        ----------
        name : str
            Any text of up to 1000 characters, not yet committed under this ``kind``.
        tensors : {str: Tensor}
            Bool, integer or floating-point, any shape, any device. Copied only if necessary.
        info : dict, optional
            Plain JSON values. The whole line may have at most 1 MB.
        kind : str
            Lower-case letters, digits, "-" and "_".

        Raises
        ------
        ArgumentError, DtypeError, ShapeError
            An argument is wrong; nothing was written.
        CheckpointError
            It could not be written; the message has the number of bytes needed.
        """
        self._check_writer()
        manifest.check_name(name, "name")
        manifest.check_kind(kind)
        if (kind, name) in self._journal.known:
            raise ArgumentError(f"name: {kind} {shown(name)} is already committed; choose another")
        seq = len(self._journal.records)
        file, size = manifest.layer_file(seq, name), safefile.size(tensors)
        draft = ManifestRecord(seq, kind, name, file, size, "0" * 64, manifest.info_of(info))
        # A record that could not be read back is refused before anything is written.
        self._journal.check_room(draft)
        with self._folder.writing(file, size):
            _, digest = put(self._folder.layers, Path(file).name, safefile.pieces(tensors))
            record = replace(draft, sha256=digest)
            self._journal.append(record)
        return record

    def load(self, record: ManifestRecord, expected: Expected | None = None) -> dict[str, Tensor]:
        """The tensors of a record, on the CPU.

        The file's size and sha256 are verified before anything in it is interpreted. With
        ``expected`` ({name: (shape, dtype)}, for exactly the tensors in it), a file that is too
        large is not read at all. The tensors share one buffer, which belongs to the caller.

        Raises CheckpointError.
        """
        self._check_open()
        return self._folder.load(record, expected, REPAIR)

    # ---- states ----------------------------------------------------------------------------------

    def put_state(
        self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        """Store tensors under ``key`` until they are replaced or dropped. The earlier state remains
        until this returns. Arguments and errors are those of :meth:`commit`."""
        self._check_writer()
        self._states.put(key, tensors, info)

    def state(
        self, key: str, expected: Expected | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and info under ``key``; None if there are none, or if records that the state
        follows are gone. ``expected`` is as in :meth:`load`. Raises CheckpointError."""
        self._check_open()
        state = self._states.current(key)
        if state is None:
            return None
        return self._folder.load(state, expected, DROP), state.info

    def state_info(self, key: str) -> dict[str, Any] | None:
        """The info of :meth:`state` alone. The file is not read."""
        self._check_open()
        state = self._states.current(key)
        return None if state is None else state.info

    def state_keys(self) -> list[str]:
        """The keys of all states, sorted. Raises CheckpointError."""
        self._check_open()
        return self._states.keys()

    def drop_state(self, key: str) -> None:
        """Remove the state under ``key``, whatever is left of it."""
        self._check_writer()
        self._states.drop(key)

    # ---- maintenance -----------------------------------------------------------------------------

    def check(self) -> list[Damage]:
        """Read everything and list what is damaged, missing or left over. Changes nothing.

        While another process is writing, its temporary files are in the list.
        """
        self._check_open()
        return self._upkeep.check()

    def repair(self) -> list[str]:
        """Drop all records from the first damaged one on, states that are damaged or follow them,
        and files that belong to nothing. Returns a line for each action."""
        self._check_writer()
        return self._upkeep.repair(None)

    def differences(self, header: Mapping[str, Any]) -> list[str]:
        """A line for each value in which ``header`` differs from the run's: its path, and both
        values. Raises ArgumentError if ``header`` is not plain JSON."""
        return list(manifest.differences(self._header, strict_json.plain(header, "header")))

    def free_bytes(self) -> int:
        """The number of bytes that may still be written on the run's disk."""
        self._check_open()
        with self._folder.reading(""):
            return fs.free_bytes(self._folder.root)

    # ---- opening ---------------------------------------------------------------------------------

    def _check_unused(self) -> None:
        label = self._folder.label()
        names = [name for name in fs.listing(self._folder.root) if not is_temporary(name)]
        if HEADER in names:
            raise ArgumentError(f"{label}: already holds a run; open it, or name another folder")
        if foreign := [name for name in names if name not in {MANIFEST, LAYERS, STATE, LOCK}]:
            raise ArgumentError(
                f"{label}: holds other files ({shown(foreign[0])}); name a new folder"
            )
        for name in names:
            if name != LOCK and not self._is_empty(name):
                raise ArgumentError(
                    f"{label}: holds parts of a run ({name}) but no {HEADER}; name another folder"
                )

    def _is_empty(self, name: str) -> bool:
        """Whether a part is empty, as an interrupted creation leaves it."""
        if name == MANIFEST:
            label, root = self._folder.label(name), self._folder.root
            handle = regular.open_regular(name, label, folder=root)
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
            raise ArgumentError(f"{self._folder.label()}: is closed; open it again")

    def _check_writer(self) -> None:
        self._check_open()
        label, owner = self._folder.label(), self._lock.owner
        if owner is None:
            raise ArgumentError(f"{label}: was opened read-only; open it with write=True")
        if owner != os.getpid():
            raise ArgumentError(f"{label}: belongs to process {owner}; its children must not write")


def _sync_parent(path: Path) -> None:
    handle = fs.open_folder(path.parent, follow=True)
    try:
        fs.sync_folder(handle)
    finally:
        fs.close(handle)
