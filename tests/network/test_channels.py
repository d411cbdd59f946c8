"""Channels that are removed from convolutional networks: what is tied goes together, and what is
left computes what the network with zeros does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.calibration.session import Session
from lobs_native.calibration.ties import Ties
from lobs_native.errors import ArgumentError
from lobs_native.network.shrinking import shrink as shrinking
from lobs_native.network.shrinking.channels import channel_families


class Network(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(self, run: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inside: int, outside: int, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, padding=size // 2, **settings)


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def plain() -> nn.Module:
    return nn.Sequential(
        conv(2, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(8, 12),
        nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10), nn.GELU(), nn.Linear(10, 3),
    )  # fmt: skip


def residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        x = functional.relu(x + m.bn(m.second(m.first(x).relu())))
        return m.head(functional.silu(x + m.direct(x) * m.scale(x)))

    return Network(
        run,
        stem=conv(2, 8),
        first=conv(8, 6),
        second=conv(6, 8, bias=False),
        bn=nn.BatchNorm2d(8),
        direct=conv(8, 8, 1),
        scale=nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 4, 1), nn.ReLU(), conv(4, 8, 1)),
        head=head(8),
    )


def concatenated() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.a(x).relu()
        b = functional.interpolate(m.b(functional.avg_pool2d(x, 2)), scale_factor=2.0)
        both = torch.cat([a, b], 1)
        return m.head(torch.cat([m.c(both), both], 1))

    return Network(run, a=conv(2, 8), b=conv(2, 6), c=conv(14, 4), head=head(18))


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(2, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8, bias=False),
        nn.BatchNorm2d(8), nn.Hardswish(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.PReLU(6),
        conv(6, 4), head(4),
    )  # fmt: skip


def images(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 2, 8, 8, generator=generator) for _ in range(count)]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        lobs.reestimate_batch_norm(model, images(6))
    return model


def families(model: nn.Module) -> tuple[dict[tuple[str, ...], int], list[str]]:
    notes: list[str] = []
    session = Session(model, images(1), None, None, 0, progress=False)
    with session.evaluating():
        found = channel_families(model, session, images(1)[0], notes)
    return {f.producers: f.units for f in found}, notes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (plain, {("0",): 8, ("4",): 12, ("7",): 10}),
        (residual, {("stem", "second", "direct", "scale.3"): 8, ("first",): 6, ("scale.1",): 4}),
        (concatenated, {("a", "b", "c"): 18}),
        (depthwise, {("0",): 8, ("6",): 6, ("8",): 4}),
    ],
)
def test_what_is_tied_is_of_one_family(make, expected):
    found, notes = families(made(make))
    assert found == expected
    assert any("the model returns them" in note for note in notes)


@torch.no_grad()
@pytest.mark.parametrize("make", [plain, residual, concatenated, depthwise])
@pytest.mark.parametrize("method", ["exact", "magnitude"])
def test_it_computes_what_the_repaired_network_with_zeros_does(make, method, monkeypatch):
    """What is compared is what ``shrink`` itself compares, and another batch besides."""
    monkeypatch.setattr(shrinking, "_renormed", lambda *_: 0)
    model = made(make)
    zeros: list[nn.Module] = []
    original = shrinking.take_out

    def keep_a_copy(network: nn.Module, *rest: Any) -> None:
        zeros.append(copy.deepcopy(network))
        original(network, *rest)

    monkeypatch.setattr(shrinking, "take_out", keep_a_copy)
    report = lobs.shrink(model, images(), keep=0.5, multiple=2, method=method, progress=False)
    assert report.parameters[1] < report.parameters[0]
    assert all(len(x.kept) * 2 in (x.units, x.units + 1, x.units + 2) for x in report.layers)
    other = images(4)[3]
    torch.testing.assert_close(model(other), zeros[0](other), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_repair_and_choice_lower_the_change_of_the_output():
    data, change = images(6), {}
    for method in ("exact", "wanda", "magnitude"):
        model = made(residual)
        before = [model(x) for x in data]
        lobs.shrink(model, data, keep=0.5, multiple=2, method=method, progress=False)
        change[method] = sum(
            float((a - model(x)).norm()) for a, x in zip(before, data, strict=True)
        )
    assert change["exact"] < 0.8 * min(change["wanda"], change["magnitude"])


def test_sizes_of_modules_follow():
    model = made(depthwise)
    lobs.shrink(model, images(), keep=0.5, multiple=1, progress=False)
    assert (model[0].out_channels, model[1].num_features) == (4, 4)
    assert (model[3].groups, model[3].in_channels, model[3].out_channels) == (4, 4, 4)
    assert model[3].weight.shape == (4, 1, 3, 3)
    model.train()
    model(images()[0]).sum().backward()  # it can be trained further
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def mixing(how: Callable[[Tensor], Tensor]) -> nn.Module:
    return Network(lambda m, x: m.head(m.b(how(m.a(x)))), a=conv(2, 8), b=conv(8, 4), head=head(4))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (lambda x: x.softmax(1), "a softmax goes over them"),
        (lambda x: x.roll(1, 1), "aten::roll reads them"),
        (lambda x: x + torch.arange(8.0)[:, None, None], "a tensor of fixed size"),
        (lambda x: x - x.mean(1, keepdim=True), "they are summed"),
        (lambda x: functional.layer_norm(x, x.shape[1:]), "aten::native_layer_norm reads them"),
        (lambda x: x.view(-1, 2, 4, 8, 8).flatten(1, 2), "an axis is divided"),
        (lambda x: torch.cat([x[:, :3], x[:, 3:]], 1), "they are divided at fixed places"),
        (lambda x: functional.pixel_shuffle(x, 2).repeat(1, 4, 1, 1), "aten::pixel_shuffle"),
        (lambda x: x * (x.flatten(2) @ x.flatten(2).mT).sum((1, 2))[:, None, None, None], "bmm"),
    ],
)
def test_what_mixes_channels_keeps_them_and_is_named(how, why):
    found, notes = families(made(lambda: mixing(how)))
    assert ("a",) not in found
    assert found == {("b",): 4}
    assert any(note.startswith("a: its outputs stay: ") and why in note for note in notes)


def test_shared_weights_and_groups_stay():
    shared = made(lambda: mixing(lambda x: x))
    shared.c = conv(8, 4)
    shared.c.weight = shared.b.weight
    shared.run = lambda m, x: m.head(m.b(m.a(x)) + m.c(m.a(x)))
    found, notes = families(shared)
    assert found == {("b",): 4} or found == {}
    assert any("whose weight is shared" in note for note in notes)
    grouped = made(lambda: nn.Sequential(conv(2, 8), conv(8, 8, groups=2), conv(8, 4), head(4)))
    found, notes = families(grouped)
    assert found == {("2",): 4}
    assert any("a convolution with groups" in note for note in notes)


def test_a_unit_that_the_program_counts_itself_stays():
    """It is found by running the network without one channel."""
    counted = made(lambda: mixing(lambda x: x[torch.arange(len(x))] if x.shape[1] == 8 else -x))
    notes: list[str] = []
    report = lobs.shrink(counted, images(), keep=0.5, multiple=1, progress=False)
    assert [x.producers for x in report.layers] == [("b",)]
    assert any(note.startswith("a: ") for note in report.notes)
    assert not notes


def test_a_tensor_that_a_model_keeps_has_no_labels_of_an_earlier_look():
    model = plain()
    assert Ties(model)._mark != Ties(model)._mark  # the first is freed before the second is made


def test_computed_weights_stay():
    model = mixing(lambda x: x)
    model.b = nn.utils.parametrizations.weight_norm(conv(8, 4))
    found, notes = families(made(lambda: model))
    assert found == {}
    assert any(note.startswith("a: its outputs stay: aten::convolution") for note in notes)


class Mixing(nn.Module):
    """A feed-forward layer by its names, with a convolution in between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 16), nn.Linear(16, 4)
        self.between = nn.Conv1d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x).mT).mT.relu())


