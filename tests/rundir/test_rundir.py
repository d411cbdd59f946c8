"""A run's folder: what is committed stays, what is damaged is found, and one process writes."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import Counter, failing, installed, refusal
from safetensors.torch import load_file
from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError, DtypeError
from lobs_native.files import safefile
from lobs_native.rundir import directory as rundir
from lobs_native.rundir.directory import RunDirectory

HEADER: dict[str, Any] = {
    "config": {"sparsity": 0.5, "method": "exact", "damping": [0.01, 0.1]},
    "fingerprints": {"model": "0123", "layers": {"fc1": [[3, 4], "float32"]}},
    "versions": {"lobs_native": "0.1.0", "torch": "2.13.0"},
}
NAMES = ["encoder.0.fc1", "encoder.0.fc2", "näme with / and \n", ""]


def layer(i: int) -> dict[str, Tensor]:
    weight = torch.arange(12.0).reshape(3, 4) + i
    return {"weight": weight, "mask": weight % 2 == 0}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    """Of the many commits here, each would wait for the disk."""
    return in_memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


@pytest.fixture
def filled(path: Path) -> Path:
    """A run of four records and a state, closed."""
    with RunDirectory.create(path, HEADER) as run:
        for i, name in enumerate(NAMES):
            run.commit(name, layer(i), {"error": 0.5 * i})
        run.put_state("hidden", {"h": torch.ones(5)}, {"batch": 3})
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != rundir.LOCK
    }


def lines(folder: Path) -> list[bytes]:
    return (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# ---- what is written is read again ---------------------------------------------------------------


def test_what_is_committed_is_read_again(filled):
    with RunDirectory.open(filled, write=False) as run:
        assert run.header == HEADER
        assert [r.name for r in run.records] == NAMES
        assert [r.seq for r in run.records] == [0, 1, 2, 3]
        for i, record in enumerate(run.records):
            assert record.kind == "layer"
            assert record.info == {"error": 0.5 * i}
            assert same(run.load(record), layer(i))
        state = run.state("hidden")
        assert state is not None
        assert same(state[0], {"h": torch.ones(5)})
        assert state[1] == {"batch": 3}
        assert run.check() == []
        assert run.messages == []


def test_the_files_are_what_they_are_said_to_be(filled):
    """The layout that other tools may rely on."""
    for i, (line, name) in enumerate(zip(lines(filled), NAMES, strict=True)):
        entry = json.loads(line)
        digest = hashlib.sha256(name.encode()).hexdigest()
        assert entry["file"] == f"layers/{i:05d}-{digest[:12]}.safetensors"
        data = (filled / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert same(load_file(filled / entry["file"]), layer(i))
        assert list(entry) == [
            *("seq", "kind", "name", "file", "bytes", "sha256", "info", "prev", "check")
        ]
    checks = [json.loads((filled / "run.json").read_bytes())["check"]]
    for line in lines(filled):
        entry = json.loads(line)
        assert entry["prev"] == checks[-1]
        checks.append(entry["check"])
        stem, _, rest = line.rpartition(b',"check":"')
        assert hashlib.sha256(stem).hexdigest() == entry["check"]
        assert rest == entry["check"].encode() + b'"}\n'
    header = json.loads((filled / "run.json").read_bytes())
    assert list(header) == ["format", *HEADER, "check"]
    assert header["format"] == 1
    assert sorted(p.name for p in filled.iterdir()) == [
        *("LOCK", "layers", "manifest.jsonl", "run.json", "state")
    ]


def test_a_run_goes_on_where_it_stopped(path):
    with RunDirectory.create(path, HEADER) as run:
        first = run.commit("a", layer(0))
    with RunDirectory.open(path, write=True) as run:
        assert run.messages == []
        assert run.records == (first,)
        assert run.find("a") == first
        assert run.find("b") is None
        assert run.find("a", kind="other") is None
        second = run.commit("a", layer(1), kind="other")
        assert run.find("a", kind="other") == second
        assert run.records == (first, second)
    with RunDirectory.open(path, write=False) as run:
        assert run.records == (first, second)
        assert run.check() == []


def test_the_order_is_the_one_that_survives(path):
    with RunDirectory.create(path, HEADER) as run:
        counter = Counter()
        with installed(counter):
            run.commit("a", {"w": torch.ones(3)})
        quiet = {"open", "close", "stat"}
        assert [c for c in counter.calls if c not in quiet] == [
            *("write", "write", "fsync", "rename", "fsync_folder"),
            *("write", "fsync"),
        ]
        run.put_state("s", {"w": torch.ones(3)})
        counter = Counter()
        with installed(counter):
            run.put_state("s", {"w": torch.zeros(3)})
        quiet |= {"listing"}
        assert [c for c in counter.calls if c not in quiet] == [
            *("write", "write", "fsync", "rename", "fsync_folder"),
            *("write", "fsync", "rename", "fsync_folder"),
            "unlink",
        ]


def test_the_same_work_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        with RunDirectory.create(tmp_path / name, HEADER) as run:
            for i in range(3):
                run.commit(f"layer {i}", layer(i), {"i": i})
                run.put_state("s", layer(i))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_tensors_that_are_read_are_the_readers_own(filled):
    with RunDirectory.open(filled, write=False) as run:
        found = run.load(run.records[0])
        found["weight"].zero_()
        assert same(run.load(run.records[0]), layer(0))


def test_info_is_kept_as_json(path):
    with RunDirectory.create(path, HEADER) as run:
        record = run.commit("a", layer(0), {"shape": (3, 4), "notes": ["ä"], "none": None})
        assert record.info == {"shape": [3, 4], "notes": ["ä"], "none": None}
    with RunDirectory.open(path, write=False) as run:
        assert run.records == (record,)


def test_one_copy_of_a_layer_is_held_while_it_is_read(path):
    """Measured in another process, where nothing else has used the memory before."""
    code = f"""if True:
        import resource, torch
        from pathlib import Path
        from lobs_native.rundir.directory import RunDirectory
        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) << 10
        run = RunDirectory.create({str(path)!r}, {{}})
        weight = torch.ones(8 << 20)
        size = weight.nbytes
        before = peak()
        record = run.commit("a", {{"w": weight, "m": weight[:100]}})
        written = peak() - before
        found = run.load(record)
        print(written / size, (peak() - before) / size)
    """
    run = subprocess.run(
        ["nice", "python", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    written, read = map(float, run.stdout.split())
    assert written < 0.2
    assert read < 1.2


def environment() -> dict[str, str]:
    import sys

    package = str(Path(rundir.__file__).parents[2])
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PYTHONPATH": package, "PATH": f"{folder}:{os.environ['PATH']}"}


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"format": 2}, "header: 'format' is written by the run itself"),
        ({"check": ""}, "header: 'check' is written by the run itself"),
        ({"a": float("nan")}, "header: cannot be kept as JSON"),
        ({"a": Path("x")}, "header: cannot be kept as JSON"),
        ([1], "header: must be a dict"),
        ({"a": "x" * (16 << 20)}, "header: makes a run.json of 16777\\d+ bytes; more than"),
        ({"a": [0] * 500_001}, "header: holds about 500\\d+ values"),
    ],
)
def test_a_header_that_could_not_be_read_again_is_refused(path, header, said):
    with pytest.raises(ArgumentError, match=said):
        RunDirectory.create(path, header)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"name": 3}, ArgumentError, "name: 3 is no name"),
        ({"name": "\ud800"}, ArgumentError, "name: .* is no name"),
        ({"name": "x" * 1001}, ArgumentError, "name: .* is no name"),
        ({"kind": "A b"}, ArgumentError, "kind: 'A b'"),
        ({"info": {"a": float("inf")}}, ArgumentError, "info: cannot be kept as JSON"),
        ({"info": [1]}, ArgumentError, "info: must be a dict"),
        ({"info": {"a": "x" * (1 << 20)}}, ArgumentError, "info: .* more than 1048576 bytes"),
        ({"info": {"a": [0] * 30_000}}, ArgumentError, "info: holds about 3\\d+ values"),
        ({"tensors": {"a": 3}}, DtypeError, "tensors\\['a'\\]"),
        ({"tensors": {3: torch.ones(1)}}, ArgumentError, "tensors: 3 is no name"),
        ({"name": "there"}, ArgumentError, "name: layer 'there' is committed already"),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_changes(path, change, error, said):
    with RunDirectory.create(path, HEADER) as run:
        run.commit("there", layer(0))
        before = tree(path)
        arguments = {"name": "new", "tensors": layer(1), "info": {}, "kind": "layer", **change}
        name, tensors, info = (arguments.pop(k) for k in ("name", "tensors", "info"))
        with pytest.raises(error, match=said):
            run.commit(name, tensors, info, **arguments)
        assert tree(path) == before
        if "kind" not in change and change.get("name") != "there":
            with pytest.raises(error, match=said.replace("name:", "key:")):
                run.put_state(name, tensors, info)
            assert tree(path) == before


def test_a_run_is_created_once(filled):
    before = tree(filled)
    with pytest.raises(ArgumentError, match="holds a run already; open it, or name another folder"):
        RunDirectory.create(filled, HEADER)
    assert tree(filled) == before


def test_a_run_is_not_created_in_the_place_of_a_file(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(ArgumentError, match=r"thesis\.txt: not a folder; name one that is empty"):
        RunDirectory.create(file, HEADER)
    assert file.read_text() == "years of work"


def test_a_run_is_not_created_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match=r"holds other things \('thesis.txt'\)"):
        RunDirectory.create(tmp_path, HEADER)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_parts_of_a_run_without_run_json_are_not_reused(filled):
    (filled / "run.json").unlink()
    before = tree(filled)
    with pytest.raises(ArgumentError, match=r"holds parts of a run .* but no run\.json"):
        RunDirectory.create(filled, HEADER)
    assert tree(filled) == before


def test_what_is_not_a_run_is_not_opened(tmp_path):
    for write in (False, True):
        with pytest.raises(CheckpointError, match="no/where: is no folder"):
            RunDirectory.open(tmp_path / "no" / "where", write=write)
        with pytest.raises(CheckpointError, match=r"run\.json: is missing.*create"):
            RunDirectory.open(tmp_path, write=write)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is no folder"):
        RunDirectory.open(tmp_path / "file", write=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "nothing was written"


def test_a_run_opened_to_read_cannot_be_changed(filled):
    before = tree(filled)
    with RunDirectory.open(filled, write=False) as run:
        for action in (
            lambda: run.commit("x", layer(0)),
            lambda: run.put_state("x", layer(0)),
            lambda: run.drop_state("hidden"),
            run.repair,
        ):
            with pytest.raises(ArgumentError, match="was opened to read only"):
                action()
    assert tree(filled) == before


def test_a_run_that_is_closed_says_so(filled):
    run = RunDirectory.open(filled, write=True)
    record = run.records[0]
    run.close()
    run.close()
    for action in (
        lambda: run.commit("x", layer(0)),
        lambda: run.load(record),
        lambda: run.state("hidden"),
        run.check,
        run.free_bytes,
    ):
        with pytest.raises(ArgumentError, match="is closed; open it again"):
            action()


def test_no_descriptor_is_left_open(filled, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    RunDirectory.open(filled, write=True).close()
    with pytest.raises(ArgumentError):
        RunDirectory.create(filled, HEADER)
    flip(filled / "run.json", 20)
    with pytest.raises(CheckpointError):
        RunDirectory.open(filled, write=True)
    with pytest.raises(CheckpointError):
        RunDirectory.open(filled, write=False)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- state ---------------------------------------------------------------------------------------


def test_a_state_is_replaced_and_dropped(path):
    with RunDirectory.create(path, HEADER) as run:
        assert run.state("s") is None
        for i in range(3):
            run.put_state("s", layer(i), {"i": i})
            run.put_state("s", layer(i), {"i": i})  # the same content
            found = run.state("s")
            assert found is not None
            assert same(found[0], layer(i))
            assert found[1] == run.state_info("s") == {"i": i}
            assert len(list((path / "state").iterdir())) == 2, "one file and its record"
        run.put_state("another/key \n", layer(9))
        assert run.state_keys() == ["another/key \n", "s"]
        run.drop_state("s")
        run.drop_state("s")
        assert run.state("s") is None
        assert run.state_info("s") is None
        assert run.state_keys() == ["another/key \n"]
        assert run.state("another/key \n") is not None
        assert len(list((path / "state").iterdir())) == 2
        assert run.check() == []


def test_a_state_lives_on_after_later_commits(path):
    with RunDirectory.create(path, HEADER) as run:
        run.put_state("s", layer(0))
        run.commit("a", layer(1))
    with RunDirectory.open(path, write=True) as run:
        assert run.messages == []
        assert run.state("s") is not None


def test_a_state_that_follows_records_which_are_gone_is_dropped(path):
    with RunDirectory.create(path, HEADER) as run:
        run.put_state("early", layer(0))
        run.commit("a", layer(1))
        run.put_state("late", layer(2))
    (path / "manifest.jsonl").write_bytes(b"")
    with RunDirectory.open(path, write=False) as run:
        assert run.state("late") is None
        assert run.state("early") is not None
        assert any("follows 1 records" in p.what for p in run.check())
    with RunDirectory.open(path, write=True) as run:
        assert run.messages == [
            "state 'late': dropped: it follows 1 records, of which some are gone"
        ]
        assert len(list((path / "state").iterdir())) == 2


def test_what_an_interrupted_put_state_leaves_is_removed(path):
    with RunDirectory.create(path, HEADER) as run:
        run.put_state("s", layer(0))
        (old,) = (path / "state").glob("*.safetensors")
        stray = old.with_name(old.name[:17] + "0" * 16 + ".safetensors")
        stray.write_bytes(b"")
        other = old.with_name("1" * 16 + "-" + "0" * 16 + ".safetensors")
        other.write_bytes(b"")
        assert {p.file for p in run.check()} == {f"state/{stray.name}", f"state/{other.name}"}
    with RunDirectory.open(path, write=True) as run:
        assert len(run.messages) == 2
        assert run.check() == []
        assert run.state("s") is not None


def test_a_damaged_state_is_an_error_until_it_is_dropped(filled):
    for suffix in ("safetensors", "json"):
        (file,) = (filled / "state").glob(f"*.{suffix}")
        with RunDirectory.open(filled, write=True) as run:
            flip(file, 30)
            with pytest.raises(
                CheckpointError, match=f"{file.name}.*repair the run, or drop the state"
            ):
                run.state("hidden")
            assert run.check()[0].file == f"state/{file.name}"
            run.drop_state("hidden")
            assert run.state("hidden") is None
            assert run.check() == []
            run.put_state("hidden", layer(0))


# ---- reading with expectations -------------------------------------------------------------------


def test_what_is_expected_is_checked(filled):
    good = {"weight": ((3, 4), torch.float32), "mask": ((3, 4), torch.bool)}
    with RunDirectory.open(filled, write=False) as run:
        assert same(run.load(run.records[1], good), layer(1))
        with pytest.raises(CheckpointError, match=r"'weight' is F32 \(3, 4\), not F32 \(4, 3\)"):
            run.load(run.records[1], {**good, "weight": ((4, 3), torch.float32)})
        with pytest.raises(CheckpointError, match=r"lacks 'hidden' and has 'h'"):
            run.state("hidden", {"hidden": ((5,), torch.float32)})


def test_a_file_larger_than_what_is_expected_is_not_read(path):
    with RunDirectory.create(path, HEADER) as run:
        record = run.commit("a", {"w": torch.ones(100_000)})
        counter = Counter()
        with (
            installed(counter),
            pytest.raises(CheckpointError, match=r"has 4000\d\d bytes, but what is expected"),
        ):
            run.load(record, {"w": ((10,), torch.float32)})
        assert "read_into" not in counter.calls


# ---- damage --------------------------------------------------------------------------------------


def damaged_layer(seq: int, how: str):
    def change(folder: Path) -> None:
        (file,) = (folder / "layers").glob(f"{seq:05d}-*")
        if how == "flip":
            flip(file)
        elif how == "cut":
            os.truncate(file, file.stat().st_size - 1)
        elif how == "grow":
            os.truncate(file, file.stat().st_size + 1)
        elif how == "zero":
            file.write_bytes(bytes(file.stat().st_size))
        else:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "link":
                file.symlink_to("nowhere")
            elif how == "pipe":
                os.mkfifo(file)

    return change


@pytest.mark.parametrize("seq", [0, 2, 3])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flip", "has another sha256 than its record says"),
        ("zero", "has another sha256 than its record says"),
        ("cut", "bytes, its record says"),
        ("grow", "bytes, its record says"),
        ("unlink", "is missing"),
        ("folder", "is a folder"),
        ("link", "is a link"),
        ("pipe", "is a pipe"),
    ],
)
def test_a_damaged_file_is_named_and_repaired(filled, seq, how, said):
    damaged_layer(seq, how)(filled)
    with RunDirectory.open(filled, write=True) as run:
        record = run.records[seq]
        with pytest.raises(CheckpointError, match=f"{record.file}: .*{said}.*repair"):
            run.load(record)
        (problem,) = run.check()
        assert problem.file == record.file
        assert problem.seq == seq
        assert said in problem.what
        assert str(problem) == f"{problem.file}: {problem.what}"
        done = run.repair()
        assert [r.seq for r in run.records] == list(range(seq))
        assert f"record {seq}" in done[0]
        assert any("state 'hidden'" in line for line in done)
        if how == "folder":
            assert f"{record.file}: left: it is a folder; remove it yourself" in done
            (filled / record.file).rmdir()
        assert run.check() == []
        assert run.repair() == []
        for i in range(seq, 4):
            run.commit(NAMES[i], layer(i), {"error": 0.5 * i})
        run.put_state("hidden", {"h": torch.ones(5)}, {"batch": 3})
        repaired = tree(filled)
    with RunDirectory.create(filled.parent / "anew", HEADER) as run:
        for i, name in enumerate(NAMES):
            run.commit(name, layer(i), {"error": 0.5 * i})
        run.put_state("hidden", {"h": torch.ones(5)}, {"batch": 3})
    assert repaired == tree(filled.parent / "anew")


def test_a_torn_last_line_does_not_count_and_is_cut_off(filled):
    whole = (filled / "manifest.jsonl").read_bytes()
    last = len(lines(filled)[-1])
    for torn in (1, last // 2, last - 1):
        (filled / "manifest.jsonl").write_bytes(whole[: len(whole) - last + torn])
        with RunDirectory.open(filled, write=False) as run:
            assert len(run.records) == 3
            assert f"manifest.jsonl: line 4 was never finished ({torn} bytes)" in run.messages[0]
            assert "manifest.jsonl" in {p.file for p in run.check()}
        with RunDirectory.open(filled, write=True) as run:
            run.commit(NAMES[3], layer(3), {"error": 1.5})
        assert (filled / "manifest.jsonl").read_bytes() == whole


def shuffled(found: list[bytes]) -> list[bytes]:
    return [found[1], found[0], *found[2:]]


def replayed(found: list[bytes]) -> list[bytes]:
    return [*found, found[1]]


def without_one(found: list[bytes]) -> list[bytes]:
    return [found[0], *found[2:]]


def blank(found: list[bytes]) -> list[bytes]:
    return [found[0], b"\n", *found[1:]]


def flipped(found: list[bytes]) -> list[bytes]:
    return [found[0], found[1].replace(b'"error":0.5', b'"error":0.4'), *found[2:]]


@pytest.mark.parametrize(
    ("change", "line"),
    [(shuffled, 1), (replayed, 5), (without_one, 2), (blank, 2), (flipped, 2)],
)
def test_a_manifest_that_is_not_what_was_written_is_refused_by_line(filled, change, line):
    (filled / "manifest.jsonl").write_bytes(b"".join(change(lines(filled))))
    with pytest.raises(CheckpointError, match=rf"manifest\.jsonl: line {line}: .*repair"):
        RunDirectory.open(filled, write=False)
    with RunDirectory.open(filled, write=True, repair=True) as run:
        assert [r.seq for r in run.records] == list(range(min(line - 1, 4)))
        assert f"manifest.jsonl: line {line}: " in run.messages[0]
        assert run.check() == []
    with RunDirectory.open(filled, write=True) as run:
        assert run.messages == []


def test_a_manifest_of_another_run_is_refused(filled, path):
    other = path.parent / "other"
    with RunDirectory.create(other, {"config": 1}) as run:
        run.commit("a", layer(0))
    (filled / "manifest.jsonl").write_bytes((other / "manifest.jsonl").read_bytes())
    with pytest.raises(CheckpointError, match=r"line 1: does not follow run\.json"):
        RunDirectory.open(filled, write=False)


def test_a_manifest_cut_at_a_line_shows_by_the_files_that_it_lacks(filled):
    (filled / "manifest.jsonl").write_bytes(b"".join(lines(filled)[:2]))
    with RunDirectory.open(filled, write=True) as run:
        stray = [p for p in run.check() if p.file.startswith("layers/")]
        assert [p.file[:12] for p in stray] == ["layers/00002", "layers/00003"]
        assert "is not in the manifest" in stray[0].what
        run.commit(NAMES[2], layer(2))
        assert len(run.check()) == 1
        assert len(run.repair()) == 1
        assert run.check() == []


@pytest.mark.parametrize("name", ["manifest.jsonl", "layers", "state"])
def test_a_missing_part_is_named_and_made_again_by_repair(filled, name):
    import shutil

    (shutil.rmtree if (filled / name).is_dir() else os.unlink)(filled / name)
    for write in (False, True):
        with pytest.raises(CheckpointError, match=f"{name}: is missing.*repair"):
            RunDirectory.open(filled, write=write)
    with RunDirectory.open(filled, write=True, repair=True) as run:
        assert len(run.records) == (4 if name == "state" else 0)
        assert run.check() == []
        run.commit("new", layer(1))
        run.put_state("new", layer(1))


@pytest.mark.parametrize("name", ["layers", "state"])
def test_a_folder_that_is_a_link_is_refused(filled, name):
    (filled / name).rename(filled.parent / "elsewhere")
    (filled / name).symlink_to(filled.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a link or no folder"):
        RunDirectory.open(filled, write=True, repair=True)


def test_temporary_files_are_removed_by_the_next_writer(filled):
    strays = [f"{name}.0123abcd.tmp" for name in (".run.json", "layers/.00009-x", "state/.y")]
    (filled / ".mine.tmp").write_text("of someone else")
    for name in strays:
        (filled / name).write_text("half")
    with RunDirectory.open(filled, write=False) as run:
        assert sorted(p.file for p in run.check()) == sorted(strays)
    with RunDirectory.open(filled, write=True) as run:
        assert sorted(m.split(":")[0] for m in run.messages) == sorted(strays)
        assert run.check() == []
    assert (filled / ".mine.tmp").read_text() == "of someone else"


def test_files_of_others_are_named_and_left(filled):
    for name in ("layers/notes.txt", "state/\x1b[31m"):
        (filled / name).write_text("mine")
    with RunDirectory.open(filled, write=True) as run:
        said = [str(p) for p in run.check()]
        assert said == [
            "layers/notes.txt: is not in the manifest",
            "'state/\\x1b[31m': belongs to no state",
        ]
        left = ": left: no run has made it; remove it yourself"
        assert run.repair() == [said[1] + left, said[0] + left]
        assert (filled / "layers/notes.txt").read_text() == "mine"
        assert len(run.records) == 4


def test_a_header_from_the_future_is_refused_with_advice(filled):
    values = json.loads((filled / "run.json").read_bytes())
    for version in (2, 0, "1", None, 1.0, True):
        changed = {**values, "format": version}
        del changed["check"]
        (filled / "run.json").write_bytes(safefile.seal(changed, indent=1) + b"\n")
        with pytest.raises(
            CheckpointError, match=r"run\.json: has format .*reads format 1.*version"
        ):
            RunDirectory.open(filled, write=False)


# ---- comparison ----------------------------------------------------------------------------------


def test_nothing_differs_from_itself(filled):
    with RunDirectory.open(filled, write=False) as run:
        assert run.differences(HEADER) == []
        assert run.differences(copy.deepcopy(run.header)) == []
        assert (
            run.differences({**HEADER, "config": {**HEADER["config"], "damping": (0.01, 0.1)}})
            == []
        )


def changed_header(path: str, value: Any) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    *parents, last = path.split(".")
    inside: Any = header
    for key in parents:
        inside = inside[key]
    inside[last] = value
    return header


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (changed_header("config.sparsity", 0.7), "config.sparsity: 0.5 in the run, 0.7 now"),
        (
            changed_header("config.method", "sweep"),
            'config.method: "exact" in the run, "sweep" now',
        ),
        (changed_header("config.damping", [0.01]), "config.damping: 2 entries in the run, 1 now"),
        (changed_header("config.damping", [0.01, 1]), "config.damping[1]: 0.1 in the run, 1 now"),
        (
            changed_header("config.damping", 0.01),
            "config.damping: [0.01, 0.1] in the run, 0.01 now",
        ),
        (changed_header("config.sparsity", "0.5"), 'config.sparsity: 0.5 in the run, "0.5" now'),
        (changed_header("config.seed", 3), "config.seed: not in the run, 3 now"),
        (changed_header("config.seed", None), "config.seed: not in the run, null now"),
        (
            changed_header("fingerprints.layers.fc1", [[3, 4], "float16"]),
            'fingerprints.layers.fc1[1]: "float32" in the run, "float16" now',
        ),
        (
            changed_header("versions", {"torch": "2.13.0"}),
            'versions.lobs_native: "0.1.0" in the run, not now',
        ),
        (changed_header("versions.lobs_native", True), '"0.1.0" in the run, true now'),
        (
            {k: v for k, v in HEADER.items() if k != "config"},
            'config: {"sparsity": 0.5, "method": "exact", "da... in the run, not now',
        ),
    ],
)
def test_what_differs_is_listed_with_both_values(filled, header, said):
    with RunDirectory.open(filled, write=False) as run:
        (found,) = run.differences(header)
        assert said in found


def test_long_values_are_shortened_where_they_differ(path):
    long = "x" * 1000
    with RunDirectory.create(path, {"text": long + "abc"}) as run:
        (found,) = run.differences({"text": long + "abd"})
        assert len(found) < 200
        before, after = re.findall(r'\.\.\.x*(ab\w)"', found)
        assert (before, after) == ("abc", "abd")


def test_one_and_true_and_one_point_zero_differ(path):
    with RunDirectory.create(path, {"a": 1}) as run:
        assert run.differences({"a": True}) == ["a: 1 in the run, true now"]
        assert run.differences({"a": 1.0}) == ["a: 1 in the run, 1.0 now"]


# ---- one writer ----------------------------------------------------------------------------------


def test_a_second_writer_in_the_same_process_is_refused(filled):
    with (
        RunDirectory.open(filled, write=True),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()} on {os.uname().nodename}"),
    ):
        RunDirectory.open(filled, write=True)
    RunDirectory.open(filled, write=True).close()


def test_a_reader_needs_no_lock(filled):
    with RunDirectory.open(filled, write=True), RunDirectory.open(filled, write=False) as run:
        assert run.check() == []


def test_a_creation_takes_the_lock(path):
    with (
        RunDirectory.create(path, HEADER),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()} on"),
    ):
        RunDirectory.open(path, write=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"pid":4194305,"host":"HOST","since":"2026-01-02T03:04:05+00:00"}',
            "process 4194305 on [^ ]+ .since 2026-01-02T03:04:05",
        ),
        ('{"pid":7,"host":"elsewhere","since":"x"}', "process 7 on elsewhere.*another computer"),
        ("\x1b[31m" * 100, "an unknown process"),
        ('{"pid":"7","host":3,"since":[]}', "an unknown process"),
        ("[" * 10_000, "an unknown process"),
        ("x" * 10_000_000, "an unknown process"),
    ],
)
def test_a_lock_that_nobody_holds_is_taken_over_and_that_is_said(filled, content, said):
    (filled / "LOCK").write_text(content.replace("HOST", os.uname().nodename))
    with RunDirectory.open(filled, write=True) as run:
        (message,) = run.messages
        assert re.search(said, message)
        assert ("another computer" in message) == ("elsewhere" in content)
        assert message.isprintable()
    with RunDirectory.open(filled, write=True) as run:
        assert run.messages == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "LOCK: is a pipe"),
        (os.mkdir, "LOCK: .*Is a directory"),
        (lambda p: os.symlink("x", p), "LOCK: .*symbolic"),
    ],
)
def test_a_lock_that_is_no_file_is_refused(filled, make, said):
    (filled / "LOCK").unlink()
    make(filled / "LOCK")
    with pytest.raises(CheckpointError, match=said):
        RunDirectory.open(filled, write=True)


def test_a_forked_child_cannot_write(filled, monkeypatch):
    with RunDirectory.open(filled, write=True) as run:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ArgumentError, match="belongs to process"):
            run.commit("x", layer(0))
        monkeypatch.undo()
        run.commit("x", layer(0))


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["with space", "line\nbreak", "\N{SNOWMAN}" * 85, "n" * 255, "-rf", "~", "a'b\"c", "\udcff"],
)
def test_any_name_of_a_folder_will_do(tmp_path, name):
    path = tmp_path / name
    with RunDirectory.create(path, HEADER) as run:
        record = run.commit("a", layer(0))
        run.put_state("s", layer(1))
    with RunDirectory.open(path, write=True) as run:
        assert same(run.load(record), layer(0))
        assert run.check() == []
        flip(path / record.file)
        with pytest.raises(CheckpointError) as caught:
            run.load(record)
        assert str(caught.value).isprintable()


def test_names_that_differ_only_in_case_are_two(path):
    with RunDirectory.create(path, HEADER) as run:
        files = [run.commit(name, layer(0)).file.lower() for name in ("fc", "FC", "Fc")]
        run.put_state("s", layer(1))
        run.put_state("S", layer(2))
        assert len(set(files)) == 3
        found = run.state("s")
        assert found is not None
        assert same(found[0], layer(1))
        assert len({p.name.lower() for p in (path / "state").iterdir()}) == 4


def test_the_folder_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    with RunDirectory.create(tmp_path / "run", HEADER) as run:
        run.commit("a", layer(0))
    with RunDirectory.open(tmp_path / "run", write=True) as run:
        assert run.check() == []
    assert (tmp_path / "scratch" / "run.json").is_file()


def test_the_folder_may_be_moved_while_it_is_open(filled):
    with RunDirectory.open(filled, write=True) as run:
        filled.rename(filled.parent / "moved")
        run.commit("x", layer(0))
        assert run.check() == []


def test_relative_paths_are_kept_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunDirectory.create("run", HEADER) as run:
        assert run.path == tmp_path / "run"


def test_a_folder_that_cannot_be_written_to_is_an_error_and_can_be_read(filled):
    """As root nothing is forbidden, so that the system's refusal is acted."""
    before = tree(filled)
    for code in (errno.EACCES, errno.EROFS):
        with installed(Counter(4, failing(code))):
            said = refusal(lambda: RunDirectory.open(filled, write=True))
        assert said is not None
        assert os.strerror(code) in said
    assert tree(filled) == before


# ---- creation ------------------------------------------------------------------------------------


def test_a_creation_that_was_interrupted_is_done_again(path):
    for k in range(1, 200):
        counter = Counter(k, failing(errno.EIO))
        with installed(counter):
            said = refusal(lambda: RunDirectory.create(path, HEADER).close())
        if said is not None:
            assert "deep" in said
            assert not list(path.parent.rglob("*.tmp")), counter.calls
        if not (path / "run.json").exists():
            RunDirectory.create(path, HEADER).close()
        with RunDirectory.open(path, write=True) as run:
            assert run.header == HEADER
            assert run.check() == []
        if not counter.fired:
            break
        subprocess.run(["rm", "-r", path.parent], check=True)
    assert 20 < k < 199


def test_free_space_is_told(filled):
    with RunDirectory.open(filled, write=False) as run:
        assert 0 < run.free_bytes() < 1 << 60
