"""The arithmetic of runs on many ranks, against what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ranks import plan

RESULTS = Path(__file__).resolve().parents[2] / "bench/results/ranks.json"


def test_bytes_and_shares_are_those_that_were_measured():
    rows = plan.check(RESULTS)
    assert {row["ranks"] for row in rows} == {3, 4}
    for row in rows:
        assert row["bytes, planned"] == pytest.approx(row["bytes, measured"], rel=0.01)
        busiest = row["busiest against mean, planned"]
        assert busiest == pytest.approx(row["busiest against mean, measured"], rel=0.05)


def test_a_slow_rank_and_a_slow_link_cost_what_they_must():
    config = {**plan.LLAMA_70B, "num_hidden_layers": 2}
    model, settings = plan.llama(config)
    jobs = plan.jobs_of(model, settings, "lm_head")
    assert len(jobs) == 14

    def planned(**how: float) -> dict[str, float]:
        machine = {"ranks": 8, "nodes": 1, "products": 1e13, "link": 1e10, "local": 1e10, **how}
        return plan.plan(jobs, 2**18, 128, True, plan.Machine(**machine))

    usual, slow = planned(), planned(slow=0.5)
    assert slow["calibrating, s"] == pytest.approx(2 * usual["calibrating, s"])
    assert slow["exchanging, s"] == usual["exchanging, s"]
    four = planned(ranks=32, nodes=4)
    assert four["calibrating, s"] == pytest.approx(usual["calibrating, s"] / 2), "16 chunks"
    assert planned(ranks=32, nodes=4, link=1e9)["exchanging, s"] > 5 * four["exchanging, s"]
    one = planned(ranks=1)
    assert one["exchanging, s"] == one["bytes sent by all"] == 0
    assert one["calibrating, s"] == pytest.approx(8 * usual["calibrating, s"])
