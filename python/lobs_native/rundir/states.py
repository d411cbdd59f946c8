"""The states of a run: tensors under a key, replaced often and atomically."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, regular, safefile
from lobs_native.files.atomic import put
from lobs_native.rundir import manifest
from lobs_native.rundir.folder import DROP, STATE, RunFolder, is_temporary
from lobs_native.rundir.journal import Journal
from lobs_native.rundir.manifest import State

__all__ = ["ORPHAN", "STATE_FILE", "StateStore"]

STATE_FILE = re.compile(r"state/([0-9a-f]{16})-[0-9a-f]{16}\.safetensors")
ORPHAN = "belongs to no state"
_STATE_RECORD = re.compile(r"state/([0-9a-f]{16})\.json")


class StateStore:
    """The contents of ``state/``."""

    def __init__(self, folder: RunFolder, journal: Journal) -> None:
        self.folder = folder
        self.journal = journal

    def put(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None) -> None:
        """Replace the state under ``key`` atomically: its record refers to a file named by its
        content."""
        manifest.check_name(key, "key")
        after, prev = len(self.journal.records), self.journal.checks[-1]
        file, size = manifest.state_file(key, "0" * 64), safefile.size(tensors)
        draft = State(key, file, size, "0" * 64, manifest.info_of(info), after, prev)
        manifest.state_bytes(draft)
        record = manifest.state_record(key)
        with self.folder.writing(record, size):
            old = self._files(record)
            _, digest = put(
                self.folder.states,
                lambda sha256: Path(manifest.state_file(key, sha256)).name,
                safefile.pieces(tensors),
            )
            file = manifest.state_file(key, digest)
            new = draft._replace(file=file, sha256=digest)
            put(self.folder.states, Path(record).name, [manifest.state_bytes(new)])
            for name in old - {Path(file).name}:
                fs.unlink(name, folder=self.folder.states)

    def current(self, key: str) -> State | None:
        """The record of a state; None if there is none, or if records that it follows are gone."""
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self.folder.reading(record):
            if not fs.exists(Path(record).name, folder=self.folder.states):
                return None
        try:
            state = self._read(record)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{DROP}") from error
        return None if self._is_stale(state) else state

    def keys(self) -> list[str]:
        """The keys of all states, sorted."""
        with self.folder.reading(STATE):
            names = sorted(f"{STATE}/{name}" for name in fs.listing(self.folder.states))
        return sorted(self._read(name).key for name in names if _STATE_RECORD.fullmatch(name))

    def drop(self, key: str) -> None:
        """Remove the state under ``key``, whatever is left of it."""
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self.folder.writing(record, None):
            self._remove(record)

    def drop_file(self, file: str) -> bool:
        """Remove the state that a file belongs to. Returns False if the file's name is not that of
        a state's file."""
        match = _STATE_RECORD.fullmatch(file) or STATE_FILE.fullmatch(file)
        if match is not None:
            self._remove(f"{STATE}/{match[1]}.json")
        return match is not None

    def damages(self) -> list[tuple[str, str, State | None]]:
        """Triples of a file, what is wrong with it, and the state if it is intact but stale."""
        damages: list[tuple[str, str, State | None]] = []
        names = [f"{STATE}/{n}" for n in fs.listing(self.folder.states) if not is_temporary(n)]
        referenced: set[str] = set()
        unreadable: set[str] = set()  # keys whose record cannot be read
        for record in names:
            if not (match := _STATE_RECORD.fullmatch(record)):
                continue
            try:
                state = self._read(record)
            except CheckpointError as error:
                description = str(error).removeprefix(f"{self.folder.label(record)}: ")
                damages.append((record, description, None))
                unreadable.add(match[1])
                continue
            referenced.add(state.file)
            if self._is_stale(state):
                description = f"follows {state.after} records, some of which are gone"
                damages.append((record, description, state))
            elif damage := self.folder.damage(state):
                damages.append((state.file, damage, None))
        for name in names:
            if name not in referenced and not _STATE_RECORD.fullmatch(name):
                match = STATE_FILE.fullmatch(name)
                if match is None or match[1] not in unreadable:
                    damages.append((name, ORPHAN, None))
        return damages

    def _remove(self, record: str) -> None:
        """Remove a state, its record durably first: a record without its file counts as damage."""
        name = Path(record).name
        if fs.exists(name, folder=self.folder.states):
            fs.unlink(name, folder=self.folder.states)
            fs.sync_folder(self.folder.states)
        for file in self._files(record):
            fs.unlink(file, folder=self.folder.states)

    def _files(self, record: str) -> set[str]:
        """The names in state/ of all tensor files for the key of ``record``."""
        key = _STATE_RECORD.fullmatch(record)
        return {
            name
            for name in fs.listing(self.folder.states)
            if key and (match := STATE_FILE.fullmatch(f"{STATE}/{name}")) and match[1] == key[1]
        }

    def _read(self, record: str) -> State:
        label = self.folder.label(record)
        with self.folder.reading(record):
            data = regular.read_whole(
                Path(record).name,
                label,
                most=manifest.LONGEST_LINE + 1,
                folder=self.folder.states,
            )
        return manifest.parse_state(data, label, record)

    def _is_stale(self, state: State) -> bool:
        checks = self.journal.checks
        return state.after >= len(checks) or checks[state.after] != state.prev
