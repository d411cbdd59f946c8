"""Networks whose parameters lie in pieces on several processes: FSDP2 and tensor parallelism."""

from __future__ import annotations

import pytest
from helpers.in_pieces import METHODS, WAYS
from helpers.on_ranks import started

from stress.forks import Forks


@pytest.fixture(scope="module", autouse=True)
def _preloaded(forks: Forks) -> None:
    forks.preload("helpers.not_in_pieces", "transformers.models.llama.modeling_llama")


def check(of_case: dict, alone: list, name: str) -> None:
    """Bits and report are those of one process, and the network is laid out as before."""
    assert of_case["ranks"] == alone, name
    for promise in ("same layout", "same optimizer", "runs", "trains"):
        assert of_case[promise], (name, promise)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("task", "cases"), [("methods", METHODS), ("ways", WAYS)])
def test_networks_in_pieces_get_the_bits_of_one_process(forks, tmp_path, size, task, cases):
    found = started(forks, tmp_path, size, f"helpers.in_pieces:{task}")
    assert len(found[0]) >= len(cases) / 2
    for name in found[0]:
        alone = found[0][name]["alone"]
        for of_rank in found:
            check(of_rank[name], alone, name)
            gathered, plan = of_rank[name]["gathered"], of_rank[name]["plan"]
            assert 0 < gathered["pieces"] == plan["pieces"] <= gathered["bytes"]
            assert gathered["hooks"] >= 2
            if name == "offload":
                spilled, originals, pruned = of_rank[name]["written"]
                assert spilled >= gathered["bytes"]  # a page more for each
                assert originals == 0  # nothing is copied once more
                assert pruned > 0
                assert plan["network"] < gathered["bytes"]
        pieces = sum(of_rank[name]["gathered"]["pieces"] for of_rank in found)
        if name not in ("replicated", "parallel", "parallel, offload"):  # biases are everywhere
            assert pieces == found[0][name]["gathered"]["bytes"], name


def test_tensor_parallelism_within_fsdp(forks, tmp_path):
    found = started(forks, tmp_path, 4, "helpers.in_pieces:nested")
    for of_rank in found:
        check(of_rank, found[0]["alone"], "both")


REFUSED = {
    "no group": ("ArgumentError", "DTensor with pieces on the ranks [0, 1], and not all of them"),
    "small group": ("ArgumentError", "pass group, such as torch.distributed.group.WORLD"),
    "device": ("ArgumentError", "device: parameters such as 'embed.weight' are DTensors"),
    "FSDP1": ("ArgumentError", "shard it by fully_shard (FSDP2) instead"),
    "partial": ("ArgumentError", "parameter 'weight' is a DTensor that is a sum over ranks"),
    "meta": ("ArgumentError", "without values (on the device meta)"),
    "other pieces": ("ArgumentError", "not the same as on rank 0: parameter layers.0.down.weight"),
    "original": ("ArgumentError", "original: parameter 'embed.weight' is a DTensor"),
    "memory": ("MemoryError", "pass offload=DIR, or use fewer ranks"),
    "memory, offload": ("MemoryError", "a block at a time"),
    "folder": ("CheckpointError", "offload: "),
    "unknown": ("ArgumentError", "it has no hooks of torch.distributed"),
    "heads": ("ArgumentError", "it is tensor parallel, and with whole parameters, without hooks"),
    "guessed heads": ("ArgumentError", "torch.distributed, it returns something else"),
    "the way back": ("ArgumentError", "to which its whole value cannot be handed back"),
    "not finite": ("NonFiniteError", "layer 'embed'"),
    "handing back": ("MemoryError", "none left"),
    "the command": ("ArgumentError", "model: parameter 'embed.weight' is a DTensor, of which each"),
}


def test_what_is_refused_reaches_all_ranks_and_changes_nothing(forks, tmp_path):
    found = started(forks, tmp_path, 2, "helpers.not_in_pieces:refused")
    for of_rank in found:
        errors = {name: error for name, error in of_rank.items() if isinstance(error, list)}
        assert errors.keys() == REFUSED.keys()
        for name, (kind, text) in REFUSED.items():
            assert errors[name][0] == kind, (name, errors[name])
            assert text in errors[name][1], (name, errors[name])
            assert of_rank.get(f"{name}: as before", True), name
        assert of_rank["handed back"] > 3  # some pieces were written to, and then written back
    assert found[0]["the way back"][2] == found[0]["handing back"][2] == 1


def test_a_plan_counts_what_is_gathered(forks, tmp_path):
    for of_rank in started(forks, tmp_path, 2, "helpers.not_in_pieces:planned"):
        assert of_rank["same"]
        plan, text = of_rank["plan"]
        plain = of_rank["plain"]
        assert plan["pieces"] == of_rank["pieces"]
        assert plan["network"] == plain["network"]
        assert plan["memory"] if "memory" in plan else plan["layer"] == plain["layer"]
        assert plain["pieces"] == 0
        assert "of the gathered model and" in text
        plan, text = of_rank["offload"]
        assert plan["network"] <= plain["network"]
        assert plan["offloaded"] > 0
        assert "of pieces of it" in text
