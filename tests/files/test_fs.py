"""Every call to the file system goes through one function, and short reads and writes continue."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest
from helpers.faults import Counter, failing, installed, refusal

from lobs_native.errors import CheckpointError
from lobs_native.files import atomic as files
from lobs_native.files import fs

PACKAGE = Path(fs.__file__).parents[1]
SEAM = {
    "files/fs",
    "files/atomic",
    "files/regular",
    "files/safefile",
    "files/strict_json",
    "rundir/manifest",
    "rundir/directory",
}  # modules whose only way to a file is fs


def open_handle(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    return fs.open_file(path, flags)


def test_the_modules_of_the_seam_make_no_calls_of_their_own():
    harmless = {"fspath", "fsencode", "fsdecode", "getpid", "PathLike", "uname"}
    for name in SEAM - {"files/fs"}:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr=attr):
                    assert attr in harmless or attr.startswith("O_"), (name, attr)
                case ast.Attribute(value=ast.Name(id="shutil" | "tempfile" | "fcntl")):
                    pytest.fail(f"{name} uses {ast.unparse(node)}")
                case ast.Call(func=ast.Name(id="open")):
                    pytest.fail(f"{name} opens a file")
                case ast.Attribute(attr="open" | "write_text" | "write_bytes" | "read_text"):
                    pytest.fail(f"{name} uses {ast.unparse(node)}")


def test_every_function_of_the_seam_goes_through_call():
    functions = [
        node
        for node in ast.parse((PACKAGE / "files/fs.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name not in {"call", "umask"}
    ]
    own = {f.name for f in functions} | {"call"}
    for function in functions:
        called = {
            node.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert called & (own - {function.name}), function.name


def test_a_short_write_is_continued(tmp_path):
    data = bytes(range(256)) * 5
    handle = open_handle(tmp_path / "a")
    with installed(Counter.short):
        fs.write(handle, data)
        fs.close(handle)
    assert (tmp_path / "a").read_bytes() == data


def test_a_write_that_writes_nothing_is_an_error(tmp_path):
    handle = open_handle(tmp_path / "a")
    with installed(Counter(1, lambda: 0)), pytest.raises(OSError, match="wrote nothing"):
        fs.write(handle, b"data")
    fs.close(handle)


@pytest.mark.parametrize("data", [b"", memoryview(b""), bytearray(3), memoryview(b"abc")])
def test_any_buffer_can_be_written(tmp_path, data):
    handle = open_handle(tmp_path / "a")
    fs.write(handle, data)
    fs.close(handle)
    assert (tmp_path / "a").read_bytes() == bytes(data)


def test_reading_stops_at_the_end_of_the_file_or_at_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    handle = open_handle(tmp_path / "a", os.O_RDONLY)
    assert fs.read(handle, 4) == b"0123"
    assert fs.read(handle, 100) == b"456789"
    assert fs.read(handle, 100) == b""
    fs.close(handle)


def test_reading_into_a_buffer_returns_the_number_of_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    handle = open_handle(tmp_path / "a", os.O_RDONLY)
    buffer = bytearray(16)
    assert fs.read_into(handle, memoryview(buffer)) == 10
    assert buffer == b"0123456789" + bytes(6)
    fs.close(handle)


def test_short_reads_are_continued(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")

    def one_byte(operation, function, *args, **kw):
        if operation == "read":
            return function(args[0], min(args[1], 1))
        if operation == "read_into":
            return function(args[0], [args[1][0][:1]])
        return function(*args, **kw)

    handle = open_handle(tmp_path / "a", os.O_RDONLY)
    with installed(one_byte):
        assert fs.read(handle, 100) == b"0123456789"
        os.lseek(handle, 0, os.SEEK_SET)
        buffer = bytearray(10)
        assert fs.read_into(handle, memoryview(buffer)) == 10
    assert buffer == b"0123456789"
    fs.close(handle)


def test_names_are_relative_to_the_open_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    folder = fs.open_folder(tmp_path / "inside")
    (tmp_path / "inside").rename(tmp_path / "moved")
    fs.close(fs.open_file("a", os.O_CREAT | os.O_WRONLY, folder=folder))
    fs.rename("a", "b", folder=folder)
    fs.make_folder("sub", folder=folder)
    assert fs.listing(folder) == ["b", "sub"]
    assert fs.exists("b", folder=folder)
    fs.unlink("b", folder=folder)
    assert not fs.exists("b", folder=folder)
    fs.sync_folder(folder)
    fs.close(folder)
    assert [p.name for p in (tmp_path / "moved").iterdir()] == ["sub"]


def test_a_link_to_a_folder_is_opened_only_on_request(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(NotADirectoryError):
        fs.open_folder(tmp_path / "link")
    fs.close(fs.open_folder(tmp_path / "link", follow=True))


def test_a_file_system_that_cannot_sync_folders_is_not_an_error(tmp_path):
    folder = fs.open_folder(tmp_path)
    with installed(Counter(1, failing(errno.EINVAL))):
        fs.sync_folder(folder)
    with installed(Counter(1, failing(errno.EIO))), pytest.raises(OSError, match="Input/output"):
        fs.sync_folder(folder)
    fs.close(folder)


def test_one_lock_at_a_time(tmp_path):
    first, second = (open_handle(tmp_path / "LOCK") for _ in range(2))
    assert fs.lock(first)
    assert not fs.lock(second)
    fs.close(first)
    assert fs.lock(second)
    fs.close(second)


# ---- files written with it -----------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_file_is_written_atomically_whichever_call_fails(tmp_path, code):
    target = tmp_path / "a.txt"
    for k in range(1, 100):
        target.write_text("old")
        counter = Counter(k, failing(code))
        with installed(counter):
            message = refusal(lambda: files.write_file(target, "new"))
        for part in (str(target), os.strerror(code), "(3 bytes)") if message else ():
            assert part in message
        assert target.read_text() in {"old", "new"}
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"], counter.calls
        if not counter.fired:
            break
    assert 8 < k < 99
    assert target.read_text() == "new"


def test_the_order_is_write_sync_rename_sync(tmp_path):
    counter = Counter()
    with installed(counter):
        files.write_file(tmp_path / "a.txt", "new")
    order = [c for c in counter.calls if c not in {"open", "close", "make_folder"}]
    assert order == ["write", "fsync", "rename", "fsync_folder"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    for name in ("n" * 255, "\N{SNOWMAN}" * 85, "with\nline break and \N{SNOWMAN}"):
        assert files.write_file(tmp_path / name, "text").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_is_written_atomically_whichever_call_fails(tmp_path, code):
    out = tmp_path / "deep" / "out"

    def write() -> None:
        with files.new_folder(out) as inside:
            (inside / "a.txt").write_text("new")

    for k in range(1, 100):
        counter = Counter(k, failing(code))
        with installed(counter):
            message = refusal(write)
        assert message is None or os.strerror(code) in message
        found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
        assert found in ([], ["deep", "deep/out", "deep/out/a.txt"]), (k, counter.calls)
        if not counter.fired:
            break
        fs.remove_tree(tmp_path / "deep")
    assert 8 < k < 99


def test_free_space_is_checked_before_a_run(tmp_path):
    files.need_space(tmp_path / "not" / "new", 1)
    with pytest.raises(CheckpointError, match=r"new: needs \d{19} bytes, but \d+ are free"):
        files.need_space(tmp_path / "not" / "new", 1 << 62)
    with (
        installed(Counter(1, failing(errno.EIO))),
        pytest.raises(CheckpointError, match="Input/output"),
    ):
        files.need_space(tmp_path, 1)
