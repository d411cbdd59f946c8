"""Folders are written atomically, and nothing that must stay is replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import atomic as files


def result(folder: Path, content: str) -> None:
    """Write a folder that counts as an earlier result, with new_folder."""
    with files.new_folder(folder, overwrite=True) as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "a.txt").write_text(content)
        (inside / files.SIGN).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_the_folder_does_not_exist_until_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.new_folder(out) as inside:
        assert not out.exists()
        assert inside.parent == out.parent
        private = os.open(inside / "a.txt", os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(private)
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (out / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, SystemExit])
def test_after_any_exception_nothing_is_left_and_the_exception_propagates(tmp_path, error):
    def fail() -> None:
        with files.new_folder(tmp_path / "deep" / "out") as inside:
            (inside / "a.txt").write_text("half")
            raise error("no")

    with pytest.raises(error, match="no"):
        fail()
    assert names(tmp_path) == []


def test_an_empty_folder_is_filled_and_any_other_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result(out, "first")
    before = names(tmp_path)
    with pytest.raises(ArgumentError, match=r"out: .* not empty.*overwrite"):
        files.check_new_folder(out)
    with pytest.raises(ArgumentError, match="not empty"), files.new_folder(out):
        pytest.fail("the block must not be entered")
    assert names(tmp_path) == before


def test_overwriting_replaces_the_whole_earlier_result(tmp_path):
    out = tmp_path / "out"
    result(out, "first")
    (out / "more.txt").write_text("of the first")
    result(out, "second")
    assert (out / "sub" / "a.txt").read_text() == "second"
    assert names(tmp_path) == ["out", "out/report.json", "out/sub", "out/sub/a.txt"]


def test_overwriting_keeps_the_earlier_result_if_the_new_one_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    result(out, "first")
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if Path(target) == out and not (Path(source) / "sub" / "a.txt").read_text() == "first":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(CheckpointError, match=r"out: could not be written: .*No space left"):
        result(out, "second")
    assert (out / "sub" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_a_result_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match=r"has no report\.json, so it is not an earlier result"):
        files.check_new_folder(tmp_path, overwrite=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArgumentError, match=r"out: .* is a file"):
        files.check_new_folder(tmp_path / "out", overwrite=True)
    with (
        pytest.raises(CheckpointError, match="could not be written"),
        files.new_folder(tmp_path / "out" / "below"),
    ):
        pytest.fail("the block must not be entered")


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def race() -> None:
        with files.new_folder(out):
            out.mkdir()
            (out / "theirs.txt").write_text("someone else's")

    with pytest.raises(ArgumentError, match="not empty"):
        race()
    assert names(tmp_path) == ["out", "out/theirs.txt"]
