"""Malicious files are refused by name, quickly and in little memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import installed
from safetensors.torch import save

from lobs_native.errors import CheckpointError
from lobs_native.files import regular, safefile, strict_json
from lobs_native.rundir.directory import RunDirectory
from stress import fuzz_rundir

SECONDS, BYTES = 2.0, 50 << 20  # measured: below 0.1 s but for tracemalloc, which costs tenfold


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Fail if the block takes more time, or more Python memory (torch has its own) than this."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        taken, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < seconds
    assert peak < size


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**change: Any) -> bytes:
    """A file of one tensor "a", float32 (2,), with something wrong in its entry."""
    values = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}
    kept = {key: value for key, value in values.items() if value is not None}
    return with_header(json.dumps({"a": kept}).encode(), bytes(8))


GOOD = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

# The damage -> the file, and a part of the message.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a complete safetensors file; it has 0 bytes"),
    "seven bytes": (bytes(7), "not a complete safetensors file"),
    "length 2**64 - 1": (with_header(b"{}", length=2**64 - 1), "not a complete safetensors file"),
    "length 2**62": (with_header(b"{}", length=2**62), "not a complete safetensors file"),
    "length one too many": (with_header(b"{}", length=3), "not a complete safetensors file"),
    "length zero": (with_header(b"", bytes(8)), "header: is not valid JSON"),
    "a pickle": (pickle.dumps({"weight": [1.0] * 100}), "safetensors file"),
    "a torch zip": (b"PK\x03\x04" + bytes(200), "safetensors file"),
    "depth 100,000": (with_header(b"[" * 100_000), "nested too deeply"),
    "depth 100,000 of objects": (with_header(b'{"a":' * 100_000), "nested too deeply"),
    "depth 40": (with_header(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"), "nested more than 32 deep"),
    "a list": (with_header(b"[]"), "its header is not an object"),
    "a number": (with_header(b"3"), "its header is not an object"),
    "one tensor twice": (
        with_header(b'{"a":' + GOOD + b',"a":' + GOOD + b"}", bytes(8)),
        "'a' occurs twice",
    ),
    "one key twice": (
        with_header(
            b'{"a":{"dtype":"I8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
        ),
        "'dtype' occurs twice",
    ),
    "metadata twice": (
        with_header(b'{"__metadata__":{},"__metadata__":{}}'),
        "'__metadata__' occurs twice",
    ),
    "metadata of numbers": (
        with_header(b'{"__metadata__":{"a":1}}'),
        "metadata does not map names to text",
    ),
    "metadata a list": (with_header(b'{"__metadata__":[]}'), "metadata does not map names to text"),
    "NaN": (with_header(b'{"a":NaN}'), "NaN is not a number"),
    "Infinity": (with_header(b'{"a":[-Infinity]}'), "-Infinity is not a number"),
    "1e400": (with_header(b'{"a":1e400}'), "'1e400' is too large"),
    "a long fraction": (with_header(b'{"a":0.' + b"1" * 10**6 + b"}"), "too large or too long"),
    "a huge integer": (with_header(b'{"a":' + b"9" * 10**6 + b"}"), "too large"),
    "2**63": (with_header(b'{"a":9223372036854775808}'), "too large"),
    "no UTF-8": (with_header(b'{"\xff":' + GOOD + b"}", bytes(8)), "can't decode byte"),
    "UTF-16": (with_header('{"a":1}'.encode("utf-16")), "can't decode byte"),
    "half a surrogate pair": (
        with_header(b'{"\\ud800":' + GOOD + b"}", bytes(8)),
        "surrogates not allowed",
    ),
    "unknown dtype": (entry(dtype="F33"), "unknown dtype 'F33'"),
    "dtype a list": (entry(dtype=["F32"]), "unknown dtype"),
    "dtype missing": (entry(dtype=None), "not have exactly dtype, shape and data_offsets"),
    "one entry more": (entry(more=1), "not have exactly dtype, shape and data_offsets"),
    "an entry of text": (with_header(b'{"a":"F32"}'), "not have exactly dtype"),
    "negative shape": (entry(shape=[-2]), r"impossible shape [-2]"),
    "shape a float": (entry(shape=[2.0]), "impossible shape"),
    "shape of truth": (entry(shape=[2, True]), "impossible shape"),
    "shape of text": (entry(shape="22"), "impossible shape"),
    "shape overflows": (entry(shape=[2**32, 2**32]), "impossible shape"),
    "shape overflows beside a zero": (
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "impossible shape",
    ),
    "65 dimensions": (entry(shape=[1] * 64 + [2]), "impossible shape"),
    "shape and bytes differ": (entry(shape=[3]), "has 8 bytes, which does not fit F32 [3]"),
    "10 GB in a small file": (
        entry(shape=[2_500_000_000], data_offsets=[0, 10_000_000_000]),
        "has 8 bytes of tensors, but its header claims 10000000000",
    ),
    "offsets backwards": (entry(data_offsets=[8, 0]), "impossible offsets"),
    "offsets negative": (entry(data_offsets=[-8, 0]), "impossible offsets"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), "impossible offsets"),
    "a gap": (entry(data_offsets=[4, 12]), "begins at byte 4, but the tensor before it ends at 0"),
    "overlap": (
        with_header(b'{"a":' + GOOD + b',"b":' + GOOD + b"}", bytes(8)),
        "begins at byte 0, but the tensor before it ends at 8",
    ),
    "cut": (save({"a": torch.ones(4)})[:-1], "has 15 bytes of tensors, but its header claims 16"),
    "trailing": (save({"a": torch.ones(4)}) + b"x", "has 17 bytes of tensors"),
    "many dimensions of one tensor": (
        with_header(b'{"a":{"shape":[' + b"1," * 600_000 + b"1]}}"),
        "the limit is 500000",
    ),
}


@pytest.mark.parametrize("wrong", FILES)
def test_a_wrong_safetensors_file_is_refused(tmp_path, wrong):
    data, phrase = FILES[wrong]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with bounded(), pytest.raises(CheckpointError) as caught:
        safefile.read_header(path)
    assert str(path) in str(caught.value)
    assert phrase in str(caught.value)
    assert len(str(caught.value)) < 600
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    with bounded(), pytest.raises(CheckpointError, match="file"):
        safefile.tensors_of(raw.to(torch.uint8), "file")


def test_a_header_of_100_megabytes_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((100 << 20).to_bytes(8, "little") + b'{"')
    os.truncate(path, (100 << 20) + 8)
    with (
        bounded(),
        pytest.raises(CheckpointError, match="a header of 104857600 bytes; the limit is"),
    ):
        safefile.read_header(path)


def test_a_header_is_bounded_by_the_tensors_that_are_expected(tmp_path):
    path = tmp_path / "a.safetensors"
    names = {f"layer.{i}": torch.empty(0) for i in range(3000)}
    path.write_bytes(save(names))
    assert len(safefile.read_header(path, tensors=3000)) == 3000
    with bounded(), pytest.raises(CheckpointError, match="the limit is 67584"):
        safefile.read_header(path, tensors=2)


def test_a_header_of_a_million_empty_tensors_is_not_parsed(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b"{" + b",".join(b'"%d":%s' % (i, EMPTY) for i in range(240_000)) + b"}"
    assert len(header) < strict_json.MOST_JSON
    path.write_bytes(with_header(header))
    with (
        bounded(),
        pytest.raises(CheckpointError, match="about 2640000 values; the limit is 500000"),
    ):
        safefile.read_header(path)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "a\\x.safetensors"),
        *("C:x.safetensors", "x.safetensors\0", "x\0.safetensors", "x.safetensors\n", ""),
        *(".safetensors", "x.safetensors.bin", "x.SAFETENSORS", "\N{CYRILLIC SMALL LETTER IE}x"),
        *("n" * 201 + ".safetensors", "x y.safetensors", "~/x.safetensors", "x.safetensors/"),
        *("\N{FULLWIDTH SOLIDUS}x.safetensors", "$HOME.safetensors", "%2e%2e.safetensors"),
    ],
)
def test_only_plain_names_pass(name):
    assert not safefile.NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "a.safetensors", "._-.safetensors"]
)
def test_plain_names_pass(name):
    assert safefile.NAME.fullmatch(name)


def link(path: Path) -> None:
    (path.parent / "target").write_bytes(save({"a": torch.ones(2)}))
    path.symlink_to("target")


def sock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        pytest.skip("making a device needs root")


THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, not a file; remove it"),
    "a device": (device, "is a device, not a file; remove it"),
    "a folder": (Path.mkdir, "is a folder, not a file; remove it"),
    "a socket": (sock, "cannot be opened: No such device or address"),
    "a link": (link, "is a link; put the file itself there"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "is a link"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "is a link"),
    "nothing": (lambda p: None, "is missing"),
}


@pytest.mark.parametrize("thing", THINGS)
def test_only_regular_files_are_opened(tmp_path, thing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, phrase = THINGS[thing]
    path = tmp_path / "a.safetensors"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with bounded(), pytest.raises(CheckpointError, match=phrase):
        regular.read_whole(path, str(path), most=100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "run.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with (
        bounded(),
        pytest.raises(CheckpointError, match="has 1099511627776 bytes; the limit is 100"),
    ):
        regular.read_whole(path, str(path), most=100)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.ones(1000)}))
    raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for length in (0, 5, 8, 20, 200, len(raw) - 1):
        with pytest.raises(CheckpointError):
            safefile.tensors_of(raw[:length], "file")


def test_a_bool_is_true_or_false():
    data = bytearray(save({"a": torch.tensor([True, False])}))
    data[-1] = 2
    with pytest.raises(CheckpointError, match="neither true nor false"):
        safefile.tensors_of(torch.frombuffer(data, dtype=torch.uint8), "file")


def test_a_tensor_that_is_not_aligned_is_refused():
    data = with_header(b'{"a":' + GOOD + b"}", bytes(8))
    assert (8 + len(data) - 16) % 4
    with pytest.raises(CheckpointError, match="not aligned"):
        safefile.tensors_of(torch.frombuffer(bytearray(data), dtype=torch.uint8), "file")


@pytest.mark.parametrize(
    ("expected", "phrase"),
    [
        ({"a": ((2, 3), torch.float32), "b": ((2,), torch.bool)}, "lacks 'b'"),
        ({}, "has 'a', which is not expected"),
        ({"b": ((2, 3), torch.float32)}, "lacks 'b' and has 'a'"),
        ({"a": ((3, 2), torch.float32)}, r"'a' is F32 (2, 3), not F32 (3, 2) as expected"),
        ({"a": ((2, 3), torch.float16)}, "'a' is F32 (2, 3), not F16 (2, 3) as expected"),
    ],
)
def test_unexpected_tensors_are_refused(expected, phrase):
    raw = torch.frombuffer(bytearray(save({"a": torch.ones(2, 3)})), dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        safefile.tensors_of(raw, "file", expected)
    assert phrase in str(caught.value)


def test_messages_have_no_control_characters():
    for value in ("\x1b[31mred\n", "x" * 10**6, b"\x00" * 300, list(range(1000)), "\u202e"):
        text = strict_json.shown(value)
        assert text.isprintable()
        assert text.isascii()
        assert len(text) <= 80


# ---- the run directory ---------------------------------------------------------------------------


@pytest.fixture
def run(in_memory: Path) -> Path:
    """A small, closed run."""
    path = in_memory / "run"
    with RunDirectory.create(path, {"config": {"a": 1}}) as run:
        for i in range(3):
            run.commit(f"layer.{i}", {"w": torch.ones(4) * i}, {"i": i})
        run.put_state("s", {"w": torch.ones(4)}, {"i": 1})
    return path


def sealed(values: dict[str, Any]) -> bytes:
    return strict_json.seal({k: v for k, v in values.items() if k != "check"})


def forged(run: Path, line: int, **change: Any) -> None:
    """Change fields of a line and recompute all hashes, as an attacker could."""
    path = run / "manifest.jsonl"
    lines = [json.loads(text) for text in path.read_bytes().splitlines()]
    lines[line].update(change)
    prev = json.loads((run / "run.json").read_bytes())["check"]
    forged_lines = []
    for values in lines:
        if "prev" not in change or values is not lines[line]:
            values["prev"] = prev
        forged_lines.append(sealed({k: v for k, v in values.items() if v is not ...}) + b"\n")
        prev = json.loads(forged_lines[-1])["check"]
    path.write_bytes(b"".join(forged_lines))


LINES: dict[str, tuple[dict[str, Any], str]] = {
    "seq text": ({"seq": "1"}, "seq is '1', not of type int"),
    "seq true": ({"seq": True}, "seq is True, not of type int"),
    "seq a float": ({"seq": 1.0}, "seq is 1.0, not of type int"),
    "seq of another": ({"seq": 7}, "has the number 7, not 1"),
    "seq negative": ({"seq": -1}, "has the number -1, not 1"),
    "kind a number": ({"kind": 3}, "kind is 3, not of type str"),
    "kind of odd letters": ({"kind": "\x1b[31m"}, r"invalid kind '\x1b[31m'"),
    "name a list": ({"name": []}, r"name is [], not of type str"),
    "name too long": ({"name": "x" * 2000}, "invalid name"),
    "name of another": ({"name": "layer.0"}, "refers to the file"),
    "bytes negative": ({"bytes": -1}, "invalid size or sha256"),
    "bytes text": ({"bytes": "80"}, "bytes is '80', not of type int"),
    "sha256 short": ({"sha256": "00"}, "invalid size or sha256"),
    "sha256 in capitals": ({"sha256": "A" * 64}, "invalid size or sha256"),
    "sha256 with a line break": ({"sha256": "a" * 64 + "\n"}, "invalid size or sha256"),
    "info a list": ({"info": []}, r"info is [], not of type dict"),
    "info missing": ({"info": ...}, "does not have exactly the fields"),
    "a field more": ({"more": 1}, "does not have exactly the fields"),
    "prev of another": ({"prev": "0" * 64}, "does not follow line 1"),
    "info deep": ({"info": json.loads('{"a":' * 40 + "0" + "}" * 40)}, "more than 32 deep"),
    "info of many values": ({"info": {"a": [0] * 30_000}}, "values; the limit is 20000"),
    "info of a megabyte": ({"info": {"a": "x" * (1 << 20)}}, "bytes; the limit is 1048576"),
    **{
        f"file {name!r}": ({"file": name}, "refers to the file")
        for name in (
            *(
                "../x.safetensors",
                "/x.safetensors",
                "layers/../../x.safetensors",
                "C:x.safetensors",
            ),
            *("layers\\x.safetensors", "layers/x.safetensors\0", "", "layers/", "x" * 5000),
            *("layers/00001-\N{CYRILLIC SMALL LETTER A}.safetensors", "state/x.json", "run.json"),
        )
    },
}


@pytest.mark.parametrize("wrong", LINES)
def test_a_forged_line_is_refused(run, wrong):
    change, phrase = LINES[wrong]
    forged(run, 1, **change)
    with bounded(), pytest.raises(CheckpointError) as caught:
        RunDirectory.open(run, write=False)
    assert "manifest.jsonl: line 2: " in str(caught.value)
    assert phrase in str(caught.value)
    assert len(str(caught.value)) < 800
    with bounded(), RunDirectory.open(run, write=True, repair=True) as opened:
        assert len(opened.records) == 1
        assert opened.check() == []


def test_a_second_line_of_one_name_is_refused(run):
    lines = [json.loads(text) for text in (run / "manifest.jsonl").read_bytes().splitlines()]
    digest = hashlib.sha256(b"layer.0").hexdigest()[:12]
    forged(run, 1, name="layer.0", file=f"layers/00001-{digest}.safetensors")
    assert lines[0]["name"] == "layer.0"
    with pytest.raises(CheckpointError, match=r"line 2: is a second layer 'layer\.0'"):
        RunDirectory.open(run, write=False)


def test_a_large_forged_file_is_refused_before_memory_is_allocated(run):
    """The manifest and the (sparse) file agree on 10 GB; only the tensors expected differ."""
    size = 10_000_000_000
    forged(run, 1, bytes=size)
    with RunDirectory.open(run, write=False) as opened:
        record = opened.records[1]
        with (
            bounded(),
            pytest.raises(CheckpointError, match="bytes, but its record has 10000000000"),
        ):
            opened.load(record)
        os.truncate(run / record.file, size)
        before = resident()
        with bounded(), pytest.raises(CheckpointError, match="the tensors expected take"):
            opened.load(record, {"w": ((4,), torch.float32)})
        assert resident() - before < 50 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_layer_whose_header_was_forged_is_refused(run):
    """Every hash is right, but the file claims to hold 10 GB."""
    header = b'{"w":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
    for data in (with_header(header), with_header(b"[" * 9000), b"\x80\x04pickle" * 10, b""):
        with RunDirectory.open(run, write=False) as opened:
            file = opened.records[1].file
        (run / file).write_bytes(data)
        forged(run, 1, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        with RunDirectory.open(run, write=False) as opened, bounded():
            with pytest.raises(CheckpointError, match=file):
                opened.load(opened.records[1])
            with pytest.raises(CheckpointError, match=file):
                opened.load(opened.records[1], {"w": ((4,), torch.float32)})


@pytest.mark.parametrize("content", [b"[" * (17 << 20), b"{" * 1000], ids=["17 MB", "deep"])
def test_a_bomb_for_a_header_is_refused(run, content):
    (run / "run.json").write_bytes(content)
    with bounded(), pytest.raises(CheckpointError, match=r"run\.json: "):
        RunDirectory.open(run, write=False)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is not valid JSON"),
        (b"null\n", "holds a NoneType"),
        (b"[1]\n", "holds a list"),
        (b'{"format":1,"format":1}\n', "'format' occurs twice"),
        (b'{"format":1}\n', "was damaged or changed"),
        (b'{"format":1,"a":NaN}\n', "NaN is not a number"),
        (b'{"format":' + b"9" * 5000 + b"}\n", "too large"),
        (b"\xff\xfe", "can't decode"),
        (b"[[]," * 2_000_000, "the limit is 500000"),
    ],
)
def test_a_wrong_header_is_refused_with_the_way_out(run, content, phrase):
    (run / "run.json").write_bytes(content)
    with bounded(), pytest.raises(CheckpointError) as caught:
        RunDirectory.open(run, write=True, repair=True)
    assert phrase in str(caught.value)
    assert "restore it from a copy, or begin a new run" in str(caught.value)


def test_a_manifest_of_a_gigabyte_is_not_read(run):
    os.truncate(run / "manifest.jsonl", 1 << 30)
    with bounded(), pytest.raises(CheckpointError, match="has 1073741824 bytes; the limit is"):
        RunDirectory.open(run, write=False)


def test_a_line_of_many_megabytes_is_not_parsed(run):
    with (run / "manifest.jsonl").open("ab") as file:
        file.write(b"[" * (16 << 20) + b"\n")
    phrase = r"line 4: has 16777216 bytes; the limit is 1048576|holds more than 2000000 values"
    with bounded(), pytest.raises(CheckpointError, match=phrase):
        RunDirectory.open(run, write=False)
    with (run / "manifest.jsonl").open("r+b") as file:
        file.truncate((run / "manifest.jsonl").stat().st_size - (16 << 20) - 1)
        file.seek(0, 2)
        file.write(b"x" * (16 << 20) + b"\n")
    with (
        bounded(),
        pytest.raises(CheckpointError, match="line 4: has 16777216 bytes; the limit is"),
    ):
        RunDirectory.open(run, write=False)


def test_a_repeated_or_reordered_line_is_refused(run):
    lines = (run / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    for order in ([0, 1, 1], [0, 1, 0], [1, 0, 2], [0, 2], [2], [0, 1, 2, 0]):
        (run / "manifest.jsonl").write_bytes(b"".join(lines[i] for i in order))
        with bounded(), pytest.raises(CheckpointError, match="does not follow"):
            RunDirectory.open(run, write=False)


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "layer"}, "is not the record of a state"),
    "after negative": ({"after": -1}, "is not the record of a state"),
    "after text": ({"after": "1"}, "after is '1', not of type int"),
    "prev": ({"prev": "x"}, "is not the record of a state"),
    "file": ({"file": "../../x.safetensors"}, "refers to the file"),
    "bytes": ({"bytes": -5}, "invalid size"),
    "more": ({"more": 1}, "does not have exactly the fields"),
}


@pytest.mark.parametrize("wrong", STATES)
def test_a_forged_record_of_a_state_is_refused(run, wrong):
    change, phrase = STATES[wrong]
    (path,) = (run / "state").glob("*.json")
    path.write_bytes(sealed({**json.loads(path.read_bytes()), **change}) + b"\n")
    with RunDirectory.open(run, write=True) as opened:
        with bounded(), pytest.raises(CheckpointError) as caught:
            opened.state("s")
        assert phrase in str(caught.value)
        assert path.name in str(caught.value)
        assert [p.file for p in opened.check()] == [f"state/{path.name}"]
        opened.repair()
        assert opened.check() == []
        assert opened.state("s") is None


def test_a_record_of_a_state_under_another_name_is_refused(run):
    (path,) = (run / "state").glob("*.json")
    path.rename(path.with_name("0" * 16 + ".json"))
    with RunDirectory.open(run, write=False) as opened:
        assert opened.state("s") is None
        assert any(
            "is the record of the state 's', which has another file" in p.description
            for p in opened.check()
        )


@pytest.mark.parametrize("name", ["run.json", "manifest.jsonl"])
@pytest.mark.parametrize("thing", [t for t in THINGS if t != "nothing"])
def test_the_parts_of_a_run_are_regular_files(run, name, thing, monkeypatch):
    monkeypatch.chdir(run)
    make, phrase = THINGS[thing]
    path = run / name
    path.unlink()
    make(path)
    with bounded(), pytest.raises(CheckpointError, match=phrase) as caught:
        RunDirectory.open(run, write=False)
    assert name in str(caught.value)


def test_a_layer_that_is_truncated_while_it_is_read_is_an_error(run, monkeypatch):
    """It is read, not mapped: a map would end the process with SIGBUS."""
    with RunDirectory.open(run, write=False) as opened:
        record = opened.records[1]

        def cut(operation: str, function: Any, *args: Any, **kw: Any) -> Any:
            if operation == "read_into":
                os.truncate(run / record.file, 10)
            return function(*args, **kw)

        with (
            installed(cut),
            pytest.raises(CheckpointError, match="was truncated while it was read"),
        ):
            opened.load(record)


def test_mutated_runs_raise_only_errors_of_this_package(in_memory):
    """A few seconds of ``bench/stress/fuzz_rundir.py``."""
    counts = fuzz_rundir.fuzz(3, 1, in_memory)
    print(counts)
    assert counts["crashes"] == 0, counts["kinds of crashes"]
    assert counts["inputs"] > 100
    assert counts["longest seconds"] < 2
    assert counts["largest growth in MB"] < 256
    assert len(counts["outcomes"]) >= 4, "inputs get past the first check"


def test_the_fuzzer_detects_a_reader_that_trusts_too_much(in_memory, monkeypatch):
    """The fuzzer would prove little if it could not fail."""
    monkeypatch.setattr(safefile, "whole_numbers", lambda value: True)
    assert fuzz_rundir.fuzz(3, 1, in_memory)["crashes"] > 0
