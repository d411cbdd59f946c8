"""What keeps its units, what goes with them, and that a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.shrunk import SIZES, first, same, states, tokens
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError

transformers = pytest.importorskip("transformers")


class Watched(nn.Module):
    """Something reads a neuron beside the layer that is meant to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        return self.fc2(hidden) + hidden.mean(1, keepdim=True)


def test_what_something_else_depends_on_is_refused_and_nothing_is_changed():
    torch.manual_seed(0)
    model = Watched()
    before, parameters = states(model), list(model.parameters())
    with pytest.raises(ArgumentError, match="16 neurons before fc2 stay: without one of them"):
        lobs.shrink(model, [torch.randn(32, 8)], keep=0.5, progress=False)
    assert same(states(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert (model.fc1.out_features, model.fc2.in_features) == (16, 16)


class Viewed(nn.Module):
    """Something has the number of neurons from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu().view(-1, 2, 8).flatten(1))


def test_sizes_that_do_not_fit_any_more_are_refused_and_nothing_is_changed():
    torch.manual_seed(0)
    model = Viewed()
    before = states(model)
    with pytest.raises(ArgumentError, match="16 neurons before fc2 stay: without one of them"):
        lobs.shrink(model, [torch.randn(3, 8)], keep=0.5, progress=False)
    assert same(states(model), before)


class Counted(Watched):
    """Something depends on the number of neurons once it is small."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        return self.fc2(hidden) + float(hidden.shape[1] < 12)


def test_what_shows_only_when_many_units_are_gone_is_refused_and_nothing_is_changed():
    torch.manual_seed(0)
    model = Counted()
    before, parameters = states(model), list(model.parameters())
    with pytest.raises(ArgumentError, match="something else depends on them"):
        lobs.shrink(model, [torch.randn(32, 8)], keep=0.5, kinds=["neurons"], progress=False)
    assert same(states(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert (model.fc1.out_features, model.fc2.in_features) == (16, 16)


class Sizes:
    """A configuration."""

    def __init__(self, intermediate_size: int) -> None:
        self.intermediate_size = intermediate_size

    def __getattr__(self, name: str) -> Any:
        if name == "num_attention_heads":
            raise RuntimeError("it may vary across layers")
        raise AttributeError(name)


class Branches(nn.Module):
    """Two feed-forward layers, of which the data reach one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.used, self.spare = (
            nn.ModuleDict(
                {
                    "fc1": nn.Linear(8, config.intermediate_size),
                    "fc2": nn.Linear(config.intermediate_size, 8),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.used["fc2"](self.used["fc1"](x).relu())


def test_what_no_data_reach_stays_and_is_named():
    torch.manual_seed(0)
    model, data = Branches(Sizes(16)), [torch.randn(32, 8)]
    report = lobs.shrink(model, data, keep=0.5, configured=False, progress=False)
    assert [x.readers for x in report.layers] == [("used.fc2",)]
    assert model.spare["fc2"].in_features == 16
    note = next(note for note in report.notes if "spare.fc2" in note)
    assert "never called" in note

    model = Branches(Sizes(16))
    before = states(model)
    with pytest.raises(ArgumentError, match="the configuration has one number for all"):
        lobs.shrink(model, data, keep=0.5, kinds=["neurons"], progress=False)
    assert same(states(model), before)


class Twins(Branches):
    """The same number of the configuration is the size of something else."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spare = nn.Linear(config.intermediate_size, 3)


def test_units_stay_whose_number_is_the_size_of_something_else_too():
    with pytest.raises(ArgumentError, match="neurons stay: a Twins made from its configuration"):
        lobs.shrink(Twins(Sizes(16)), [torch.randn(32, 8)], keep=0.5, kinds=["neurons"])


def gpt_oss() -> nn.Module:
    """Attention with a sink for each head."""
    sizes = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.GptOssConfig(**sizes, head_dim=8, num_local_experts=4)
    return transformers.GptOssForCausalLM(config)


def afmoe() -> nn.Module:
    """Attention whose output is gated."""
    sizes = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.AfmoeConfig(**sizes, **experts, head_dim=8, num_dense_layers=1)
    return transformers.AfmoeForCausalLM(config)


@pytest.mark.parametrize("make", [gpt_oss, afmoe])
def test_what_else_has_an_entry_for_each_head_goes_with_it(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter)
    report = lobs.shrink(model, tokens(), keep={"heads": 0.5}, progress=False)
    assert [(x.kind, x.units, len(x.kept)) for x in report.layers] == [("heads", 2, 1)] * 2
    assert report.configured
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(first(loaded(tokens()[0])), first(model(tokens()[0])))


def t5() -> nn.Module:
    """Encoder and decoder have copies of the configuration."""
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    return transformers.T5Model(transformers.T5Config(**sizes, num_layers=1))


def qwen2_moe() -> nn.Module:
    """Three fields of the configuration have the number, of which one is that of the neurons."""
    sizes = {**SIZES, "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=64)
    return transformers.Qwen2MoeModel(config)


@pytest.mark.parametrize(
    ("make", "field"), [(t5, "d_ff"), (qwen2_moe, "shared_expert_intermediate_size")]
)
def test_the_field_that_the_class_reads_is_found(make, field, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    data = [{"input_ids": batch} for batch in tokens()]
    if make is t5:
        data = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in data]
    report = lobs.shrink(model, data, keep={"neurons": 0.5}, progress=False)
    assert report.configured
    assert {len(x.kept) for x in report.layers} == {32}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert getattr(loaded.config, field) == 32
    assert torch.equal(first(loaded(**data[0])), first(model(**data[0])))


class Towers(Branches):
    """The number of one is its field of the configuration alone, that of the other of more."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.ffn_dim
        self.spare = nn.ModuleDict({"fc1": nn.Linear(8, width), "fc2": nn.Linear(width, 8)})
        self.also = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.spare["fc2"](self.spare["fc1"](x).relu())


def test_some_of_a_size_stay_where_others_can_go():
    torch.manual_seed(0)
    config = Sizes(16)
    config.ffn_dim = 16
    model = Towers(config)
    report = lobs.shrink(model, [torch.randn(32, 8)], keep=0.5, kinds=["neurons"], progress=False)
    assert report.configured
    assert [x.readers for x in report.layers] == [("used.fc2",)]
    assert (config.intermediate_size, config.ffn_dim) == (8, 16)


class Derived(Sizes):
    """A configuration that, read from a file, has the size that another field gives."""

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": 2}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        return cls(8 * values["ratio"])


def test_units_stay_whose_number_does_not_outlast_a_file():
    with pytest.raises(ArgumentError, match="neurons stay: a Branches made from its configuration"):
        lobs.shrink(Branches(Derived(16)), [torch.randn(32, 8)], keep=0.5, kinds=["neurons"])
