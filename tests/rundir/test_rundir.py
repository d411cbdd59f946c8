"""The run directory: committed records stay, damage is detected, and one process writes."""

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
from lobs_native.files import strict_json
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
    """A folder in memory: every one of the many commits here would wait for the disk."""
    return in_memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


@pytest.fixture
def filled(path: Path) -> Path:
    """A closed run with four records and a state."""
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


# ---- writing and reading -------------------------------------------------------------------------


def test_committed_records_are_read_back(filled):
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


def test_the_files_have_the_documented_layout(filled):
    """Other tools may rely on it."""
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


def test_a_run_resumes_where_it_stopped(path):
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


def test_calls_are_made_in_the_order_that_survives_a_crash(path):
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


def test_loaded_tensors_belong_to_the_caller(filled):
    with RunDirectory.open(filled, write=False) as run:
        found = run.load(run.records[0])
        found["weight"].zero_()
        assert same(run.load(run.records[0]), layer(0))


def test_info_is_stored_as_json(path):
    with RunDirectory.create(path, HEADER) as run:
        record = run.commit("a", layer(0), {"shape": (3, 4), "notes": ["ä"], "none": None})
        assert record.info == {"shape": [3, 4], "notes": ["ä"], "none": None}
    with RunDirectory.open(path, write=False) as run:
        assert run.records == (record,)


