"""Blocks whose parameters are tuned together once their layers are pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.network.descent import Course
from lobs_native.network.tuning import tunable

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Two layers around a nonlinearity, a norm, and a gate that is not pruned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.sigmoid(self.gate(y)) * self.down(torch.tanh(2 * self.up(y)))


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(count: int = 12) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(24, 4, 8) for _ in range(count)]


OPTIONS: dict[str, Any] = {
    "sparsity": 0.6, "include": ["*.up", "*.down"], "tune": "blocks", "progress": False,
    "measure": "all",
}  # fmt: skip


@pytest.mark.parametrize("inputs", ["corrected", "pruned"])
def test_blocks_return_more_nearly_what_they_did(inputs):
    plain, tuned, original = Net(), Net(), Net()
    before = lobs.prune(plain, data(), inputs=inputs, **{**OPTIONS, "tune": None})
    after = lobs.prune(tuned, data(), inputs=inputs, **OPTIONS)
    first, second = after.settings["tuned"]
    assert (first["name"], second["name"]) == ("blocks.0", "blocks.1")
    for block in (first, second):
        assert block["kept"]
        assert block["held_back_after"] < block["held_back_before"]
        assert block["error_after"] < block["error_before"]
    assert after.error_bound.measured < before.error_bound.measured
    assert all("errors are of before" in layer.notes[-1] for layer in after.layers)
    for name, p in tuned.named_parameters():
        same = torch.equal(p, original.get_parameter(name))
        assert same == ("gate" in name or "head" in name), name
        if name.endswith(("up.weight", "down.weight")):
            assert bool(((p == 0) == (plain.get_parameter(name) == 0)).all() or "1" in name)
            assert int((p == 0).sum()) == round(0.6 * p.numel())
    assert all(p.requires_grad and p.grad is None for p in tuned.parameters())


def test_the_error_is_that_of_the_block_on_the_data_that_is_held_back():
    tuned, original, batches = Net(), Net(), data()
    report = lobs.prune(tuned, batches, **OPTIONS)
    with torch.no_grad():
        x = batches[6]  # the middle of the only tenth
        y, now = original.blocks[0](x), tuned.blocks[0](x)
    expected = float((now - y).norm() / y.norm())
    assert report.settings["tuned"][0]["held_back_after"] == pytest.approx(expected, 1e-5)


def test_the_same_seed_gives_the_same_network():
    first, second, other = Net(), Net(), Net()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        lobs.prune(model, data(), seed=seed, **OPTIONS)
    assert all(torch.equal(p, second.get_parameter(n)) for n, p in first.named_parameters())
    assert not torch.equal(first.blocks[0].up.weight, other.blocks[0].up.weight)


def test_a_block_that_does_not_get_better_keeps_its_values(monkeypatch):
    too_far = Course(passes=2, rate=3.0, seed=0)
    monkeypatch.setattr("lobs_native.network.tuning._BLOCKS", too_far)
    plain, tuned = Net(), Net()
    lobs.prune(plain, data(), **{**OPTIONS, "tune": None})
    report = lobs.prune(tuned, data(), **OPTIONS)
    assert [block["kept"] for block in report.settings["tuned"]] == [False, False]
    assert all(torch.equal(p, tuned.get_parameter(n)) for n, p in plain.named_parameters())
    assert not any("errors are of before" in n for layer in report.layers for n in layer.notes)


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_run_that_was_killed_resumes_with_the_bits_of_a_whole_one(tmp_path, monkeypatch, stopped):
    """It ends before a block is tuned, or after the last one."""
    from lobs_native.network import pruning, tuning

    whole, resumed = Net(), Net()
    lobs.prune(whole, data(), **OPTIONS)
    calls = 0
    really = tuning.descend

    def tune(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > stopped:
            raise KeyboardInterrupt
        return really(*args, **options)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    untouched = Net().state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "descend", tune)
        patch.setattr(pruning, "error_bound_of", end)
        with pytest.raises(KeyboardInterrupt):
            lobs.prune(resumed, data(), run_dir=tmp_path / "run", **OPTIONS)
    assert all(torch.equal(v, untouched[k]) for k, v in resumed.state_dict().items())
    calls, left = 0, 2 - stopped
    stopped = 2
    monkeypatch.setattr(tuning, "descend", tune)
    report = lobs.prune(resumed, data(), run_dir=tmp_path / "run", **OPTIONS)
    assert calls == left
    assert len(report.settings["tuned"]) == 2
    assert all("errors are of before" in layer.notes[-1] for layer in report.layers)
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_half_precision_is_tuned_in_single_precision():
    model = Net().bfloat16()
    report = lobs.prune(model, [x.bfloat16() for x in data()], **OPTIONS)
    assert any(block["kept"] for block in report.settings["tuned"])
    assert int((model.blocks[0].up.weight == 0).sum()) >= round(0.6 * 128)
    assert model.blocks[0].up.weight.dtype == torch.bfloat16


def test_what_is_tuned():
    model = Net()
    model.blocks[0].norm.weight = model.blocks[1].norm.weight  # used outside of the block as well
    pruned = {n: p for n, p in model.named_parameters() if ".up." in n or "0.down." in n}
    assert tunable(model.blocks[0], pruned, model) == [
        "blocks.0.norm.bias", "blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.weight",
        "blocks.0.down.bias",
    ]  # fmt: skip
    assert tunable(model.blocks[1], pruned, model) == [
        "blocks.1.norm.bias", "blocks.1.up.weight", "blocks.1.up.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"inputs": "dense"}, {"blocks": None}, {"include": "head"}, {"batches": 1}]
)
def test_it_is_refused_without_blocks_or_data_to_hold_back(wrong):
    options = {**OPTIONS, **wrong}
    batches = data(options.pop("batches", 3))
    model, before = Net(), Net().state_dict()
    with pytest.raises(ArgumentError, match=r"tune: 'blocks' needs a stack .*; use None"):
        lobs.prune(model, batches, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_plan_counts_what_tuning_takes(monkeypatch):
    """The targets as one more set of hidden states; and four copies of the values in float32, with
    masks and one gradient more, where that is more than a layer takes."""
    plans = [lobs.plan_prune(Net(), data(), **{**OPTIONS, "tune": t}) for t in (None, "blocks")]
    assert plans[1].states == plans[0].states + 12 * 24 * 4 * 8 * 4
    assert plans[1].layer == plans[0].layer
    monkeypatch.setattr("lobs_native.network.resources._layer_memory", lambda *_: 1000)
    plan = lobs.plan_prune(Net(), data(), **OPTIONS)
    assert plan.layer == 17 * (2 * 8 + 2 * 8 * 16 + 16 + 8) + 4 * 8 * 16
