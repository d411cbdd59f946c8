"""Whole blocks that leave a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.shrunk import SIZES, first, interrupt, same, states, tokens
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.network.shrinking import blocks, shrink_plan

transformers = pytest.importorskip("transformers")

DEPTH = {**SIZES, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4}


def llama(**other: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{"num_key_value_heads": 2, **DEPTH, **other})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:  # so that blocks matter, some more than others
            block.mlp.down_proj.weight *= 20 * (1 + block.self_attn.layer_idx % 2)
    return model


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**DEPTH, num_key_value_heads=2, head_dim=8, sliding_window=4)
    return transformers.Gemma2ForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**DEPTH)).eval()


def gpt2(**other: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=60, **sizes, **ends, **other)
    return transformers.GPT2LMHeadModel(config).eval()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def plain() -> nn.Sequential:
    """Without a configuration, and a head that has another shape."""
    torch.manual_seed(0)
    blocks = [Residual(8) for _ in range(4)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3)).eval()


def rows(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 6, generator=generator) for _ in range(batches)]


def bypassed(model: nn.Module, gone: list[int]) -> nn.Module:
    """A Llama whose blocks of these numbers return what they read."""
    model = copy.deepcopy(model)
    for i in gone:
        model.model.layers[i].forward = lambda x, *_, **__: x
    return model


@pytest.mark.parametrize("network", [llama, gemma2, bert, gpt2])
def test_the_class_loads_what_is_left_and_it_returns_the_same(tmp_path, network):
    model = network()
    before = sum(p.numel() for p in model.parameters())
    report = lobs.shrink(model, tokens(), keep={"blocks": 0.5}, pairs=0, progress=False)
    assert report.configured
    assert model.config.num_hidden_layers == 2
    (found,) = report.layers
    assert (found.kind, found.units, len(found.kept)) == ("blocks", 4, 2)
    assert report.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert 2 * report.multiplications[1] == report.multiplications[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for batch in tokens():
        assert torch.equal(first(loaded(batch)), first(model(batch)))
    if network is not bert:
        options = {"max_new_tokens": 3, "do_sample": False}
        with_cache, without = (
            model.generate(tokens(1)[0][:1], **options, use_cache=cache) for cache in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_lists_of_the_configuration_follow_the_blocks():
    model = gemma2()
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    report = lobs.shrink(model, tokens(), keep={"blocks": 0.75}, pairs=0, progress=False)
    assert model.config.layer_types == [kinds[i] for i in report.layers[0].kept]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]


@torch.no_grad()
def test_what_goes_is_that_without_which_the_output_changes_least(monkeypatch):
    monkeypatch.setattr(blocks, "vocabulary_of", lambda model: None)
    model = llama()
    wanted = torch.cat([first(model(x)) for x in tokens()])

    def loss(gone: list[int]) -> float:
        found = torch.cat([first(bypassed(model, gone)(x)) for x in tokens()])
        return float((found - wanted).square().sum() / wanted.square().sum())

    gone: list[int] = []
    for _ in range(2):
        gone.append(min({0, 1, 2, 3} - set(gone), key=lambda i: loss([*gone, i])))
    small = copy.deepcopy(model)
    report = lobs.shrink(small, tokens(), keep={"blocks": 0.5}, pairs=0, progress=False)
    assert set(report.layers[0].kept) == {0, 1, 2, 3} - set(gone)
    assert report.layers[0].error == pytest.approx(loss(gone), rel=1e-3)


def test_the_layer_before_a_gap_makes_up_for_it(monkeypatch):
    data, change = [torch.randint(60, (8, 32)) for _ in range(8)], {}
    for repaired in (True, False):
        model = llama()
        monkeypatch.setattr(
            shrink_plan,
            "block_removals",
            lambda *_: [shrink_plan.Removal([2], [0.1])],
        )
        if not repaired:
            monkeypatch.setattr("lobs_native.network.shrinking.shrink.gaps_filled", lambda *_: [])
        report = lobs.shrink(model, data, keep={"blocks": 0.75}, pairs=0, progress=False)
        if repaired:
            assert report.layers[0].readers == ("model.layers.1.mlp.down_proj",)
        change[repaired] = report.change
    assert change[True] < 0.9 * change[False]


def test_without_additions_nothing_is_repaired_and_a_note_says_so():
    model, before = bert(), states(bert())
    report = lobs.shrink(model, tokens(), keep={"blocks": 0.75}, pairs=0, progress=False)
    (found,) = report.layers
    assert found.readers == ()
    assert any("nothing makes up for blocks" in note for note in report.notes)
    left = states(model)
    for new, old in enumerate(found.kept):
        for name, x in left.items():
            if name.startswith(f"encoder.layer.{new}."):
                rest = name.removeprefix(f"encoder.layer.{new}.")
                assert torch.equal(x, before[f"encoder.layer.{old}.{rest}"])


def test_blocks_stay_whose_number_the_class_turns_into_something_else():
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    scales = [block.attn.scaling for block in model.transformer.h]
    report = lobs.shrink(model, tokens(), keep={"blocks": 0.5}, pairs=0, progress=False)
    assert report.layers[0].kept == (0, 1, 2)
    assert report.configured
    assert [block.attn.scaling for block in model.transformer.h] == scales[:3]
    assert "blocks 0, 1, 2 stay: a GPT2LMHeadModel made from" in report.notes[0]
    report = lobs.shrink(
        model, tokens(), keep={"blocks": 0.5}, configured=False, pairs=0, progress=False
    )
    assert len(model.transformer.h) == 2


def test_blocks_stay_unless_they_are_asked_for():
    report = lobs.shrink(llama(), tokens(), keep=0.5, pairs=0, progress=False)
    assert {family.kind for family in report.layers} == {"heads", "neurons"}


def test_other_units_are_chosen_in_what_is_left():
    model = llama()
    report = lobs.shrink(
        model, tokens(), keep={"blocks": 0.5, "neurons": 0.5}, pairs=0, progress=False
    )
    assert [family.kind for family in report.layers] == ["blocks", "neurons", "neurons"]
    assert [family.readers for family in report.layers[1:]] == [
        (f"model.layers.{i}.mlp.down_proj",) for i in range(2)
    ]
    assert len(model.model.layers) == 2
    assert model.model.layers[1].mlp.down_proj.in_features == 32
    assert report.configured


@pytest.mark.parametrize("budget", ["parameters", "multiplications"])
def test_a_budget_counts_the_blocks(budget):
    options = {budget: 0.5, "kinds": ("blocks", "neurons"), "pairs": 0, "progress": False}
    model = llama()
    report = lobs.shrink(model, tokens(), **options)
    assert report.multiplications[1] <= 0.5 * report.multiplications[0]
    assert {family.kind for family in report.layers} == {"blocks", "neurons"}
    network = plain()
    report = lobs.shrink(network, rows(), multiple=2, **options)
    assert report.multiplications[1] <= 0.5 * report.multiplications[0]


def test_entries_of_a_sequential_go_and_others_are_numbered_anew():
    network = plain()
    report = lobs.shrink(network, rows(), keep={"blocks": 4 / 6}, pairs=0, progress=False)
    (found,) = report.layers
    assert (found.units, len(found.kept)) == (6, 4)
    assert {0, 5} < set(found.kept)  # which are no blocks
    assert list(network._modules) == ["0", "1", "2", "3"]
    assert isinstance(network[3], nn.Linear)
    assert not report.configured


class Counted(nn.Module):
    """Reads its third block by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return self.head(self.blocks[2](x))


