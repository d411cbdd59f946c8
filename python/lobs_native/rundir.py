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

import contextlib
import copy
import datetime
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native import fs, manifest, safefile
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import put
from lobs_native.manifest import Record, State
from lobs_native.safefile import Expected, shown

__all__ = ["Problem", "Record", "RunDirectory"]

HEADER, MANIFEST, LAYERS, STATE, LOCK = "run.json", "manifest.jsonl", "layers", "state", "LOCK"
MOST_MANIFEST = 64 << 20  # bytes
MOST_MANIFEST_MARKS = 2_000_000
_STATE_RECORD = re.compile(r"state/([0-9a-f]{16})\.json")
_STATE_FILE = re.compile(r"state/([0-9a-f]{16})-[0-9a-f]{16}\.safetensors")
_LAYER_FILE = re.compile(r"layers/\d{5,}-[0-9a-f]{12}\.safetensors")
_TEMPORARY = re.compile(r"(.*/)?\.[^/]*\.[0-9a-f]{8}\.tmp")  # see files.put
_HOLDER = re.compile(r"[A-Za-z0-9._:+-]{1,253}")
_PIECE = 1 << 20
_UNFINISHED, _ORPHAN = "was never finished", "belongs to no state"
_REPAIR = "; repair the run"
_DROP = "; repair the run, or drop the state"


