"""A sample of ``bench/ranks/matrix.py``: bits on several ranks, and the file of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks.group import keep
from ranks.matrix import CASES, compared, sizes_of
from ranks.networks import SMALL

from stress.forks import Forks

SAMPLE = {
    "llm": ["exact, model, pruned", "admm, layer, corrected"],
    "resnet": ["lobs, row, corrected", "sweep, layer, dense", "wanda, model, dense"],
}


@pytest.mark.parametrize("network", SAMPLE)
def test_a_sample_has_equal_bits_on_any_number_of_ranks(forks: Forks, network: str) -> None:
    forks.preload("transformers.models.llama.modeling_llama", "ranks.matrix")
    found = compared(forks, network, SAMPLE[network], every=False)
    assert found["different"] == []
    assert found["layers shared by rows"] > 0
    assert found["refused by one process and by all"] == [
        case for case in SAMPLE[network] if case.startswith("wanda, model")
    ]


def test_every_case_is_on_every_number_of_ranks_on_two_of_the_networks() -> None:
    for case in CASES:
        sizes = [n for network in SMALL for n in sizes_of(network, case, False)]
        assert sorted(sizes) == [2, 2, 3, 3, 4, 4]
        assert sizes_of("moe", case, True) == [2, 3, 4]


def test_a_bench_keeps_what_the_others_found(tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    keep(file, "kills", {"kills": 1})
    keep(file, "matrix", {"llm": 2})
    keep(file, "kills", {"kills": 3})
    results = json.loads(file.read_text())
    assert results["kills"]["found"] == {"kills": 3}
    assert results["matrix"]["found"] == {"llm": 2}
    assert results["kills"]["torch"]
