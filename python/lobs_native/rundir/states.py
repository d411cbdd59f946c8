"""The states of a run: tensors under a key that are replaced many times, never half."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, safefile
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
    """What is in ``state/``."""

    def __init__(self, folder: RunFolder, journal: Journal) -> None:
        self.folder = folder
        self.journal = journal

    def put(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None) -> None:
        """Replace what is under ``key``, in one step: its record names a file called by its
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
        """The record of a state, unless it follows records that are gone."""
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self.folder.reading(record):
            if not fs.exists(Path(record).name, folder=self.folder.states):
                return None
        try:
            found = self._read(record)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{DROP}") from error
        return None if self._is_stale(found) else found

    def keys(self) -> list[str]:
        """Under which there are states, sorted."""
        with self.folder.reading(STATE):
            names = sorted(f"{STATE}/{name}" for name in fs.listing(self.folder.states))
        return sorted(self._read(name).key for name in names if _STATE_RECORD.fullmatch(name))

    def drop(self, key: str) -> None:
        """Remove the state under ``key``, whatever is left of it."""
        record = manifest.state_record(manifest.check_name(key, "key"))
        with self.folder.writing(record, None):
            self._remove(record)

    def drop_file(self, file: str) -> bool:
        """Remove the state that a file belongs to by its name, if that is one of a state's."""
        own = _STATE_RECORD.fullmatch(file) or STATE_FILE.fullmatch(file)
        if own is not None:
            self._remove(f"{STATE}/{own[1]}.json")
        return own is not None

    def wrong(self) -> list[tuple[str, str, State | None]]:
        """File, what is wrong with it, and the state where that is whole, but stale."""
        found: list[tuple[str, str, State | None]] = []
        names = [f"{STATE}/{n}" for n in fs.listing(self.folder.states) if not is_temporary(n)]
        right: set[str] = set()
        unclear: set[str] = set()  # keys whose record says nothing
        for record in names:
            if not (own := _STATE_RECORD.fullmatch(record)):
                continue
            try:
                state = self._read(record)
            except CheckpointError as error:
                what = str(error).removeprefix(f"{self.folder.what(record)}: ")
                found.append((record, what, None))
                unclear.add(own[1])
                continue
            right.add(state.file)
            if self._is_stale(state):
                gone = f"follows {state.after} records, of which some are gone"
                found.append((record, gone, state))
            elif damage := self.folder.damage(state):
                found.append((state.file, damage, None))
        for name in names:
            if name not in right and not _STATE_RECORD.fullmatch(name):
                own = STATE_FILE.fullmatch(name)
                if own is None or own[1] not in unclear:
                    found.append((name, ORPHAN, None))
        return found

    def _remove(self, record: str) -> None:
        """Its record first, for good, since a record without its file is damage."""
        name = Path(record).name
        if fs.exists(name, folder=self.folder.states):
            fs.unlink(name, folder=self.folder.states)
            fs.sync_folder(self.folder.states)
        for file in self._files(record):
            fs.unlink(file, folder=self.folder.states)

    def _files(self, record: str) -> set[str]:
        """The names in state/ of all tensor files that are called after the same key."""
        own = _STATE_RECORD.fullmatch(record)
        return {
            name
            for name in fs.listing(self.folder.states)
            if own and (m := STATE_FILE.fullmatch(f"{STATE}/{name}")) and m[1] == own[1]
        }

    def _read(self, record: str) -> State:
        what = self.folder.what(record)
        with self.folder.reading(record):
            data = safefile.read_whole(
                Path(record).name,
                what,
                most=manifest.LONGEST_LINE + 1,
                folder=self.folder.states,
            )
        return manifest.parse_state(data, what, record)

    def _is_stale(self, state: State) -> bool:
        checks = self.journal.checks
        return state.after >= len(checks) or checks[state.after] != state.prev