@dataclass(frozen=True)
class Problem:
    """Something in the folder of a run that is not as it should be."""

    file: str  # below the folder of the run
    what: str
    seq: int | None = None  # of the record that is damaged by it

    def __str__(self) -> str:
        return f"{_printable(self.file)}: {self.what}"


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
        self._root = self._layers = self._states = -1
        self._lock = -1
        self._owner: int | None = None  # the process that may write
        self._header: dict[str, Any] = {}
        self._records: list[Record] = []
        self._known: dict[tuple[str, str], Record] = {}
        self._ends = [0]  # of the manifest after n records, in bytes
        self._checks = [""]  # of run.json, then of each line
        self._torn = 0  # bytes of an unfinished line
        self._marks = 0  # of all lines

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
        try:
            with run._writing("", None):
                new = [p for p in (run.path, *run.path.parents) if not fs.exists(p)]
                fs.make_folder(run.path, parents=True)
                run._root = fs.open_folder(run.path, follow=True)
                run._check_that_it_is_free()
                run._take_lock()
                run._open_parts(make=True)
                run._clean()
                # Where there is a run.json, all else is on the disk: it comes last.
                fs.sync_folder(run._root)
                for folder in {run.path, *new}:
                    _sync_parent(folder)
                put(run._root, HEADER, [data])
        except BaseException:
            run.close()
            raise
        run.messages.clear()
        run._header, run._checks = values, [check]
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
            run._open_root()
            if write:
                with run._writing(LOCK, None):
                    run._take_lock()
            with run._reading(""):
                what = run._what(HEADER)
                data = safefile.read_whole(HEADER, what, most=safefile.MOST_JSON, folder=run._root)
                run._header, run._checks[0] = manifest.parse_header(data, what)
            with run._writing("", None):
                run._open_parts(make=repair)
            damage = run._read_manifest()
            if damage and not repair:
                raise CheckpointError(f"{run._what()}/{damage}{_REPAIR}")
            if repair:
                run.messages += run._repair(damage)
            elif write:
                with run._writing("", None):
                    run._clean()
            if write:
                with run._writing("", None):
                    run._settle()
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Give the lock back. May be called twice."""
        if self._owner is not None and self._owner == os.getpid():
            with contextlib.suppress(OSError):
                fs.truncate(self._lock, 0)
        handles = (self._lock, self._states, self._layers, self._root)
        self._root = self._layers = self._states = self._lock = -1
        self._owner = None
        for handle in handles:
            if handle >= 0:
                with contextlib.suppress(OSError):
                    fs.close(handle)

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
        return tuple(self._records)

    def find(self, name: str, *, kind: str = "layer") -> Record | None:
        """The record of this name and kind, if it is committed."""
        return self._known.get((kind, name))

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
        if (kind, name) in self._known:
            raise ArgumentError(f"name: {kind} {shown(name)} is committed already; choose another")
        seq, prev = len(self._records), self._checks[-1]
        file, size = manifest.layer_file(seq, name), safefile.size(tensors)
        draft = Record(seq, kind, name, file, size, "0" * 64, manifest.info_of(info))
        # What could not be read again is refused before anything is written.
        self._check_room(manifest.line_bytes(draft, prev))
        with self._writing(file, size):
            _, digest = put(self._layers, Path(file).name, safefile.pieces(tensors))
            record = replace(draft, sha256=digest)
            line = manifest.line_bytes(record, prev)
            self._append(line)
        self._add(record, line)
        return record

    def load(self, record: Record, expected: Expected | None = None) -> dict[str, Tensor]:
        """The tensors of a record, on the CPU.

        Size and sha256 are checked before anything in the file is interpreted, and with
        ``expected`` ({name: (shape, dtype)}, exactly those) a file that is larger than it could be
        is not read at all. The tensors share one buffer and are the caller's own.

        Raises CheckpointError.
        """
        self._check_open()
        return self._load(self._layers, record, expected, _REPAIR)

    # ---- states ----------------------------------------------------------------------------------

    def put_state(
        self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        """Keep tensors under ``key`` until they are replaced or dropped. Until it returns, the
        state before is kept. Arguments and errors are those of :meth:`commit`."""
        self._check_writer()
        manifest.check_name(key, "key")
        after, prev = len(self._records), self._checks[-1]
        file, size = manifest.state_file(key, "0" * 64), safefile.size(tensors)
        draft = State(key, file, size, "0" * 64, manifest.info_of(info), after, prev)
        manifest.state_bytes(draft)
        record = manifest.state_record(key)
        with self._writing(record, size):
            old = self._state_files(record)
            _, digest = put(
                self._states,
                lambda sha256: Path(manifest.state_file(key, sha256)).name,
                safefile.pieces(tensors),
            )
            file = manifest.state_file(key, digest)
            new = draft._replace(file=file, sha256=digest)
            put(self._states, Path(record).name, [manifest.state_bytes(new)])
            for name in old - {Path(file).name}:
                fs.unlink(name, folder=self._states)

    def state(
        self, key: str, expected: Expected | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and info under ``key``; None if there are none, or if they follow records
        that are gone. ``expected`` is that of :meth:`load`. Raises CheckpointError."""
        found = self._current_state(key)
        if found is None:
            return None
        return self._load(self._states, found, expected, _DROP), found.info

    def state_info(self, key: str) -> dict[str, Any] | None:
        """The info alone of what :meth:`state` gives; its file is not read."""
        found = self._current_state(key)
        return None if found is None else found.info

    def state_keys(self) -> list[str]:
        """The keys under which there are states, sorted. Raises CheckpointError."""
        self._check_open()
        with self._reading(STATE):
            names = sorted(f"{STATE}/{name}" for name in fs.listing(self._states))
        records = [name for name in names if _STATE_RECORD.fullmatch(name)]
        return sorted(self._read_state(record).key for record in records)

    def drop_state(self, key: str) -> None:
        """Remove the state under ``key``, whatever is left of it."""
        self._check_writer()
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self._writing(record, None):
            self._drop(record)

    # ---- looking after it ------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        """Read everything and say what is damaged, missing or left over. Changes nothing.

        While another process writes, its temporary files are among the problems.
        """
        self._check_open()
        with self._reading(""):
            found = [Problem(MANIFEST, self._unfinished())] if self._torn else []
            found += self._damaged_records()
            found += self._left_over()
            return found + [problem for problem, _ in self._wrong_states()]

    def repair(self) -> list[str]:
        """Drop all records from the first damaged one on, states that are damaged or follow them,
        and files that belong to nothing. What was done, one line each."""
        self._check_writer()
        return self._repair(None)

    def differences(self, header: Mapping[str, Any]) -> list[str]:
        """How ``header`` differs from the one of the run: a line for each value, with its place and
        both values. Raises ArgumentError if it is not plain JSON."""
        return list(manifest.differences(self._header, safefile.plain(header, "header")))

    def free_bytes(self) -> int:
        """Bytes that may still be written where the run is."""
        self._check_open()
        with self._reading(""):
            return fs.free_bytes(self._root)

    def _current_state(self, key: str) -> State | None:
        """The record of a state, unless it follows records that are gone."""
        self._check_open()
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self._reading(record):
            if not fs.exists(Path(record).name, folder=self._states):
                return None
        try:
            found = self._read_state(record)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_DROP}") from error
        return None if self._is_stale(found) else found

    # ---- opening ---------------------------------------------------------------------------------

    def _open_root(self) -> None:
        with self._reading(""):
            try:
                self._root = fs.open_folder(self.path, follow=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise CheckpointError(
                    f"{self._what()}: is no folder; create a run there"
                ) from error
            if not fs.exists(HEADER, folder=self._root):
                raise CheckpointError(
                    f"{self._what(HEADER)}: is missing, so no run was begun there; create one"
                )

    def _check_that_it_is_free(self) -> None:
        names = [name for name in fs.listing(self._root) if not _is_temporary(name)]
        if HEADER in names:
            raise ArgumentError(
                f"{self._what()}: holds a run already; open it, or name another folder"
            )
        if strange := [name for name in names if name not in {MANIFEST, LAYERS, STATE, LOCK}]:
            raise ArgumentError(
                f"{self._what()}: holds other things ({shown(strange[0])}); name a new folder"
            )
        for name in names:
            if name != LOCK and not self._is_empty(name):
                raise ArgumentError(
                    f"{self._what()}: holds parts of a run ({name}) but no {HEADER}; name another "
                    "folder"
                )

    def _is_empty(self, name: str) -> bool:
        """Whether a part is as an interrupted creation leaves it."""
        if name == MANIFEST:
            handle = safefile.open_regular(name, self._what(name), folder=self._root)
            try:
                return fs.stat(handle).st_size == 0
            finally:
                fs.close(handle)
        folder = self._folder(name)
        try:
            return not fs.listing(folder)
        finally:
            fs.close(folder)

    def _open_parts(self, *, make: bool) -> None:
        """Open layers/ and state/, and see that there is a manifest; ``make`` what is missing."""
        if make:
            for name in (LAYERS, STATE):
                fs.make_folder(name, folder=self._root)
        self._layers, self._states = self._folder(LAYERS), self._folder(STATE)
        if not fs.exists(MANIFEST, folder=self._root):
            if not make:
                raise CheckpointError(f"{self._what(MANIFEST)}: is missing{_REPAIR}")
            put(self._root, MANIFEST, [b""])

    def _folder(self, name: str) -> int:
        try:
            return fs.open_folder(name, folder=self._root)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._what(name)}: is missing{_REPAIR}") from error
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{self._what(name)}: is a link or no folder; put the folder itself there"
            ) from error

    def _take_lock(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        self._lock = fs.open_file(LOCK, flags, folder=self._root)
        safefile.check_regular(self._lock, self._what(LOCK))
        free = fs.lock(self._lock)
        who, elsewhere = _holder(fs.read(self._lock, 4096))
        if not free:
            raise CheckpointError(
                f"{self._what()}: {who or 'another process'} is writing there; wait until it has "
                "ended, or name another folder"
            )
        self._owner = os.getpid()
        if who:
            self.messages.append(
                f"{LOCK}: {who} ended without giving it back; taken over"
                + ("; that is another computer: make sure that it has ended" if elsewhere else "")
            )
        own = {
            "pid": self._owner,
            "host": os.uname().nodename,
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        fs.truncate(self._lock, 0)
        fs.write(self._lock, json.dumps(own).encode())

    def _read_manifest(self) -> str | None:
        """Take over all lines that are whole and right; what is wrong with the next one, if there
        is one."""
        what = self._what(MANIFEST)
        with self._reading(MANIFEST):
            data = safefile.read_whole(MANIFEST, what, most=MOST_MANIFEST, folder=self._root)
        if safefile.count_marks(data) > MOST_MANIFEST_MARKS:
            raise CheckpointError(f"{what}: holds more values than are read; begin a new run")
        while self._ends[-1] < len(data):
            seq, begin = len(self._records), self._ends[-1]
            end = data.find(b"\n", begin)
            if end < 0:
                self._torn = len(data) - begin
                self.messages.append(f"{MANIFEST}: {self._unfinished()}")
                return None
            where = f"{MANIFEST}: line {seq + 1}"
            try:
                record = manifest.parse_line(data[begin:end], where, seq, self._checks[-1])
            except CheckpointError as error:
                return str(error)
            if (record.kind, record.name) in self._known:
                return f"{where}: is the second {record.kind} {shown(record.name)}"
            self._add(record, data[begin : end + 1])
        return None

    def _settle(self) -> None:
        """Sync what has been read: its writer may have been killed before it did."""
        handle = self._open_manifest()
        try:
            fs.sync(handle)
        finally:
            fs.close(handle)
        fs.sync_folder(self._root)

    def _unfinished(self) -> str:
        line = len(self._records) + 1
        return f"line {line} was never finished ({self._torn} bytes) and does not count"

    def _clean(self) -> None:
        """Remove what an interrupted write has left, and states that follow records which are
        gone."""
        for problem in self._left_over():
            if _TEMPORARY.fullmatch(problem.file):
                self.messages.append(self._remove(problem))
        for problem, stale in self._wrong_states():
            if stale is not None:
                self.messages.append(self._drop_stale(problem, stale))
            elif problem.what == _ORPHAN and _STATE_FILE.fullmatch(problem.file):
                self.messages.append(self._remove(problem))

    # ---- writing ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._root < 0:
            raise ArgumentError(f"{self._what()}: is closed; open it again")

    def _check_writer(self) -> None:
        self._check_open()
        if self._owner is None:
            raise ArgumentError(f"{self._what()}: was opened to read only; open it with write=True")
        if self._owner != os.getpid():
            raise ArgumentError(
                f"{self._what()}: belongs to process {self._owner}; its children must not write"
            )

    def _check_room(self, line: bytes) -> None:
        marks = self._marks + safefile.count_marks(line)
        if self._ends[-1] + len(line) > MOST_MANIFEST or marks > MOST_MANIFEST_MARKS:
            raise CheckpointError(
                f"{self._what(MANIFEST)}: is as long as it may become; begin another run, with "
                "less in info"
            )

    def _add(self, record: Record, line: bytes) -> None:
        self._records.append(record)
        self._known[record.kind, record.name] = record
        self._ends.append(self._ends[-1] + len(line))
        self._checks.append(manifest.check_of_line(line))
        self._marks += safefile.count_marks(line)
        self._torn = 0

    def _append(self, line: bytes) -> None:
        """Put a line after the last one that counts. After an exception it is not there, as far as
        the system still obeys."""
        end = self._ends[-1]
        handle = self._open_manifest()
        try:
            self._cut_at(handle, end)
            try:
                fs.write(handle, line)
                fs.sync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    fs.truncate(handle, end)
                raise
        finally:
            fs.close(handle)

    def _open_manifest(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        return fs.open_file(MANIFEST, flags, folder=self._root)

    def _cut_at(self, handle: int, end: int) -> None:
        """Cut off what stands after the last line that counts. Synced by itself: if the next line
        reached the disk and the cut did not, the end of what was there would follow it."""
        size = fs.stat(handle).st_size
        if size < end:
            raise CheckpointError(
                f"{self._what(MANIFEST)}: was cut by someone else to {size} bytes; open it again"
            )
        if size > end:
            fs.truncate(handle, end)
            fs.sync(handle)

    def _drop(self, record: str) -> None:
        """Remove a state: its record first, for good, since a record without its file is damage."""
        name = Path(record).name
        if fs.exists(name, folder=self._states):
            fs.unlink(name, folder=self._states)
            fs.sync_folder(self._states)
        for file in self._state_files(record):
            fs.unlink(file, folder=self._states)

    def _drop_stale(self, problem: Problem, state: State) -> str:
        self._drop(manifest.state_record(state.key))
        return f"state {shown(state.key)}: dropped: it {problem.what}"

    def _remove(self, problem: Problem) -> str:
        """Remove the file of a problem, if a run has made it; what was done."""
        own = (_TEMPORARY, _LAYER_FILE, _STATE_FILE)
        if not any(pattern.fullmatch(problem.file) for pattern in own):
            return f"{problem}: left: no run has made it; remove it yourself"
        part, _, name = problem.file.rpartition("/")
        folder = {"": self._root, LAYERS: self._layers, STATE: self._states}[part]
        try:
            fs.unlink(name, folder=folder)
        except IsADirectoryError:
            return f"{_printable(problem.file)}: left: it is a folder; remove it yourself"
        return f"{_printable(problem.file)}: removed: it {problem.what}"

    def _repair(self, damage: str | None) -> list[str]:
        done = []
        with self._reading(""):
            damaged = {problem.seq: problem for problem in self._damaged_records()}
        with self._writing("", None):
            if damage is not None:
                done.append(f"{damage}: cut off with all that follows")
            elif self._torn:
                done.append(f"{MANIFEST}: {self._unfinished()}: cut off")
            first = min((seq for seq in damaged if seq is not None), default=len(self._records))
            for record in self._records[first:]:
                why = damaged.get(record.seq, f"it follows record {first}")
                done.append(
                    f"record {record.seq} ({record.kind} {shown(record.name)}): dropped: {why}"
                )
            self._cut(first)
            for problem, stale in self._wrong_states():
                own = _STATE_RECORD.fullmatch(problem.file) or _STATE_FILE.fullmatch(problem.file)
                if stale is not None:
                    done.append(self._drop_stale(problem, stale))
                elif own is not None and problem.what != _ORPHAN:
                    self._drop(f"{STATE}/{own[1]}.json")
                    done.append(f"{problem}: dropped with its state")
                else:
                    done.append(self._remove(problem))
            done += [self._remove(problem) for problem in self._left_over()]
            for folder in (self._root, self._layers, self._states):
                fs.sync_folder(folder)
        return done

    def _cut(self, count: int) -> None:
        """Keep the first ``count`` records."""
        handle = self._open_manifest()
        try:
            self._cut_at(handle, self._ends[count])
        finally:
            fs.close(handle)
        for record in self._records[count:]:
            del self._known[record.kind, record.name]
        del self._records[count:], self._ends[count + 1 :], self._checks[count + 1 :]
        self._torn = 0

    # ---- reading ---------------------------------------------------------------------------------

    def _load(
        self, folder: int, item: Record | State, expected: Expected | None, way_out: str
    ) -> dict[str, Tensor]:
        what = self._what(item.file)
        try:
            raw = self._read_verified(folder, item, expected, what)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{way_out}") from error
        return safefile.tensors_of(raw, what, expected)

    def _read_verified(
        self, folder: int, item: Record | State, expected: Expected | None, what: str
    ) -> Tensor:
        """(bytes,) uint8: the content of a file, which is what was written."""
        if expected is not None and item.size > (most := safefile.largest(expected)):
            raise CheckpointError(
                f"{what}: has {item.size} bytes, but what is expected makes {most} at most"
            )
        with self._reading(item.file):
            handle = safefile.open_regular(Path(item.file).name, what, folder=folder)
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

    def _damage(self, folder: int, item: Record | State) -> str | None:
        """What is wrong with a file, read piece by piece."""
        try:
            handle = safefile.open_regular(Path(item.file).name, item.file, folder=folder)
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

    def _damaged_records(self) -> list[Problem]:
        return [
            Problem(record.file, what, record.seq)
            for record in self._records
            if (what := self._damage(self._layers, record))
        ]

    def _left_over(self) -> list[Problem]:
        """Files that no record and no state will ever name."""
        kept = {Path(record.file).name for record in self._records}
        found = []
        for folder, prefix in (
            (self._root, ""),
            (self._layers, "layers/"),
            (self._states, "state/"),
        ):
            for name in fs.listing(folder):
                if _is_temporary(name):
                    found.append(Problem(prefix + name, _UNFINISHED))
                elif folder == self._layers and name not in kept:
                    found.append(Problem(prefix + name, "is not in the manifest"))
        return found

    def _state_files(self, record: str) -> set[str]:
        """The names in state/ of all tensor files that are called after the same key."""
        own = _STATE_RECORD.fullmatch(record)
        return {
            name
            for name in fs.listing(self._states)
            if own and (m := _STATE_FILE.fullmatch(f"{STATE}/{name}")) and m[1] == own[1]
        }

    def _read_state(self, record: str) -> State:
        what = self._what(record)
        with self._reading(record):
            data = safefile.read_whole(
                Path(record).name, what, most=manifest.LONGEST_LINE + 1, folder=self._states
            )
        return manifest.parse_state(data, what, record)

    def _is_stale(self, state: State) -> bool:
        return state.after >= len(self._checks) or self._checks[state.after] != state.prev

    def _wrong_states(self) -> list[tuple[Problem, State | None]]:
        """What is wrong in state/; with it the state where that is whole, but stale."""
        found: list[tuple[Problem, State | None]] = []
        names = [f"{STATE}/{n}" for n in fs.listing(self._states) if not _is_temporary(n)]
        right: set[str] = set()
        unclear: set[str] = set()  # keys whose record says nothing
        for record in names:
            if not (own := _STATE_RECORD.fullmatch(record)):
                continue
            try:
                state = self._read_state(record)
            except CheckpointError as error:
                what = str(error).removeprefix(f"{self._what(record)}: ")
                found.append((Problem(record, what), None))
                unclear.add(own[1])
                continue
            right.add(state.file)
            if self._is_stale(state):
                gone = f"follows {state.after} records, of which some are gone"
                found.append((Problem(record, gone), state))
            elif damage := self._damage(self._states, state):
                found.append((Problem(state.file, damage), None))
        for name in names:
            if name not in right and not _STATE_RECORD.fullmatch(name):
                own = _STATE_FILE.fullmatch(name)
                if own is None or own[1] not in unclear:
                    found.append((Problem(name, _ORPHAN), None))
        return found

    # ---- messages --------------------------------------------------------------------------------

    def _what(self, file: str = "") -> str:
        """The whole path of a file of the run, for messages."""
        return _printable(str(self.path / file))

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._what(file)}: cannot be read: {error.strerror or error}"
            ) from error

    @contextlib.contextmanager
    def _writing(self, file: str, needed: int | None) -> Iterator[None]:
        """``needed``: bytes of the file, where they are known."""
        try:
            yield
        except OSError as error:
            size = "" if needed is None else f" ({needed} bytes)"
            text = f"{self._what(file)}: could not be written{size}: {error.strerror or error}"
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                text += "; make room"
                with contextlib.suppress(OSError):
                    text += f" ({fs.free_bytes(self._root)} bytes are free)"
            raise CheckpointError(
                f"{text}; what is committed is safe, and the run can go on from there"
            ) from error


_WRONG_CONTENT = "has another sha256 than its record says"


def _wrong_size(size: int, right: int) -> str:
    return f"has {size} bytes, its record says {right}"


def _buffer(size: int, what: str) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"{what}: needs {size} bytes of memory; they are not there"
        ) from error


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def _sync_parent(path: Path) -> None:
    handle = fs.open_folder(path.parent, follow=True)
    try:
        fs.sync_folder(handle)
    finally:
        fs.close(handle)


def _holder(data: bytes) -> tuple[str, bool]:
    """Who has written this into the lock, "" if nobody; and whether that was another computer."""
    if not data:
        return "", False
    unknown = "an unknown process", False
    try:
        values = safefile.parse_json(data, LOCK)
    except CheckpointError:
        return unknown
    if not isinstance(values, dict):
        return unknown
    process, host, since = (str(values.get(key)) for key in ("pid", "host", "since"))
    if not all(_HOLDER.fullmatch(text) for text in (process, host, since)):
        return unknown
    return f"process {process} on {host} (since {since})", host != os.uname().nodename
