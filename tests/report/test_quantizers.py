"""What quantising leaves of zeros: complete entries, as measured, and sentences that follow."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lobs_native.report import quantizers

MEASURED = "bench/results/quantizers.json"


def test_every_entry_has_a_source_and_a_date_and_those_measured_here_are_what_was_measured():
    rows = json.loads((Path(__file__).resolve().parents[2] / MEASURED).read_text())["rows"]
    measured = {f"{r['package']} {r['version'].partition('+')[0]}, {r['way']}": r for r in rows}
    for entry in quantizers.table():
        assert 0 <= entry.kept <= 1
        assert entry.source
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", entry.date)
        if entry.source == MEASURED:
            assert abs(measured.pop(entry.way)["kept"] - entry.kept) < 1e-4
    assert not measured


def test_the_sentences_and_the_table_say_which_keep_zeros():
    keeping, losing = quantizers.sentences()
    assert "optimum-quanto 0.2.7, qint8" in keeping
    assert "optimum-quanto 0.2.7, qint4 (0.0% stay)" in losing
    assert "GPTQModifier, NVFP4A16 (79.0% stay)" in losing
    lines = quantizers.markdown().splitlines()
    assert len(lines) == 2 + len(quantizers.table())
    shares = [line.split(" | ")[1] for line in lines[2:]]
    assert shares[0] == "0.0%"
    assert shares[-1] == "all"
