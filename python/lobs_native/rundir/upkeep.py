"""What is wrong in the folder of a run, and putting it right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lobs_native.files import fs
from lobs_native.files.safefile import shown
from lobs_native.rundir.folder import LAYERS, MANIFEST, STATE, RunFolder, is_temporary, printable
from lobs_native.rundir.journal import Journal
from lobs_native.rundir.manifest import State
from lobs_native.rundir.states import ORPHAN, STATE_FILE, StateStore

__all__ = ["Problem", "Upkeep"]

_LAYER_FILE = re.compile(r"layers/\d{5,}-[0-9a-f]{12}\.safetensors")
_UNFINISHED = "was never finished"


@dataclass(frozen=True)
class Problem:
    """Something in the folder of a run that is not as it should be."""

    file: str  # below the folder of the run
    what: str
    seq: int | None = None  # of the record that is damaged by it

    def __str__(self) -> str:
        return f"{printable(self.file)}: {self.what}"


class Upkeep:
    """Looks after an open run."""

    def __init__(self, folder: RunFolder, journal: Journal, states: StateStore) -> None:
        self.folder = folder
        self.journal = journal
        self.states = states

    def check(self) -> list[Problem]:
        """Read everything and say what is damaged, missing or left over."""
        with self.folder.reading(""):
            torn = self.journal.torn
            found = [Problem(MANIFEST, self.journal.unfinished())] if torn else []
            found += self._damaged_records()
            found += self._left_over()
            return found + [problem for problem, _ in self._wrong_states()]

    def clean(self) -> list[str]:
        """Remove what an interrupted write has left, and states that follow records which are gone.
        What was done, one line each."""
        done = []
        for problem in self._left_over():
            if is_temporary(problem.file):
                done.append(self._remove(problem))
        for problem, stale in self._wrong_states():
            if stale is not None:
                done.append(self._drop_stale(problem, stale))
            elif problem.what == ORPHAN and STATE_FILE.fullmatch(problem.file):
                done.append(self._remove(problem))
        return done

    def repair(self, damage: str | None) -> list[str]:
        """Keep all that comes before the first damage, of the manifest (``damage``) or of a file.
        What was done, one line each."""
        done = []
        journal, folder = self.journal, self.folder
        with folder.reading(""):
            damaged = {problem.seq: problem for problem in self._damaged_records()}
        with folder.writing("", None):
            if damage is not None:
                done.append(f"{damage}: cut off with all that follows")
            elif journal.torn:
                done.append(f"{MANIFEST}: {journal.unfinished()}: cut off")
            first = min((seq for seq in damaged if seq is not None), default=len(journal.records))
            for record in journal.records[first:]:
                why = damaged.get(record.seq, f"it follows record {first}")
                done.append(
                    f"record {record.seq} ({record.kind} {shown(record.name)}): dropped: {why}"
                )
            journal.cut(first)
            for problem, stale in self._wrong_states():
                if stale is not None:
                    done.append(self._drop_stale(problem, stale))
                elif problem.what != ORPHAN and self.states.drop_file(problem.file):
                    done.append(f"{problem}: dropped with its state")
                else:
                    done.append(self._remove(problem))
            done += [self._remove(problem) for problem in self._left_over()]
            for handle in (folder.root, folder.layers, folder.states):
                fs.sync_folder(handle)
        return done

    def _damaged_records(self) -> list[Problem]:
        return [
            Problem(record.file, what, record.seq)
            for record in self.journal.records
            if (what := self.folder.damage(record))
        ]

    def _left_over(self) -> list[Problem]:
        """Files that no record and no state will ever name."""
        kept = {Path(record.file).name for record in self.journal.records}
        found = []
        for handle, prefix in (
            (self.folder.root, ""),
            (self.folder.layers, f"{LAYERS}/"),
            (self.folder.states, f"{STATE}/"),
        ):
            for name in fs.listing(handle):
                if is_temporary(name):
                    found.append(Problem(prefix + name, _UNFINISHED))
                elif handle == self.folder.layers and name not in kept:
                    found.append(Problem(prefix + name, "is not in the manifest"))
        return found

    def _wrong_states(self) -> list[tuple[Problem, State | None]]:
        return [(Problem(file, what), stale) for file, what, stale in self.states.wrong()]

    def _drop_stale(self, problem: Problem, state: State) -> str:
        self.states.drop(state.key)
        return f"state {shown(state.key)}: dropped: it {problem.what}"

    def _remove(self, problem: Problem) -> str:
        """Remove the file of a problem, if a run has made it; what was done."""
        made = (_LAYER_FILE.fullmatch(problem.file), STATE_FILE.fullmatch(problem.file))
        if not any(made) and not is_temporary(problem.file):
            return f"{problem}: left: no run has made it; remove it yourself"
        handle, name = self.folder.holder(problem.file)
        try:
            fs.unlink(name, folder=handle)
        except IsADirectoryError:
            return f"{printable(problem.file)}: left: it is a folder; remove it yourself"
        return f"{printable(problem.file)}: removed: it {problem.what}"
