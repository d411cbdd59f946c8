"""The file of a run's manifest, to which lines are appended durably."""

from __future__ import annotations

import contextlib
import os

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, regular, strict_json
from lobs_native.files.strict_json import shown
from lobs_native.rundir import manifest
from lobs_native.rundir.folder import MANIFEST, RunFolder
from lobs_native.rundir.manifest import ManifestRecord

__all__ = ["Journal"]

MOST_BYTES = 64 << 20
MOST_MARKS = 2_000_000


class Journal:
    """The records of a run, in order, and the file in which they are stored.

    Attributes
    ----------
    records : list of ManifestRecord
    known : {(kind, name): ManifestRecord}
    checks : list of str
        The check of run.json, then that of each line.
    torn : int
        The number of bytes of an unfinished last line.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.records: list[ManifestRecord] = []
        self.known: dict[tuple[str, str], ManifestRecord] = {}
        self.checks = [""]
        self.torn = 0
        self._ends = [0]  # size of the file after n records, in bytes
        self._marks = 0  # in all lines, see strict_json.count_marks

    def read(self) -> str | None:
        """Read all lines up to the first damaged one. Returns a description of that one's damage,
        or None."""
        label = self.folder.label(MANIFEST)
        with self.folder.reading(MANIFEST):
            data = regular.read_whole(MANIFEST, label, most=MOST_BYTES, folder=self.folder.root)
        if strict_json.count_marks(data) > MOST_MARKS:
            raise CheckpointError(
                f"{label}: holds more than {MOST_MARKS} values, the limit; begin a new run"
            )
        while self._ends[-1] < len(data):
            seq, begin = len(self.records), self._ends[-1]
            end = data.find(b"\n", begin)
            if end < 0:
                self.torn = len(data) - begin
                return None
            where = f"{MANIFEST}: line {seq + 1}"
            try:
                record = manifest.parse_line(data[begin:end], where, seq, self.checks[-1])
            except CheckpointError as error:
                return str(error)
            if (record.kind, record.name) in self.known:
                return f"{where}: is a second {record.kind} {shown(record.name)}"
            self._add(record, data[begin : end + 1])
        return None

    def unfinished(self) -> str:
        """The message about a torn line."""
        line = len(self.records) + 1
        return f"line {line} was never finished ({self.torn} bytes) and does not count"

    def settle(self) -> None:
        """Sync the file: its last writer may have been killed before doing so."""
        handle = self._open()
        try:
            fs.sync(handle)
        finally:
            fs.close(handle)
        fs.sync_folder(self.folder.root)

    def check_room(self, draft: ManifestRecord) -> None:
        """Raise CheckpointError if the file, with the line of a record, would exceed the limits."""
        line = manifest.line_bytes(draft, self.checks[-1])
        marks = self._marks + strict_json.count_marks(line)
        if self._ends[-1] + len(line) > MOST_BYTES or marks > MOST_MARKS:
            raise CheckpointError(
                f"{self.folder.label(MANIFEST)}: has reached its size limit; begin another run, "
                "with less in info"
            )

    def append(self, record: ManifestRecord) -> None:
        """Append a line after the last one that counts. After an exception the line is removed
        again, if the system still allows it."""
        line, end = manifest.line_bytes(record, self.checks[-1]), self._ends[-1]
        handle = self._open()
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
        self._add(record, line)

    def cut(self, count: int) -> None:
        """Keep the first ``count`` records."""
        handle = self._open()
        try:
            self._cut_at(handle, self._ends[count])
        finally:
            fs.close(handle)
        for record in self.records[count:]:
            del self.known[record.kind, record.name]
        del self.records[count:], self._ends[count + 1 :], self.checks[count + 1 :]
        self.torn = 0

    def _add(self, record: ManifestRecord, line: bytes) -> None:
        self.records.append(record)
        self.known[record.kind, record.name] = record
        self._ends.append(self._ends[-1] + len(line))
        self.checks.append(manifest.check_of_line(line))
        self._marks += strict_json.count_marks(line)
        self.torn = 0

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        return fs.open_file(MANIFEST, flags, folder=self.folder.root)

    def _cut_at(self, handle: int, end: int) -> None:
        """Truncate the file after the last line that counts.

        This is synced separately: if the next line reached the disk and the truncation did not,
        the end of the old contents would follow that line.
        """
        size = fs.stat(handle).st_size
        if size < end:
            raise CheckpointError(
                f"{self.folder.label(MANIFEST)}: another program truncated it to {size} bytes; "
                "open the run again"
            )
        if size > end:
            fs.truncate(handle, end)
            fs.sync(handle)
