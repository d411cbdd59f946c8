"""The command line: exit codes, one-line errors, and that both ways of calling it are the same."""

import os
import subprocess
import sys

import pytest

import lobs_native
from lobs_native import cli, demo
from lobs_native.errors import LobsError


def test_version_is_the_version_of_the_package(capsys):
    assert cli.main(["--version"]) == cli.OK
    assert capsys.readouterr().out == f"lobs-native {lobs_native.__version__}\n"


def test_help_names_every_command_and_every_exit_code(capsys):
    assert cli.main(["--help"]) == cli.OK
    said = capsys.readouterr().out
    for word in ("demo", "doctor", "exit codes"):
        assert word in said
    for code in (cli.OK, cli.FAILED, 2, cli.INTERRUPTED, cli.READER_GONE):
        assert f"\n  {code} " in said


@pytest.mark.parametrize(
    "arguments", [[], ["prune"], ["demo", "--sparsity", "0.5"], ["doctor", "x"], ["demo", "--out"]]
)
def test_wrong_usage_ends_with_2_and_a_usage_line(arguments, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: lobs-native")


def test_an_error_of_the_package_is_one_printable_line_and_code_1(monkeypatch, tmp_path, capsys):
    def fail(**_):
        raise LobsError("layer 'a\nb\x1b[31m': no")

    monkeypatch.setattr(demo, "compare", fail)
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.FAILED
    captured = capsys.readouterr()
    assert captured.err == "lobs-native: layer 'a\\nb\\x1b[31m': no\n"
    assert captured.out == ""


def test_ctrl_c_ends_with_130_and_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "lobs-native: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_who_left_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lobs_native", "doctor"],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == cli.READER_GONE
    assert done.stderr == b""


def test_the_module_and_the_command_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "lobs_native", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"lobs-native {lobs_native.__version__}\n"
