"""Networks that get smaller."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.shrunk import SIZES, first, interrupt, same, states, tokens
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, CheckpointError, DtypeError
from lobs_native.network.shrinking.families import families_of

transformers = pytest.importorskip("transformers")


def llama(**other: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, **other}
    config = transformers.LlamaConfig(**{"num_key_value_heads": 2, **sizes})
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=64, num_attention_heads=4)
    return transformers.BertModel(config).eval()


def test_a_llama_keeps_half_of_its_neurons_and_heads_and_its_class_loads_it(tmp_path):
    model = llama()
    report = lobs.shrink(model, tokens(), keep=0.5, progress=False)
    for block in model.model.layers:
        assert block.mlp.gate_proj.weight.shape == block.mlp.up_proj.weight.shape == (32, 32)
        assert block.mlp.down_proj.weight.shape == (32, 32)
        assert block.self_attn.q_proj.weight.shape == (16, 32)
        assert block.self_attn.k_proj.weight.shape == block.self_attn.v_proj.weight.shape == (8, 32)
        assert block.self_attn.o_proj.weight.shape == (32, 16)
        assert (block.self_attn.o_proj.in_features, block.mlp.up_proj.out_features) == (16, 32)
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads) == (32, 2)
    assert (config.num_key_value_heads, config.head_dim) == (1, 8)
    assert report.configured
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
    assert report.multiplications[1] * 2 == report.multiplications[0]
    assert [(x.kind, x.units, len(x.kept)) for x in report.layers] == [
        ("heads", 2, 1),
        ("neurons", 64, 32),
    ] * 2
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for batch in tokens():
        assert torch.equal(first(loaded(batch)), first(model(batch)))
    generated = model.generate(tokens(1)[0][:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 19)  # with its cache of keys and values


def test_it_computes_what_the_repaired_network_with_zeros_does():
    small, zeroed, data = llama(), llama(), tokens()
    report = lobs.shrink(small, data, keep=0.5, progress=False)
    lobs.prune(
        zeroed,
        data,
        include=[x.readers[0] for x in report.layers],
        overrides={"*o_proj": {"pattern": "16 columns"}},
        pattern="columns",
        sparsity=0.5,
        progress=False,
    )
    for batch in data:
        assert torch.allclose(first(small(batch)), first(zeroed(batch)), atol=1e-6)
    for layer in report.layers:
        weight = zeroed.get_submodule(layer.readers[0]).weight
        size = weight.shape[1] // layer.units
        kept = (weight != 0).any(0).view(-1, size).any(1).nonzero()[:, 0].tolist()
        assert kept == list(layer.kept)


@torch.no_grad()
def test_repair_lowers_the_change_of_the_output():
    data, change = tokens(8), {}
    for method in ("exact", "wanda", "magnitude"):
        model = llama()
        before = [first(model(batch)) for batch in data]
        lobs.shrink(model, data, keep={"neurons": 0.5}, method=method, progress=False)
        after = [first(model(batch)) for batch in data]
        change[method] = sum(float((a - b).norm()) for a, b in zip(before, after, strict=True))
    assert change["exact"] < 0.8 * min(change["wanda"], change["magnitude"])


class OfOne(nn.Module):
    """Returns something for the first of the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())[:, 0]


def test_rows_count_as_much_as_the_output_depends_on_them():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(60, 4, 12, generator=generator) for _ in range(4)]
    for x in data:
        x[:, 0, 6:] = x[:, 1:, :6] = 0  # other rows have other features
    change = {}
    for weights in (None, "output"):
        torch.manual_seed(0)
        report = lobs.shrink(
            OfOne(), data, keep=0.25, token_weights=weights, pairs=0, progress=False
        )
        assert report.pruning.settings["token_weights"] == weights
        change[weights] = report.change
    assert change["output"] < 0.8 * change[None]


def test_heads_stay_where_the_configuration_cannot_say_how_many_there_are(tmp_path):
    model = bert()
    report = lobs.shrink(model, tokens(), keep=0.5, progress=False)
    assert {x.kind for x in report.layers} == {"neurons"}
    assert len(report.notes) == 1
    assert "heads stay: a BertModel" in report.notes[0]
    assert report.configured
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(first(loaded(tokens()[0])), first(model(tokens()[0])))
    model = bert()
    report = lobs.shrink(model, tokens(), keep=0.5, configured=False, progress=False)
    assert {x.kind for x in report.layers} == {"neurons", "heads"}
    assert not report.configured
    assert model.encoder.layer[0].attention.self.query.weight.shape == (16, 32)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def phi3() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))


def opt() -> nn.Module:
    sizes = {**SIZES, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def qwen3() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=16))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=32, hidden_dim=64, n_layers=2, n_heads=4
    )
    return transformers.DistilBertModel(config)


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (gpt2, {"neurons"}),
        (phi3, {"neurons"}),
        (opt, {"neurons"}),
        (qwen3, {"neurons", "heads"}),
        (distilbert, {"neurons"}),
    ],
)
def test_families_of_other_models(make, kinds):
    torch.manual_seed(0)
    model = make().eval()
    report = lobs.shrink(model, tokens(), keep=0.5, progress=False)
    assert {x.kind for x in report.layers} == kinds
    assert report.configured
    assert len(report.layers) == 2 * len(kinds)