def test_what_the_network_does_not_run_without_stays_and_is_named():
    network = Counted().eval()
    before = states(network)
    with pytest.raises(ArgumentError, match="block 0 stays: the network does not work"):
        lobs.shrink(network, rows(), keep={"blocks": 0.5}, pairs=0, progress=False)
    assert same(before, states(network))


def test_on_an_error_all_blocks_come_back(monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("enough")

    monkeypatch.setattr("lobs_native.network.shrinking.shrink.memory_of", fail)
    model = llama()
    before, config = states(model), model.config.to_dict()
    with pytest.raises(RuntimeError, match="enough"):
        lobs.shrink(model, tokens(), keep={"blocks": 0.5}, pairs=0, progress=False)
    assert same(before, states(model))
    assert config == model.config.to_dict()
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]


def test_an_interrupted_run_goes_on_in_what_is_left(tmp_path, monkeypatch):
    options: dict[str, Any] = {"keep": {"blocks": 0.5, "neurons": 0.5}, "pairs": 0}
    whole = llama()
    lobs.shrink(whole, tokens(), progress=False, **options)
    interrupt(monkeypatch)
    model, options = llama(), options | {"run_dir": tmp_path / "run", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        lobs.shrink(model, tokens(), **options)
    assert same(states(model), states(llama()))
    report = lobs.shrink(model, tokens(), **options)
    assert report.pruning.settings["resumed layers"] == 1
    assert same(states(model), states(whole))


def test_no_blocks_are_told_from_others():
    with pytest.raises(ArgumentError, match="kinds"):
        lobs.shrink(llama(), tokens(), keep=0.5, kinds=("block",), progress=False)
    with pytest.raises(ArgumentError, match="has no"):
        lobs.shrink(nn.Sequential(nn.Linear(6, 4)), rows(), keep={"blocks": 0.5}, progress=False)
