"""Finding and repairing damage in a run directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lobs_native.files import fs
from lobs_native.files.strict_json import shown
from lobs_native.rundir.folder import LAYERS, MANIFEST, STATE, RunFolder, is_temporary, printable
from lobs_native.rundir.journal import Journal
from lobs_native.rundir.manifest import State
from lobs_native.rundir.states import ORPHAN, STATE_FILE, StateStore

__all__ = ["Damage", "Upkeep"]

_LAYER_FILE = re.compile(r"layers/\d{5,}-[0-9a-f]{12}\.safetensors")
_UNFINISHED = "was never finished"


@dataclass(frozen=True)
class Damage:
    """A file in a run directory that is damaged, missing or left over."""

    file: str  # relative to the run directory
    description: str
    seq: int | None = None  # the number of the record that is damaged

    def __str__(self) -> str:
        return f"{printable(self.file)}: {self.description}"


class Upkeep:
    """Checks and repairs of an open run."""

    def __init__(self, folder: RunFolder, journal: Journal, states: StateStore) -> None:
        self.folder = folder
        self.journal = journal
        self.states = states

    def check(self) -> list[Damage]:
        """Read everything and list what is damaged, missing or left over."""
        with self.folder.reading(""):
            torn = self.journal.torn
            damages = [Damage(MANIFEST, self.journal.unfinished())] if torn else []
            damages += self._damaged_records()
            damages += self._left_over()
            return damages + [damage for damage, _ in self._damaged_states()]

    def clean(self) -> list[str]:
        """Remove the remains of an interrupted write, and states that follow records which are
        gone. Returns a line for each action."""
        actions = []
        for damage in self._left_over():
            if is_temporary(damage.file):
                actions.append(self._remove(damage))
        for damage, stale in self._damaged_states():
            if stale is not None:
                actions.append(self._drop_stale(damage, stale))
            elif damage.description == ORPHAN and STATE_FILE.fullmatch(damage.file):
                actions.append(self._remove(damage))
        return actions

    def repair(self, manifest_damage: str | None) -> list[str]:
        """Keep everything before the first damage, of the manifest (``manifest_damage``) or of a
        file. Returns a line for each action."""
        actions = []
        journal, folder = self.journal, self.folder
        with folder.reading(""):
            damaged = {damage.seq: damage for damage in self._damaged_records()}
        with folder.writing("", None):
            if manifest_damage is not None:
                actions.append(f"{manifest_damage}: cut off with all that follows")
            elif journal.torn:
                actions.append(f"{MANIFEST}: {journal.unfinished()}: cut off")
            first = min((seq for seq in damaged if seq is not None), default=len(journal.records))
            for record in journal.records[first:]:
                reason = damaged.get(record.seq, f"it follows record {first}")
                actions.append(
                    f"record {record.seq} ({record.kind} {shown(record.name)}): dropped: {reason}"
                )
            journal.cut(first)
            for damage, stale in self._damaged_states():
                if stale is not None:
                    actions.append(self._drop_stale(damage, stale))
                elif damage.description != ORPHAN and self.states.drop_file(damage.file):
                    actions.append(f"{damage}: dropped with its state")
                else:
                    actions.append(self._remove(damage))
            actions += [self._remove(damage) for damage in self._left_over()]
            for handle in (folder.root, folder.layers, folder.states):
                fs.sync_folder(handle)
        return actions

    def _damaged_records(self) -> list[Damage]:
        return [
            Damage(record.file, description, record.seq)
            for record in self.journal.records
            if (description := self.folder.damage(record))
        ]

    def _left_over(self) -> list[Damage]:
        """Files that no record and no state refers to."""
        referenced = {Path(record.file).name for record in self.journal.records}
        damages = []
        for handle, prefix in (
            (self.folder.root, ""),
            (self.folder.layers, f"{LAYERS}/"),
            (self.folder.states, f"{STATE}/"),
        ):
            for name in fs.listing(handle):
                if is_temporary(name):
                    damages.append(Damage(prefix + name, _UNFINISHED))
                elif handle == self.folder.layers and name not in referenced:
                    damages.append(Damage(prefix + name, "is not in the manifest"))
        return damages

    def _damaged_states(self) -> list[tuple[Damage, State | None]]:
        return [
            (Damage(file, description), stale) for file, description, stale in self.states.damages()
        ]

    def _drop_stale(self, damage: Damage, state: State) -> str:
        self.states.drop(state.key)
        return f"state {shown(state.key)}: dropped: it {damage.description}"

    def _remove(self, damage: Damage) -> str:
        """Remove a file if its name is one that runs use. Returns a line about it."""
        patterns = (_LAYER_FILE, STATE_FILE)
        own = any(pattern.fullmatch(damage.file) for pattern in patterns)
        if not own and not is_temporary(damage.file):
            return f"{damage}: left: it is not from a run; remove it yourself"
        handle, name = self.folder.location(damage.file)
        try:
            fs.unlink(name, folder=handle)
        except IsADirectoryError:
            return f"{printable(damage.file)}: left: it is a folder; remove it yourself"
        return f"{printable(damage.file)}: removed: it {damage.description}"
