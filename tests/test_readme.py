"""What the README and the package's docstring show is run here, and its numbers are those of
``bench/results``."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
from helpers.pages import blocks, rows_of_table

import lobs_native

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run_and_say_what_they_claim(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["0", "0.8"], ["2", "0.8"]]
    last = float(lines[1].split()[2])  # its outputs are the network's
    assert float(lines[2]) == pytest.approx(last**0.5, rel=1e-5)
    assert (tmp_path / "report.html").is_file()


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_the_set_up_commands_are_there():
    commands = blocks(README, "sh")
    assert commands[0].endswith('".[demo]" && .venv/bin/lobs-native demo\n')
    marked = README.split("<!-- test command -->\n```sh\n")[1]
    assert marked.startswith('python3 -m venv .venv && .venv/bin/pip install ".[test]" && ')


def test_its_table_of_quality_is_what_was_measured():
    measured = {
        (row["target"], row["method"], row["scope"], row["inputs"]): row["cosine"]
        for row in json.loads((ROOT / "bench/results/whole_encoder.json").read_text())["rows"]
    }
    columns = [
        ("magnitude", "layer", "dense"),
        ("wanda", "row", "dense"),
        ("sweep", "layer", "dense"),
        ("exact", "layer", "dense"),
        ("exact", "layer", "corrected"),
        ("exact", "model", "corrected"),
    ]
    rows = rows_of_table(README, "| | magnitude |")
    assert [row[0] for row in rows] == ["50%", "70%", "80%", "2:4"]
    for target, *shown in rows:
        name = f"{float(target[:-1]) / 100:g}" if target.endswith("%") else target
        for column, text in zip(columns, shown, strict=True):
            if text == "-":
                assert (name, *column) not in measured
            else:
                assert float(text) == pytest.approx(measured[(name, *column)], abs=5e-4)


def test_its_ratios_are_among_those_that_were_measured():
    measured = [
        row
        for file in (ROOT / "bench/results").glob("*-2-threads.json")
        for row in json.loads(file.read_text()).get("rows", ())  # networks have none
    ]
    for *_, ours, ratio in rows_of_table(README, "| what | rival |"):
        value, low, high = (float(x) for x in re.findall(r"[\d.]+", ratio))
        number, unit = ours.split()
        seconds = float(number) * {"ms": 1e-3, "s": 1}[unit]
        assert any(
            row["ratio"] == pytest.approx(value, rel=0.02)
            and row["interval"] == pytest.approx([low, high], rel=0.02)
            and row["ours_seconds"] == pytest.approx(seconds, rel=0.02)
            for row in measured
        ), ratio


def test_the_docstring_s_example_is_true():
    assert doctest.testmod(lobs_native).failed == 0
