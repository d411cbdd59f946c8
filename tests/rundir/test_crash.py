"""A run resumes to the same result after a kill, a failing or full disk, or loss of power."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import Counter, failing, installed, refusal

from lobs_native.errors import CheckpointError
from lobs_native.files import fs
from lobs_native.rundir import directory as rundir
from lobs_native.rundir.directory import RunDirectory
from stress import crash
from stress.forks import Forks

LAYERS = 3


@pytest.fixture(autouse=True, scope="module")
def _preloaded(forks: Forks) -> None:
    forks.preload("stress.crash")


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    path = tmp_path_factory.mktemp("right") / "run"
    crash.work(path, LAYERS, lambda name: None)
    return crash.files(path)


def finish(path: Path) -> list[str]:
    """Resume a run to its end. Returns the layers that were computed."""
    computed: list[str] = []
    crash.work(path, LAYERS, computed.append)
    with RunDirectory.open(path, write=False) as run:
        assert run.check() == []
    return computed


# ---- kills ---------------------------------------------------------------------------------------


def test_kills_lose_nothing_that_was_acknowledged(in_memory, forks, record_property):
    count = int(os.environ.get("LOBS_KILLS", "200"))
    counts = crash.kills(count, in_memory, forks)
    record_property("found", counts)
    print(counts)
    assert counts["kills"] == count
    assert counts["runs completed"] > 0
    assert counts["lost"] == counts["damaged"] == counts["other bytes than undisturbed"] == 0


def test_a_process_that_ends_at_any_call_is_recovered_from(in_memory, forks, right):
    for k in range(1, 1000):
        path = in_memory / f"run {k}"
        child = crash.Child(forks, path=path, layers=LAYERS, exit_at=k)
        code = child.wait()
        assert code in {0, crash.KILLED}
        assert crash.acknowledged_are_there(path, child.messages) == (0, 0)
        computed = finish(path)
        assert set(child.messages) & set(computed) == set(), "nothing is computed twice"
        assert crash.files(path) == right
        if code == 0:
            break
        shutil.rmtree(path)
    print(f"{k - 1} calls at which the process ended")
    assert 100 < k < 999


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EDQUOT, None], ids=str)
def test_a_failure_of_any_call_is_a_clean_error_and_the_run_resumes(in_memory, right, fault):
    """With fault None, a write accepts half of its bytes, which is not a failure."""
    errors = 0
    for k in range(1, 1000):
        path = in_memory / f"run {k}"
        counter = Counter(k, None if fault is None else failing(fault))
        acknowledged: list[str] = []
        with installed(counter):
            message = refusal(lambda: crash.work(path, LAYERS, acknowledged.append))  # noqa: B023
        if message is not None:
            errors += 1
            assert fault is not None
            assert f"run {k}" in message
            assert os.strerror(fault) in message
            if fault in {errno.ENOSPC, errno.EDQUOT} and "written" in message:
                assert "free some space" in message
        left = [str(p) for p in in_memory.rglob(".*.tmp")]
        assert not left or counter.calls[k - 1] == "unlink"
        assert crash.acknowledged_are_there(path, acknowledged) == (0, 0)
        finish(path)
        assert crash.files(path) == right
        if not counter.fired:
            break
        shutil.rmtree(path)
    print(f"{k - 1} calls that failed, {errors} errors")
    assert 100 < k < 999
    assert errors == 0 if fault is None else errors > k / 2


def test_the_same_object_can_be_used_after_a_failure(in_memory):
    """Remains of the failed commit in the manifest do not precede the next line."""
    for k in range(1, 100):
        path = in_memory / f"run {k}"
        with RunDirectory.create(path, {}) as run:
            run.commit("first", crash.tensors(0))
            counter = Counter(k, failing(errno.EIO))
            with installed(counter):
                message = refusal(lambda: run.commit("x" * 1000, crash.tensors(1)))
            assert [r.seq for r in run.records] == ([0] if message else [0, 1])
            run.commit("y", crash.tensors(2))
        with RunDirectory.open(path, write=False) as run:
            assert run.find("y") is not None
            assert run.messages == []
            assert all(p.seq is None for p in run.check())
        if not counter.fired:
            break
    assert 10 < k < 99


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_space(small_disk):
    path = small_disk / "run"
    weights = {"w": torch.ones(1 << 18)}  # 1 MB
    with RunDirectory.create(path, {}) as run:
        message = None
        for i in range(5):
            message = message or refusal(lambda: run.commit(f"layer.{i}", weights))  # noqa: B023
        assert message is not None
        done = len(run.records)
        assert 2 <= done <= 3
        size = run.records[0].size
        found = re.search(
            r"run/(\w+)/.* \((\d+) bytes\): No space .*\((\d+) bytes are free", message
        )
        assert found is not None, message
        assert found[1] == rundir.LAYERS
        assert int(found[2]) == size > int(found[3])
        assert not list(path.rglob(".*.tmp"))
        assert run.check() == []
        for record in run.records:
            assert torch.equal(run.load(record)["w"], weights["w"])
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        for i in range(done, 5):
            run.commit(f"layer.{i}", weights)
        assert run.check() == []


def test_a_disk_that_is_mounted_read_only_can_be_read(small_disk):
    path = small_disk / "run"
    with RunDirectory.create(path, {}) as run:
        run.commit("a", crash.tensors(0))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match="LOCK: could not be written: Read-only file system"):
        RunDirectory.open(path, write=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        RunDirectory.create(small_disk / "other", {})
    with RunDirectory.open(path, write=False) as run:
        assert run.check() == []


def test_exceeding_a_limit_on_file_size_is_a_clean_error(in_memory, forks, right):
    path = in_memory / "run"
    child = crash.Child(forks, path=path, layers=LAYERS, largest_file=400)
    assert child.wait() == crash.FAILED
    assert "layers/00000" in child.messages[-1] or "state/" in child.messages[-1]
    assert os.strerror(errno.EFBIG) in child.messages[-1]
    assert not list(path.rglob(".*.tmp"))
    finish(path)
    assert crash.files(path) == right


# ---- another process -----------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_dead(in_memory, forks):
    path = in_memory / "run"
    RunDirectory.create(path, {}).close()
    child = crash.Child(forks, path=path, hold=60)
    assert child.hear() == "held"
    with pytest.raises(CheckpointError, match=f"process {child.pid} on {os.uname().nodename}"):
        RunDirectory.open(path, write=True)
    RunDirectory.open(path, write=False).close()
    child.process.kill()
    assert child.wait() == -9
    with RunDirectory.open(path, write=True) as run:
        (message,) = run.messages
        assert f"process {child.pid} on {os.uname().nodename}" in message
        assert "taken over" in message


# ---- loss of power -------------------------------------------------------------------------------


class Inode:
    """A file or folder: what the system sees, what is certainly on the disk, and the changes in
    between, any of which may be on the disk."""

    def __init__(self) -> None:
        self.data = self.synced_data = b""
        self.names: dict[str, Inode] = {}
        self.synced_names: dict[str, Inode] = {}
        self.pending: list[tuple[Any, ...]] = []

    def change(self, *what: Any) -> None:
        self.pending.append(what)

    def sync(self) -> None:
        self.synced_data, self.synced_names = self.data, dict(self.names)
        self.pending = []

    def on_disk(self, keep: Callable[[], str]) -> tuple[bytes, dict[str, Inode]]:
        """What a power cut leaves. ``keep`` returns "yes", "no" or "half" for each change."""
        data, names = self.synced_data, dict(self.synced_names)
        for what, *more in self.pending:
            kept = keep()
            if kept == "no":
                continue
            if what == "write":
                place, piece = more
                piece = piece if kept == "yes" else piece[: len(piece) // 2]
                data = data.ljust(place, b"\0")[:place] + piece + data[place + len(piece) :]
            elif what == "truncate":
                data = data[: more[0]]
            else:
                names.pop(more[0], None)
                if what != "unlink":
                    names[more[-2]] = more[-1]
        return data, names


class Ended(BaseException):
    """The process has ended: no cleanup happens."""


class Recorder:
    """A replacement for ``fs.call`` that makes every call and tracks what a power cut would leave.

    It reads the standard as strictly as possible: contents are on the disk after fsync of the file,
    and a name after fsync of the folder. Until then each change may be there or not, independently
    of the others, and a write may be there by half.
    """

    WRITING = frozenset({"write", "truncate", "fsync", "fsync_folder", "rename", "unlink", "open"})

    def __init__(self, top: Path, generator: random.Random) -> None:
        self.top, self.root, self.generator = top, Inode(), generator
        self.open: dict[int, Inode] = {}
        self.left = -1  # calls until the process ends
        self.acknowledged: list[str] = []
        self.cuts: dict[tuple[tuple[str, bytes | None], ...], tuple[list[str], bool]] = {}

    def __call__(self, operation: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if operation == "close":
            self.open.pop(args[0], None)
            return function(*args, **kw)
        if self.left == 0:
            raise Ended
        self.left -= 1
        if operation in self.WRITING:
            self.cut_the_power()
        result = function(*args, **kw)
        known = getattr(self, f"on_{operation}", None)
        if operation == "make_folder":
            where = getattr(function, "__self__", None)  # of Path.mkdir
            name = where if isinstance(where, Path) else args[0]
            self.on_open(None, name, dir_fd=kw.get("dir_fd"))
        elif known is not None:
            known(result, *args, **kw)
        return result

    def folder(self, name: Any, dir_fd: int | None) -> Inode | None:
        """The folder that contains a name, if it is below ``top``."""
        if dir_fd is not None:
            return self.open[dir_fd]
        return self.root if Path(name).parent == self.top else None

    def on_open(self, handle: int | None, name: Any, *_: Any, dir_fd: int | None) -> None:
        folder, last = self.folder(name, dir_fd), Path(name).name
        inode = self.root if name == self.top else folder and folder.names.get(last)
        if inode is None and folder is not None:
            inode = folder.names[last] = Inode()
            folder.change("enter", last, last, inode)
        if handle is not None and inode is not None:
            self.open[handle] = inode

    def on_write(self, count: int, handle: int, data: memoryview) -> None:
        inode, piece = self.open[handle], bytes(data[:count])
        inode.change("write", len(inode.data), piece)  # all files are written to at their end
        inode.data += piece

    def on_truncate(self, _: None, handle: int, size: int) -> None:
        self.open[handle].change("truncate", size)
        self.open[handle].data = self.open[handle].data[:size]

    def on_fsync(self, _: None, handle: int) -> None:
        self.open[handle].sync()

    on_fsync_folder = on_fsync

    def on_rename(self, _: None, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        folder = self.open[src_dir_fd]
        folder.names[new] = folder.names.pop(old)
        folder.change("rename", old, new, folder.names[new])

    def on_unlink(self, _: None, name: str, *, dir_fd: int) -> None:
        del self.open[dir_fd].names[name]
        self.open[dir_fd].change("unlink", name)

    def cut_the_power(self) -> None:
        """Record what a power cut now could leave: none and all of the changes that are not synced,
        every subset of up to six changes, and 16 random choices."""
        changes: list[None] = []
        self.note(lambda: changes.append(None) or "yes", True)
        self.note(lambda: "no", True)
        if len(changes) <= 6:
            for choice in range(1 << len(changes)):
                bits = iter(f"{choice:0{len(changes) + 1}b}")
                self.note(lambda: "yes" if next(bits, "0") == "1" else "no", False)  # noqa: B023
        for _ in range(16):
            self.note(lambda: self.generator.choice(["yes", "no", "half"]), False)

    def note(self, keep: Callable[[], str], extreme: bool) -> None:
        found: list[tuple[str, bytes | None]] = []

        def visit(inode: Inode, place: str) -> None:
            data, names = inode.on_disk(keep)
            if not place or ("." not in place.rpartition("/")[2] and place[-4:] != "LOCK"):
                found.append((place, None))  # folders here have no dot in their names, files have
            else:
                found.append((place, data))
            for name in sorted(names):
                visit(names[name], f"{place}/{name}")

        visit(self.root, "")
        known = self.cuts.get(tuple(found))
        # The same disk must satisfy the longest list of acknowledgements.
        acknowledged = max(self.acknowledged, known[0] if known else [], key=len)
        self.cuts[tuple(found)] = list(acknowledged), extreme or bool(known and known[1])


def restore(folder: Path, tree: tuple[tuple[str, bytes | None], ...]) -> None:
    for place, data in tree:
        if data is None:
            (folder / place[1:]).mkdir(exist_ok=True)
        else:
            (folder / place[1:]).write_bytes(data)


def recorded(top: Path, generator: random.Random, killed_at: int) -> Recorder:
    """A run with every moment recorded, killed once and resumed unless ``killed_at`` is beyond
    its end."""
    recorder = Recorder(top, generator)
    recorder.left = killed_at
    with installed(recorder):
        try:
            crash.work(top / "run", LAYERS, recorder.acknowledged.append)
        except Ended:
            recorder.left = -1
            for handle in list(recorder.open):
                fs.close(handle)
            crash.work(top / "run", LAYERS, recorder.acknowledged.append)
    return recorder


def test_power_may_fail_at_any_moment(in_memory, right):
    generator = random.Random(0)
    cuts: dict[Any, tuple[list[str], bool]] = {}
    for trial, killed_at in enumerate([10_000, *generator.sample(range(40, 250), 12)]):
        top = in_memory / f"recorded {trial}"
        top.mkdir()
        recorder = recorded(top, generator, killed_at)
        assert crash.files(top / "run") == right
        for tree, (acknowledged, extreme) in recorder.cuts.items():
            known = cuts.get(tree, ([], False))
            cuts[tree] = max(acknowledged, known[0], key=len), extreme or known[1]
    extremes = [tree for tree, (_, extreme) in cuts.items() if extreme]
    others = [tree for tree, (_, extreme) in cuts.items() if not extreme]
    chosen = generator.sample(extremes, min(300, len(extremes)))
    chosen += generator.sample(others, min(500, len(others)))
    for i, tree in enumerate(chosen):
        top = in_memory / f"cut {i}"
        top.mkdir()
        restore(top, tree)
        acknowledged, _ = cuts[tree]
        assert crash.acknowledged_are_there(top / "run", acknowledged) == (0, 0)
        finish(top / "run")
        assert crash.files(top / "run") == right
        shutil.rmtree(top)
    print(f"{len(chosen)} power cuts of {len(cuts)} different ones")
    assert len(chosen) == 800


@pytest.mark.parametrize("missing", ["fsync", "fsync_folder"])
def test_the_model_of_power_loss_detects_a_missing_sync(in_memory, missing, monkeypatch):
    """The test above would prove little if it could not fail."""
    recorder_sync = getattr(Recorder, f"on_{missing}")
    assert recorder_sync is not None
    monkeypatch.setattr(Recorder, f"on_{missing}", lambda *_: None)
    recorder = recorded(in_memory, random.Random(0), 10_000)
    lost = 0
    for i, (tree, (acknowledged, _)) in enumerate(recorder.cuts.items()):
        top = in_memory / f"cut {i}"
        top.mkdir()
        restore(top, tree)
        try:
            lost += crash.acknowledged_are_there(top / "run", acknowledged) != (0, 0)
        except CheckpointError:
            lost += 1
        shutil.rmtree(top)
        if lost:
            break
    assert lost


# ---- damage --------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_cut_is_detected_and_named(in_memory, right):
    """1,000 positions in each file; every tenth is followed by a repair and a run to the end."""
    path = in_memory / "run"
    with RunDirectory.create(path, {"config": {"layers": LAYERS}}) as run:
        for i in range(LAYERS):
            run.commit(f"layer.{i}", crash.tensors(i), {"error": i / 4})
        run.put_state("sums", crash.tensors(9), {"i": 1})
    whole = crash.files(path)
    generator = random.Random(0)
    counts = {"flips": 0, "cuts": 0, "repairs": 0}
    for name, data in whole.items():
        for trial in range(1000):
            place = generator.randrange(len(data))
            if trial % 4 == 3:
                changed, kind = data[:place], "cuts"
            else:
                flipped = data[place] ^ 1 << generator.randrange(8)
                changed, kind = data[:place] + bytes([flipped]) + data[place + 1 :], "flips"
            (path / name).write_bytes(changed)
            counts[kind] += 1
            assert name in messages_about(path), (name, place, kind)
            if trial % 10 == 0 and name != rundir.HEADER:
                counts["repairs"] += 1
                with RunDirectory.open(path, write=True, repair=True) as run:
                    assert run.messages
                    assert run.check() == []
                    run.drop_state("sums")
                finish(path)
                assert crash.files(path) == right
                for other, content in whole.items():
                    (path / other).write_bytes(content)
        (path / name).write_bytes(data)
        assert messages_about(path) == ""
    print(counts)
    assert counts["flips"] + counts["cuts"] == 1000 * len(whole) == 7000


def messages_about(path: Path) -> str:
    """All messages of opening the run read-only and checking it."""
    try:
        with RunDirectory.open(path, write=False) as run:
            return " ".join([*run.messages, *map(str, run.check())])
    except CheckpointError as error:
        return str(error)