def test_a_model_without_a_configuration():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    data = [torch.randn(4, 8, 32) for _ in range(3)]
    report = lobs.shrink(model, data, keep=0.25, progress=False)
    assert model.layers[1].linear1.weight.shape == (16, 32)
    assert not report.configured
    assert model(data[0]).shape == (4, 8, 32)


def test_a_share_of_the_parameters_is_the_target():
    model = llama()
    report = lobs.shrink(model, tokens(), parameters=0.7, multiple=4, progress=False)
    before, after = report.multiplications
    assert 0.65 * before < after <= 0.7 * before


def test_numbers_of_neurons_are_multiples():
    model = llama()
    report = lobs.shrink(model, tokens(), keep={"neurons": 0.4}, multiple=16, progress=False)
    assert [len(x.kept) for x in report.layers] == [32, 32]


def test_a_square_weight_that_is_stored_the_other_way_round():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_inner=32)).eval()
    report = lobs.shrink(model, tokens(), keep=0.5, progress=False)
    assert [len(x.kept) for x in report.layers] == [16, 16]
    assert model.transformer.h[0].mlp.c_proj.weight.shape == (16, 32)
    assert model.transformer.h[0].mlp.c_proj.nx == model.transformer.h[0].mlp.c_fc.nf == 16
    assert report.configured


def test_after_an_interruption_everything_is_as_it_was(monkeypatch):
    model = llama()
    before, config = states(model), copy.deepcopy(model.config.to_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lobs_native.network.shrinking.shrink._check_same", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lobs.shrink(model, tokens(), keep=0.5, progress=False)
    assert same(states(model), before)
    assert model.config.to_dict() == config


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["neurons and heads", "channels"])
def test_a_run_that_was_interrupted_is_resumed_with_the_same_bits(kind, tmp_path, monkeypatch):
    def made() -> tuple[nn.Module, list[Tensor]]:
        if kind != "channels":
            return llama(), tokens()
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)]
        return nn.Sequential(*layers).eval(), [torch.randn(4, 2, 9, 9) for _ in range(2)]

    settings: dict[str, Any] = {"keep": 0.5, "multiple": 2, "progress": False}
    whole, data = made()
    lobs.shrink(whole, data, **settings)
    interrupt(monkeypatch)
    model, _ = made()
    with pytest.raises(KeyboardInterrupt):
        lobs.shrink(model, data, run_dir=tmp_path / "run", **settings)
    report = lobs.shrink(model, data, run_dir=tmp_path / "run", **settings)
    assert report.pruning.settings["resumed layers"] == 1
    assert same(states(model), states(whole))
    other, _ = made()
    with pytest.raises(CheckpointError):
        lobs.shrink(other, data, run_dir=tmp_path / "run", **{**settings, "method": "magnitude"})
    assert same(states(other), states(made()[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ArgumentError, "keep, parameters, multiplications, latency: give exactly one"),
        ({"keep": 0.5, "parameters": 0.5}, ArgumentError, "latency: give exactly one"),
        ({"keep": 0.0}, ArgumentError, "keep: 0.0; something has to stay"),
        ({"keep": 1.0}, ArgumentError, "all units stay"),
        ({"keep": 1.5}, ArgumentError, "keep"),
        ({"multiplications": 1.0}, ArgumentError, "multiplications: with 1.0 and multiples of 8"),
        ({"latency": 0.0}, ArgumentError, "latency: 0.0; something has to stay"),
        ({"parameters": 0.01}, ArgumentError, "parameters: 0.01; with the fewest units"),
        ({"keep": "half"}, DtypeError, "keep"),
        ({"keep": {"layers": 0.5}}, ArgumentError, "keep"),
        ({"keep": 0.5, "kinds": ("layers",)}, ArgumentError, "kinds"),
        ({"keep": 0.5, "kinds": ("channels",)}, ArgumentError, "channels stay: a Llama"),
        ({"keep": 0.5, "multiple": 0}, ArgumentError, "multiple"),
        ({"keep": 0.5, "method": "admm"}, ArgumentError, "method"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_changed(arguments, error, message):
    model = llama()
    before = states(model)
    with pytest.raises(error, match=message):
        lobs.shrink(model, tokens(), progress=False, **arguments)
    assert same(states(model), before)


def test_a_model_without_units_is_refused():
    assert list(families_of(nn.Sequential(nn.Linear(4, 4)))) == []
    with pytest.raises(ArgumentError, match="model: it has no feed-forward layers, attention, ch"):
        lobs.shrink(nn.Sequential(nn.Linear(4, 4)), [torch.randn(8, 4)], keep=0.5)


def test_a_number_that_the_configuration_refuses_is_reported():
    """32 is no multiple of 6 heads, as the configuration wants it to be; of 4 it is."""
    for keep, heads in ((0.75, 6), (0.5, 4)):
        model = llama(num_attention_heads=8, num_key_value_heads=4)
        report = lobs.shrink(model, tokens(), keep={"heads": keep}, progress=False)
        assert model.config.num_attention_heads == heads
        assert report.configured == (heads == 4)
        assert any("it refuses one of the new numbers" in x for x in report.notes) == (heads == 6)