def test_what_is_seen_between_layers_goes_with_them():
    torch.manual_seed(0)
    model = Mixing().eval()
    report = lobs.shrink(model, [torch.randn(8, 12, 4)], keep=0.5, progress=False)
    assert [(x.kind, len(x.kept)) for x in report.layers] == [("channels", 8)]
    assert (model.between.groups, model.fc2.in_features) == (8, 8)
    with pytest.raises(ArgumentError, match="without one of them the network does not"):
        lobs.shrink(
            Mixing().eval(), [torch.randn(8, 12, 4)], keep=0.5, kinds=("neurons",), progress=False
        )


def test_a_budget_gives_layers_sizes_of_their_own():
    model = made(residual)
    report = lobs.shrink(model, images(), multiplications=0.5, multiple=1, progress=False)
    before, after = report.multiplications
    assert 0.4 * before < after <= 0.5 * before
    assert len({len(x.kept) / x.units for x in report.layers}) > 1
    model = made(plain)
    report = lobs.shrink(model, images(), parameters=0.3, multiple=2, progress=False)
    weights = sum(m.weight.numel() for m in (model[0], model[4], model[7], model[9]))
    assert weights <= 0.3 * (16 * 9 + 96 * 9 + 12 * 16 * 10 + 30)
    assert all(len(x.kept) % 2 == 0 for x in report.layers)


def test_statistics_come_back_after_an_interruption(monkeypatch):
    """Also those of layers that lose no channels."""
    model = made(lambda: nn.Sequential(conv(2, 8), nn.ReLU(), conv(8, 4), nn.BatchNorm2d(4)))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    real = shrinking.reestimate_batch_norm

    def interrupted(*args: Any, **settings: Any) -> None:
        real(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(shrinking, "reestimate_batch_norm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lobs.shrink(model, images(), keep=0.5, multiple=2, progress=False)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_a_failure_changes_nothing(monkeypatch):
    model = made(residual)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def refuse(*_: Any) -> None:
        raise ArgumentError("no")

    monkeypatch.setattr("lobs_native.network.shrinking.shrink._check_same", refuse)
    with pytest.raises(ArgumentError, match="no"):
        lobs.shrink(model, images(), keep=0.5, multiple=2, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], x) for name, x in after.items())
    assert (model.first.out_channels, model.bn.num_features) == (6, 8)


class Gated(nn.Module):
    """An operation entry by entry that returns more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.logsigmoid(self.first(x)))


def test_an_operation_that_returns_several_tensors_entry_by_entry():
    torch.manual_seed(0)
    model = Gated().eval()
    report = lobs.shrink(model, images(2), keep=0.5, multiple=2, progress=False)
    assert [(x.kind, len(x.kept)) for x in report.layers] == [("channels", 4)]
