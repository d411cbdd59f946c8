"""The manifest of a run as a file: lines appended one by one, each on the disk before it counts."""

from __future__ import annotations

import contextlib
import os

from lobs_native.errors import CheckpointError
from lobs_native.files import fs, safefile
from lobs_native.files.safefile import shown
from lobs_native.rundir import manifest
from lobs_native.rundir.folder import MANIFEST, RunFolder
from lobs_native.rundir.manifest import Record

__all__ = ["Journal"]

MOST_BYTES = 64 << 20
MOST_MARKS = 2_000_000


class Journal:
    """The records of a run, in order, and the file that holds them.

    Attributes
    ----------
    records : list of Record
    known : {(kind, name): Record}
    checks : list of str
        Of run.json, then of each line.
    torn : int
        Bytes of an unfinished last line.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self.known: dict[tuple[str, str], Record] = {}
        self.checks = [""]
        self.torn = 0
        self._ends = [0]  # of the file after n records, in bytes
        self._marks = 0  # of all lines

    def read(self) -> str | None:
        """Take over all lines that are whole and right; what is wrong with the next one, if there
        is one."""
        what = self.folder.what(MANIFEST)
        with self.folder.reading(MANIFEST):
            data = safefile.read_whole(MANIFEST, what, most=MOST_BYTES, folder=self.folder.root)
        if safefile.count_marks(data) > MOST_MARKS:
            raise CheckpointError(f"{what}: holds more values than are read; begin a new run")
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
                return f"{where}: is the second {record.kind} {shown(record.name)}"
            self._add(record, data[begin : end + 1])
        return None

    def unfinished(self) -> str:
        """What to say of a torn line."""
        line = len(self.records) + 1
        return f"line {line} was never finished ({self.torn} bytes) and does not count"

    def settle(self) -> None:
        """Sync what has been read: its writer may have been killed before it did."""
        handle = self._open()
        try:
            fs.sync(handle)
        finally:
            fs.close(handle)
        fs.sync_folder(self.folder.root)

    def check_room(self, draft: Record) -> None:
        """CheckpointError if the line of a record would make the file longer than is read."""
        line = manifest.line_bytes(draft, self.checks[-1])
        marks = self._marks + safefile.count_marks(line)
        if self._ends[-1] + len(line) > MOST_BYTES or marks > MOST_MARKS:
            raise CheckpointError(
                f"{self.folder.what(MANIFEST)}: is as long as it may become; begin another run, "
                "with less in info"
            )

    def append(self, record: Record) -> None:
        """Put a line after the last one that counts. After an exception it is not there, as far as
        the system still obeys."""
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

    def _add(self, record: Record, line: bytes) -> None:
        self.records.append(record)
        self.known[record.kind, record.name] = record
        self._ends.append(self._ends[-1] + len(line))
        self.checks.append(manifest.check_of_line(line))
        self._marks += safefile.count_marks(line)
        self.torn = 0

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        return fs.open_file(MANIFEST, flags, folder=self.folder.root)

    def _cut_at(self, handle: int, end: int) -> None:
        """Cut off what stands after the last line that counts. Synced by itself: if the next line
        reached the disk and the cut did not, the end of what was there would follow it."""
        size = fs.stat(handle).st_size
        if size < end:
            raise CheckpointError(
                f"{self.folder.what(MANIFEST)}: was cut by someone else to {size} bytes; open it "
                "again"
            )
        if size > end:
            fs.truncate(handle, end)
            fs.sync(handle)
