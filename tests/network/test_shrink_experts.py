"""Networks that lose whole experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.shrunk import same, states
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.network.shrinking.experts import expert_families, expert_removals

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, head_dim=8, num_local_experts=5)
    return transformers.MixtralForCausalLM(config)


def qwen() -> nn.Module:
    """Routing weights are not normalised; there is a shared expert."""
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SIZES, **sizes, num_experts=5)
    )


def gpt_oss() -> nn.Module:
    """Biases in router and experts, whose weights are stored the other way round."""
    config = transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=5)
    return transformers.GptOssForCausalLM(config)


def deepseek(groups: int = 1) -> nn.Module:
    """The choice has a bias of its own; the first block is dense. With groups of experts, fewer of
    them do not run."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    sizes = {**SIZES, **latent, "v_head_dim": 8, "num_key_value_heads": 2}
    routing = {"n_routed_experts": 6, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**sizes, **routing, n_group=groups, topk_group=1)
    return transformers.DeepseekV3ForCausalLM(config)


def ernie() -> nn.Module:
    """The bias of the choice is a row."""
    sizes = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 8}
    experts = {"moe_layer_start_index": 0, "moe_num_shared_experts": 1}
    config = transformers.Ernie4_5_MoeConfig(**SIZES, **sizes, **experts)
    return transformers.Ernie4_5_MoeForCausalLM(config)


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or ".gate." in name:
            nn.init.normal_(parameter, std=0.3)  # so that the choice matters
    return model


def tokens(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, 12), generator=generator) for _ in range(batches)]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch).logits


@pytest.mark.parametrize("make", [mixtral, qwen, gpt_oss, deepseek, ernie])
def test_the_stock_class_loads_a_network_with_fewer_experts(make, tmp_path):
    model = made(make)
    report = lobs.shrink(model, tokens(), keep={"experts": 0.6}, progress=False)
    assert report.configured
    assert {(x.kind, x.readers, len(x.kept) < x.units) for x in report.layers} == {
        ("experts", (), True)
    }
    assert report.pruning is None
    assert report.multiplications[0] == report.multiplications[1]
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens()[0]), logits(model, tokens()[0]))
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters[1]


def without(block: nn.Module, gone: set[int]) -> nn.Module:
    """A copy of a block of Mixtral without some experts, written out."""
    block = copy.deepcopy(block)
    stay = [e for e in range(block.experts.num_experts) if e not in gone]
    weights = (
        (block.experts, "gate_up_proj"),
        (block.experts, "down_proj"),
        (block.gate, "weight"),
    )
    for owner, part in weights:
        setattr(owner, part, nn.Parameter(getattr(owner, part).detach()[stay]))
    block.experts.num_experts = block.gate.num_experts = len(stay)
    return block


@torch.no_grad()
def test_the_cheapest_expert_goes_again_and_again_and_costs_are_those_of_running_the_block():
    model, data = made(mixtral), tokens()
    blocks = [layer.mlp for layer in model.model.layers]
    inputs: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}
    hooks = [
        b.register_forward_pre_hook(lambda module, args: inputs[module].append(args[0]))
        for b in blocks
    ]
    for batch in data:
        model(batch)
    for hook in hooks:
        hook.remove()
    session, notes = Session(model, data, None, None, 0, False), list[str]()
    with session.evaluating():
        found = expert_removals(list(expert_families(model)), session, notes)
    assert notes == []
    for block, removal in zip(blocks, found, strict=True):
        x = torch.cat(inputs[block])
        whole = block(x).double()
        gone, so_far = set[int](), 0.0
        for chosen, spent in zip(removal.order, removal.spent, strict=True):
            costs = {
                e: float((without(block, {*gone, e})(x).double() - whole).square().sum())
                / float(whole.square().sum())
                for e in range(5)
                if e not in gone
            }
            assert chosen == min(costs, key=costs.__getitem__)
            assert so_far + spent == pytest.approx(costs[chosen], rel=1e-4)
            so_far += spent
            gone.add(chosen)
        assert len(gone) == 3  # two of five stay: a row is routed to two


def test_padding_does_not_count():
    model, data = made(mixtral), tokens(2)
    padded = []
    for i, batch in enumerate(data):
        other = torch.full((2, 5), 7 + i)
        mask = torch.cat([torch.ones_like(batch), torch.zeros_like(other)], 1)
        padded.append({"input_ids": torch.cat([batch, other], 1), "attention_mask": mask})
    found = []
    for batches in ([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in data], padded):
        session = Session(model, batches, None, None, 0, False, token_mask=True)
        with session.evaluating():
            found.append(expert_removals(list(expert_families(model)), session, []))
    for a, b in zip(*found, strict=True):
        assert a.order == b.order
        assert a.spent == pytest.approx(b.spent, rel=1e-4)


def test_as_many_stay_as_a_row_is_routed_to():
    model = made(mixtral)
    report = lobs.shrink(model, tokens(), keep={"experts": 0.01}, progress=False)
    assert [len(x.kept) for x in report.layers] == [2, 2]
    assert logits(model, tokens()[0]).isfinite().all()


@pytest.mark.parametrize("inputs", ["corrected", "dense"])
def test_other_units_are_repaired_on_the_network_without_the_experts(inputs):
    both, apart = made(gpt_oss), made(gpt_oss)
    shares = {"experts": 0.6, "heads": 1.0}
    settings: dict[str, Any] = {"inputs": inputs, "multiple": 4, "progress": False}
    lobs.shrink(apart, tokens(), keep={"experts": 0.6}, **settings)
    report = lobs.shrink(both, tokens(), keep=shares, **settings)
    assert torch.equal(logits(both, tokens()[0]), logits(apart, tokens()[0]))
    assert report.pruning is None  # all heads stay

    both, apart = made(qwen), made(qwen)
    only = {"experts": 0.6, "neurons": 0.5}
    lobs.shrink(both, tokens(), keep=only, configured=False, **settings)
    for share in ({"experts": 0.6}, {"neurons": 0.5}):
        lobs.shrink(apart, tokens(), keep=share, configured=False, **settings)
    assert torch.allclose(logits(both, tokens()[0]), logits(apart, tokens()[0]), atol=1e-6)


def test_a_budget_of_parameters_takes_experts_and_one_of_multiplications_none():
    model = made(gpt_oss)
    report = lobs.shrink(model, tokens(), parameters=0.7, progress=False)
    assert {x.kind for x in report.layers} == {"experts"}  # there is one group of heads
    with pytest.raises(ArgumentError, match="experts stay: a row is routed to as many"):
        lobs.shrink(made(gpt_oss), tokens(), multiplications=0.7, progress=False)


def test_experts_that_have_to_come_in_groups_stay_and_are_named():
    model = made(lambda: deepseek(groups=2))
    before = states(model)
    with pytest.raises(ArgumentError, match=r"mlp\.experts: its experts stay: with fewer it does"):
        lobs.shrink(model, tokens(), keep={"experts": 0.6}, progress=False)
    assert same(states(model), before)
    assert model.config.n_routed_experts == 6


def test_after_an_interruption_the_experts_are_back(monkeypatch):
    model = made(mixtral)
    before, config = states(model), model.config.to_dict()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lobs_native.network.shrinking.shrink._check_same", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lobs.shrink(model, tokens(), keep=0.6, progress=False)
    assert model.config.to_dict() == config
    assert same(states(model), before)
    assert model.model.layers[0].mlp.experts.num_experts == 5
