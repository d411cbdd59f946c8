"""The pairs and their page: answers at small sizes, nothing timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from speed import paired, results_page


@pytest.mark.parametrize("group", paired.GROUPS)
def test_every_side_of_every_case_is_right(group: str) -> None:
    """run_case ends the program where an answer is wrong."""
    for case in paired.GROUPS[group](True):
        rows = list(paired.run_case(case, 1))
        assert [row.rival for row in rows] == [rival.label for rival in case.rivals.values()]
        assert all(row.ratio > 0 for row in rows)


def test_a_wrong_answer_ends_the_program() -> None:
    case = next(iter(paired.GROUPS["hessian"](True)))
    sides = {"ours": case.ours, "published": case.rivals["published"]}
    wrong_sides = {
        name: replace(side, answer=lambda side=side: case.answer(side) * 1.01)
        for name, side in sides.items()
    }
    rivals = {"published": wrong_sides["published"]}
    for wrong in (replace(case, ours=wrong_sides["ours"]), replace(case, rivals=rivals)):
        with pytest.raises(SystemExit, match=r"is wrong: error 0\.01"):
            list(paired.run_case(wrong, 1))


def row(case: str, ratio: float, low: float, high: float) -> dict[str, object]:
    return {
        "case": case, "rival": "x.T @ x", "pairs": 3, "ours_seconds": 0.002, "rival_seconds": 0.004,
        "ratio": ratio, "interval": [low, high], "unit": "GFLOP/s", "ours_rate": 1.0,
        "rival_rate": 0.5, "ours_error": 1e-7, "rival_error": 1e-7, "note": "a <note>",
    }  # fmt: skip


def test_the_page_has_all_rows_and_names_what_is_slower(tmp_path: Path) -> None:
    about = {"cpu": "a CPU", "cores": 2, "torch": "2.9", "load_at_start": [0.5, 1, 1],
             "backends": [["cpu", True, "cpu_v4"]]}  # fmt: skip
    rows = [row("fast & good", 480, 300, 510), row("slow", 0.02, 0.01, 0.03), row("even", 1, 0, 2)]
    first, second = ({"machine": about, "quick": False, "rows": rows[:2]},
                     {"machine": about, "quick": True, "rows": rows[2:]})  # fmt: skip
    results_page.write_page(
        tmp_path, [("a.json", json.loads(json.dumps(first))), ("b.json", second)]
    )
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.count("## ") == 3
    assert "| fast & good | x.T @ x | 4 | 2 | **480** [300, 510], 3 pairs |" in text
    assert "a CPU, 2 cores; cpu_v4; torch 2.9; load 0.5." in text
    assert text.count("measures nothing") == 1
    slower = text.partition("not faster")[2]
    assert slower.index("slow") < slower.index("even")
    assert "good" not in slower
    root = ElementTree.parse(tmp_path / "benchmarks.svg").getroot()
    named = "{http://www.w3.org/2000/svg}"
    dots = [float(dot.attrib["cx"]) for dot in root.iter(f"{named}circle")]
    assert len(dots) == 3
    assert dots[1] < dots[2] < dots[0]
    assert any("fast & good: x.T @ x" in (t.text or "") for t in root.iter(f"{named}text"))