def test_reading_a_layer_takes_memory_for_one_copy(path):
    """Measured in another process, where nothing else has used memory before."""
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
    ("header", "phrase"),
    [
        ({"format": 2}, "header: 'format' is added automatically"),
        ({"check": ""}, "header: 'check' is added automatically"),
        ({"a": float("nan")}, "header: cannot be stored as JSON"),
        ({"a": Path("x")}, "header: cannot be stored as JSON"),
        ([1], "header: must be a dict"),
        ({"a": "x" * (16 << 20)}, "header: takes 16777\\d+ bytes in run.json; the limit is"),
        ({"a": [0] * 500_001}, "header: holds about 500\\d+ values"),
    ],
)
def test_a_header_that_could_not_be_read_back_is_refused(path, header, phrase):
    with pytest.raises(ArgumentError, match=phrase):
        RunDirectory.create(path, header)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "error", "phrase"),
    [
        ({"name": 3}, ArgumentError, "name: 3 is not a name"),
        ({"name": "\ud800"}, ArgumentError, "name: .* is not a name"),
        ({"name": "x" * 1001}, ArgumentError, "name: .* is not a name"),
        ({"kind": "A b"}, ArgumentError, "kind: 'A b'"),
        ({"info": {"a": float("inf")}}, ArgumentError, "info: cannot be stored as JSON"),
        ({"info": [1]}, ArgumentError, "info: must be a dict"),
        ({"info": {"a": "x" * (1 << 20)}}, ArgumentError, "info: .* the limit is 1048576 bytes"),
        ({"info": {"a": [0] * 30_000}}, ArgumentError, "info: holds about 3\\d+ values"),
        ({"tensors": {"a": 3}}, DtypeError, "tensors\\['a'\\]"),
        ({"tensors": {3: torch.ones(1)}}, ArgumentError, "tensors: 3 cannot be the name"),
        ({"name": "there"}, ArgumentError, "name: layer 'there' is already committed"),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_changes(path, change, error, phrase):
    with RunDirectory.create(path, HEADER) as run:
        run.commit("there", layer(0))
        before = tree(path)
        arguments = {"name": "new", "tensors": layer(1), "info": {}, "kind": "layer", **change}
        name, tensors, info = (arguments.pop(k) for k in ("name", "tensors", "info"))
        with pytest.raises(error, match=phrase):
            run.commit(name, tensors, info, **arguments)
        assert tree(path) == before
        if "kind" not in change and change.get("name") != "there":
            with pytest.raises(error, match=phrase.replace("name:", "key:")):
                run.put_state(name, tensors, info)
            assert tree(path) == before


def test_a_run_is_created_once(filled):
    before = tree(filled)
    with pytest.raises(ArgumentError, match="already holds a run; open it, or name another folder"):
        RunDirectory.create(filled, HEADER)
    assert tree(filled) == before


def test_a_run_does_not_replace_a_file(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(
        ArgumentError, match=r"thesis\.txt: not a folder; name a new or an empty folder"
    ):
        RunDirectory.create(file, HEADER)
    assert file.read_text() == "years of work"


def test_a_run_is_not_created_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match=r"holds other files \('thesis.txt'\)"):
        RunDirectory.create(tmp_path, HEADER)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_parts_of_a_run_without_run_json_are_not_reused(filled):
    (filled / "run.json").unlink()
    before = tree(filled)
    with pytest.raises(ArgumentError, match=r"holds parts of a run .* but no run\.json"):
        RunDirectory.create(filled, HEADER)
    assert tree(filled) == before


def test_a_folder_that_is_not_a_run_is_not_opened(tmp_path):
    for write in (False, True):
        with pytest.raises(CheckpointError, match="no/where: is not a folder"):
            RunDirectory.open(tmp_path / "no" / "where", write=write)
        with pytest.raises(CheckpointError, match=r"run\.json: is missing.*create"):
            RunDirectory.open(tmp_path, write=write)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is not a folder"):
        RunDirectory.open(tmp_path / "file", write=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "nothing was written"


def test_a_run_opened_read_only_cannot_be_changed(filled):
    before = tree(filled)
    with RunDirectory.open(filled, write=False) as run:
        for action in (
            lambda: run.commit("x", layer(0)),
            lambda: run.put_state("x", layer(0)),
            lambda: run.drop_state("hidden"),
            run.repair,
        ):
            with pytest.raises(ArgumentError, match="was opened read-only"):
                action()
    assert tree(filled) == before


def test_using_a_closed_run_is_an_error(filled):
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


def test_a_state_survives_later_commits(path):
    with RunDirectory.create(path, HEADER) as run:
        run.put_state("s", layer(0))
        run.commit("a", layer(1))
    with RunDirectory.open(path, write=True) as run:
        assert run.messages == []
        assert run.state("s") is not None


def test_a_state_that_follows_lost_records_is_dropped(path):
    with RunDirectory.create(path, HEADER) as run:
        run.put_state("early", layer(0))
        run.commit("a", layer(1))
        run.put_state("late", layer(2))
    (path / "manifest.jsonl").write_bytes(b"")
    with RunDirectory.open(path, write=False) as run:
        assert run.state("late") is None
        assert run.state("early") is not None
        assert any("follows 1 records" in p.description for p in run.check())
    with RunDirectory.open(path, write=True) as run:
        assert run.messages == [
            "state 'late': dropped: it follows 1 records, some of which are gone"
        ]
        assert len(list((path / "state").iterdir())) == 2


def test_remains_of_an_interrupted_put_state_are_removed(path):
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


# ---- checks of what is loaded --------------------------------------------------------------------


def test_loaded_tensors_must_be_those_expected(filled):
    good = {"weight": ((3, 4), torch.float32), "mask": ((3, 4), torch.bool)}
    with RunDirectory.open(filled, write=False) as run:
        assert same(run.load(run.records[1], good), layer(1))
        with pytest.raises(CheckpointError, match=r"'weight' is F32 \(3, 4\), not F32 \(4, 3\)"):
            run.load(run.records[1], {**good, "weight": ((4, 3), torch.float32)})
        with pytest.raises(CheckpointError, match=r"lacks 'hidden' and has 'h'"):
            run.state("hidden", {"hidden": ((5,), torch.float32)})


def test_a_file_larger_than_expected_is_not_read(path):
    with RunDirectory.create(path, HEADER) as run:
        record = run.commit("a", {"w": torch.ones(100_000)})
        counter = Counter()
        with (
            installed(counter),
            pytest.raises(CheckpointError, match=r"has 4000\d\d bytes, but the tensors expected"),
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
    ("how", "phrase"),
    [
        ("flip", "does not have the sha256 in its record"),
        ("zero", "does not have the sha256 in its record"),
        ("cut", "bytes, but its record has"),
        ("grow", "bytes, but its record has"),
        ("unlink", "is missing"),
        ("folder", "is a folder"),
        ("link", "is a link"),
        ("pipe", "is a pipe"),
    ],
)
def test_a_damaged_file_is_named_and_repaired(filled, seq, how, phrase):
    damaged_layer(seq, how)(filled)
    with RunDirectory.open(filled, write=True) as run:
        record = run.records[seq]
        with pytest.raises(CheckpointError, match=f"{record.file}: .*{phrase}.*repair"):
            run.load(record)
        (damage,) = run.check()
        assert damage.file == record.file
        assert damage.seq == seq
        assert phrase in damage.description
        assert str(damage) == f"{damage.file}: {damage.description}"
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
    with RunDirectory.create(filled.parent / "again", HEADER) as run:
        for i, name in enumerate(NAMES):
            run.commit(name, layer(i), {"error": 0.5 * i})
        run.put_state("hidden", {"h": torch.ones(5)}, {"batch": 3})
    assert repaired == tree(filled.parent / "again")


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
def test_a_changed_manifest_is_refused_by_line(filled, change, line):
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


def test_a_manifest_truncated_at_a_line_is_detected_by_the_files_it_lacks(filled):
    (filled / "manifest.jsonl").write_bytes(b"".join(lines(filled)[:2]))
    with RunDirectory.open(filled, write=True) as run:
        stray = [p for p in run.check() if p.file.startswith("layers/")]
        assert [p.file[:12] for p in stray] == ["layers/00002", "layers/00003"]
        assert "is not in the manifest" in stray[0].description
        run.commit(NAMES[2], layer(2))
        assert len(run.check()) == 1
        assert len(run.repair()) == 1
        assert run.check() == []


@pytest.mark.parametrize("name", ["manifest.jsonl", "layers", "state"])
def test_a_missing_part_is_named_and_recreated_by_repair(filled, name):
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
    with pytest.raises(CheckpointError, match=f"{name}: is a link or not a folder"):
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


def test_foreign_files_are_named_and_left(filled):
    for name in ("layers/notes.txt", "state/\x1b[31m"):
        (filled / name).write_text("another's")
    with RunDirectory.open(filled, write=True) as run:
        lines = [str(p) for p in run.check()]
        assert lines == [
            "layers/notes.txt: is not in the manifest",
            "'state/\\x1b[31m': belongs to no state",
        ]
        left = ": left: it is not from a run; remove it yourself"
        assert run.repair() == [lines[1] + left, lines[0] + left]
        assert (filled / "layers/notes.txt").read_text() == "another's"
        assert len(run.records) == 4


def test_a_header_of_another_format_is_refused_with_a_way_out(filled):
    values = json.loads((filled / "run.json").read_bytes())
    for version in (2, 0, "1", None, 1.0, True):
        changed = {**values, "format": version}
        del changed["check"]
        (filled / "run.json").write_bytes(strict_json.seal(changed, indent=1) + b"\n")
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
    ("header", "phrase"),
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
def test_differences_are_listed_with_both_values(filled, header, phrase):
    with RunDirectory.open(filled, write=False) as run:
        (found,) = run.differences(header)
        assert phrase in found


def test_long_values_are_shortened_to_where_they_differ(path):
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
    ("content", "phrase"),
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
def test_an_abandoned_lock_is_taken_over_with_a_message(filled, content, phrase):
    (filled / "LOCK").write_text(content.replace("HOST", os.uname().nodename))
    with RunDirectory.open(filled, write=True) as run:
        (message,) = run.messages
        assert re.search(phrase, message)
        assert ("another computer" in message) == ("elsewhere" in content)
        assert message.isprintable()
    with RunDirectory.open(filled, write=True) as run:
        assert run.messages == []


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (os.mkfifo, "LOCK: is a pipe"),
        (os.mkdir, "LOCK: .*Is a directory"),
        (lambda p: os.symlink("x", p), "LOCK: .*symbolic"),
    ],
)
def test_a_lock_that_is_not_a_file_is_refused(filled, make, phrase):
    (filled / "LOCK").unlink()
    make(filled / "LOCK")
    with pytest.raises(CheckpointError, match=phrase):
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
def test_the_folder_may_have_any_name(tmp_path, name):
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


def test_names_that_differ_only_in_case_are_distinct(path):
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


def test_an_unwritable_folder_is_an_error_when_writing_but_can_be_read(filled):
    """Nothing is forbidden to root, so the system's refusal is simulated."""
    before = tree(filled)
    for code in (errno.EACCES, errno.EROFS):
        with installed(Counter(4, failing(code))):
            text = refusal(lambda: RunDirectory.open(filled, write=True))
        assert text is not None
        assert os.strerror(code) in text
    assert tree(filled) == before


# ---- creation ------------------------------------------------------------------------------------


def test_an_interrupted_creation_can_be_repeated(path):
    for k in range(1, 200):
        counter = Counter(k, failing(errno.EIO))
        with installed(counter):
            text = refusal(lambda: RunDirectory.create(path, HEADER).close())
        if text is not None:
            assert "deep" in text
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


def test_free_space_is_reported(filled):
    with RunDirectory.open(filled, write=False) as run:
        assert 0 < run.free_bytes() < 1 << 60
