"""Convolutions whose filters are mixed for each sample are pruned by the change of their outputs,
and what mixes them is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.own_weights import Net, images, prune
from helpers.tolerances import distance
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.layers import own
from lobs_native.layers.conv import ConvCall
from lobs_native.layers.own import MixedConv, Own

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """A conditionally parameterized convolution (Yang et al. 2019) of C_in channels to 8."""

    def __init__(
        self,
        experts: int = 3,
        channels: int = 4,
        bias: bool = False,
        flat: bool = True,
        **call: Any,
    ) -> None:
        super().__init__()
        self.call = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, **call}
        self.filters = 8, channels // self.call["groups"], 3, 3
        weight = torch.randn(experts, *self.filters)
        self.weight = nn.Parameter(weight.flatten(1) if flat else weight)
        self.bias = nn.Parameter(torch.randn(experts, 8)) if bias else None

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        B, _, *sizes = x.shape
        weight = (routing @ self.weight.flatten(1)).view(-1, *self.filters[1:])
        bias = None if self.bias is None else (routing @ self.bias).view(-1)
        call = {**self.call, "groups": B * self.call["groups"]}
        out = functional.conv2d(x.reshape(1, -1, *sizes), weight, bias, **call)
        return out.view(B, 8, *out.shape[2:])


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def routed(m: Any, x: Tensor) -> Tensor:
    """The convolution with the weights that a router gives."""
    return m.c(x, torch.sigmoid(m.router(pooled(x))))


def some_zero(m: Any, x: Tensor) -> Tensor:
    """With routing weights of which one of three is 0."""
    return m.c(x, torch.sigmoid(pooled(x))[:, :3] * torch.eye(3).double()[: len(x)].sub(1))


@torch.inference_mode()
def without_gradients(m: Any, x: Tensor) -> Tensor:
    """In a mode in which torch does not decompose products and convolutions."""
    return routed(m, x)


def net_of(mixed: Mixed, forward: Any = routed) -> Net:
    torch.manual_seed(0)
    parts = {"router": nn.Linear(4, len(mixed.weight))} if forward is not some_zero else {}
    return Net(lambda m, x: pooled(forward(m, x)), c=mixed, **parts)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (routed, {}),
    "stride, padding and dilation": (routed, {"stride": 2, "padding": (2, 0), "dilation": 2}),
    "the same size": (routed, {"padding": "same"}),
    "two groups": (routed, {"groups": 2}),
    "depthwise": (routed, {"groups": 4}),
    "one set of filters": (routed, {"experts": 1}),
    "in the shape of filters": (routed, {"flat": False, "groups": 2}),
    "in inference mode": (without_gradients, {}),
    "some routing weights of zero": (some_zero, {}),
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_change_of_the_convolution(kind, samples):
    forward, options = KINDS[kind]
    net, batches = net_of(Mixed(**options), forward), [x[:samples] for x in images(4)]
    before = [forward(net, x).detach() for x in batches]
    report = prune(net, batches, inputs="dense")
    assert [layer.name for layer in report.layers] == ["c", "last"]
    layer = report.layers[0]
    assert layer.sparsity == 0.5
    assert net.c.weight.shape == report.masks["c"].shape
    assert layer.rows == sum(y[:, 0].numel() for y in before)
    change = [forward(net, x).detach() - y for x, y in zip(batches, before, strict=True)]
    error, energy = (sum(float(y.square().sum()) for y in some) for some in (change, before))
    assert layer.error == pytest.approx(error / layer.rows, rel=1e-9)
    assert layer.relative_error == pytest.approx(error / energy, rel=1e-9)
    assert lobs.apply_masks(net, report.masks) == 0


@pytest.mark.parametrize("inputs", ["dense", "pruned", "corrected"])
def test_it_is_pruned_as_a_convolution_of_the_channels_times_each_routing_weight(inputs):
    def outer(m: Any, x: Tensor) -> Tensor:
        return (torch.sigmoid(pooled(x))[:, :3, None, None, None] * m.a(x)[:, None]).flatten(1, 2)

    mixed = Net(
        lambda m, x: pooled(m.c(m.a(x), torch.sigmoid(pooled(x))[:, :3])),
        a=nn.Conv2d(4, 4, 3),
        c=Mixed(),
    )
    plain = Net(
        lambda m, x: pooled(m.c(outer(m, x))), a=mixed.a, c=nn.Conv2d(12, 8, 3, 1, 1, bias=False)
    )
    filters = mixed.c.weight.detach().view(3, 8, 4, 3, 3).transpose(0, 1).reshape(8, 12, 3, 3)
    plain.c.weight.data.copy_(filters)
    plain.last.load_state_dict(mixed.last.state_dict())
    data = images(6)
    for net in (mixed, plain):
        report = prune(net, data, inputs=inputs)
        assert [layer.name for layer in report.layers] == ["a", "c", "last"]
    filters = mixed.c.weight.detach().view(3, 8, 4, 3, 3).transpose(0, 1).reshape(8, 12, 3, 3)
    assert distance(filters, plain.c.weight.detach()) < 1e-9
    assert distance(mixed.last.weight.detach(), plain.last.weight.detach()) < 1e-9


def test_the_rows_are_the_same_in_pieces_of_few_samples(monkeypatch):
    mixed = Mixed(groups=2).double()
    call = ConvCall(4, 8, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 2, False)
    layer = MixedConv(Own("c", "c", mixed, "weight", mixed.weight), call=call, caller=mixed)
    x, routing = torch.randn(1, 20, 9, 9).double(), torch.rand(5, 3).double()

    def rows(g: int) -> Tensor:
        return torch.cat([X for group, X in layer.columns(x, routing) if group == g])

    whole = [rows(g) for g in range(2)]
    monkeypatch.setattr(own, "PATCH_BYTES", 2 * 3 * 4 * 81 * 8)
    assert all(torch.equal(rows(g), whole[g]) for g in range(2))
    out = torch.cat([X @ W.T for X, W in zip(whole, layer.weight(), strict=True)], 1)
    expected = mixed(x.view(5, 4, 9, 9), routing).movedim(1, -1).reshape(-1, 8)
    assert distance(out, expected.detach()) < 1e-12


def test_patterns_run_along_the_input_channels_of_one_set_of_filters():
    net = net_of(Mixed())
    report = prune(net, images(), sparsity=None, pattern="2:4", include=["c"])
    kept = report.masks["c"].view(3, 8, 4, 3, 3).sum(2)
    assert torch.equal(kept, torch.full_like(kept, 2))
    with pytest.raises(lobs.errors.PatternError, match="input channels at a kernel position"):
        prune(net_of(Mixed(groups=2)), images(), sparsity=None, pattern="2:4", include=["c"])


@pytest.mark.parametrize("kind", ["a layer", "a parameter", "a convolution"])
def test_the_router_is_left_alone_unless_it_is_named(kind):
    router, weights = {
        "a layer": (nn.Linear(4, 3), lambda m, x: m.router(pooled(x)).div(2).softmax(1)),
        "a parameter": (torch.randn(4, 3), lambda m, x: torch.sigmoid(pooled(x) @ m.router + 1)),
        "a convolution": (
            nn.Conv2d(4, 3, 1),
            lambda m, x: m.router(x.mean((2, 3), keepdim=True)).flatten(1).sigmoid(),
        ),
    }[kind]
    net = Net(lambda m, x: pooled(m.c(x, weights(m, x))), router=router, c=Mixed())
    report = prune(net, images())
    assert [(x.name, x.on_purpose) for x in report.skipped] == [("router", True)]
    assert "router of a convolution" in report.skipped[0].reason
    report = prune(net, images(), include=["router", "c"], strict=True)
    assert {x.name for x in report.layers} == {"router", "c"}


def test_a_layer_before_the_router_is_pruned():
    net = Net(
        lambda m, x: pooled(m.c(x, torch.sigmoid(m.second(torch.relu(m.first(pooled(x))))))),
        first=nn.Linear(4, 4),
        second=nn.Linear(4, 3),
        c=Mixed(),
    )
    report = prune(net, images())
    assert {x.name for x in report.layers} == {"first", "c", "last"}
    assert [x.name for x in report.skipped] == ["second"]


def test_biases_that_are_mixed_are_left_alone_on_purpose():
    report = prune(net_of(Mixed(bias=True)), images())
    assert {x.name: x.on_purpose for x in report.skipped} == {"router": True, "c.bias": True}
    assert [x.name for x in report.layers] == ["c", "last"]


def changed(m: Any, x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    """What ``routed`` returns, where mixed filters are changed, or only looked at (None)."""
    filters = torch.sigmoid(m.router(pooled(x))) @ m.c.weight
    other = change(filters)
    filters = (filters if other is None else other).view(-1, *m.c.filters[1:])
    out = functional.conv2d(x.reshape(1, -1, *x.shape[2:]), filters, None, 1, 1, 1, len(x))
    return out.view(len(x), 8, *x.shape[2:])


def twice(m: Any, x: Tensor) -> Tensor:
    y = routed(m, x)
    m.c.call["stride"] = 2
    y = pooled(y) + pooled(routed(m, x))
    m.c.call["stride"] = 1
    return y


REASONS = {
    "two forms": (twice, "several forms"),
    "multiplied too": (
        lambda m, x: pooled(routed(m, x)) + (pooled(x)[:, :3] @ m.c.weight)[:, :8],
        "multiplied otherwise as well",
    ),
    "in another dtype": (
        lambda m, x: pooled(
            functional.conv2d(
                x.float().view(1, -1, *x.shape[2:]),
                (pooled(x)[:, :3].float() @ m.c.weight.float()).view(-1, *m.c.filters[1:]),
                groups=len(x),
            )
            .view(len(x), 8, 7, 7)
            .double()
        ),
        "made into one by activations",
    ),
    "looked at": (
        lambda m, x: pooled(changed(m, x, lambda w: w.norm() and None)),
        "used otherwise as well",
    ),
    "every other filter": (
        lambda m, x: pooled(
            functional.conv2d(
                x.reshape(1, -1, *x.shape[2:]),
                (pooled(x)[:, :3] @ m.c.weight).view(-1, *m.c.filters[1:])[::2],
                groups=len(x),
            ).view(len(x), 4, 7, 7)
        ).repeat(1, 2),
        "made into one by activations",
    ),
    "for one sample of several": (
        lambda m, x: pooled(
            functional.conv2d(x, (pooled(x)[:, :3] @ m.c.weight)[0].view(m.c.filters))
        ),
        "made into one by activations",
    ),
}


@pytest.mark.parametrize("kind", REASONS)
def test_other_uses_are_left_out_with_the_reason(kind):
    forward, reason = REASONS[kind]
    net = Net(forward, router=nn.Linear(4, 3), c=Mixed())
    (skipped,) = (x for x in prune(net, images()).skipped if x.name == "c")
    assert reason in skipped.reason
    assert not skipped.on_purpose


def test_mixed_filters_that_are_changed_on_later_batches_are_an_error():
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(routed(m, x) if len(x) == 3 else changed(m, x, lambda w: 2 * w))

    net = Net(forward, router=nn.Linear(4, 3), c=Mixed())
    first, second = images()
    with pytest.raises(ArgumentError, match="'c': its weight is used by aten::mul"):
        prune(net, [first, second[:2]])


@pytest.mark.parametrize("other", ["convolution", "product", "convolution with some"])
def test_a_use_that_is_of_another_form_on_later_batches_is_an_error(other):
    def forward(m: Any, x: Tensor) -> Tensor:
        if len(x) == 3:
            return pooled(routed(m, x))
        if other == "product":
            return pooled(x) @ m.c.weight.view(3, 8, -1)[0, :, :4].T
        if other == "convolution with some":
            return REASONS["for one sample of several"][0](m, x)
        return pooled(m.other(x, torch.sigmoid(m.router(pooled(x)))))

    net = Net(forward, router=nn.Linear(4, 3), c=Mixed(), other=Mixed(stride=2))
    net.other.weight = net.c.weight
    first, second = images()
    with pytest.raises(ArgumentError, match=f"'c': its weight is used in a {other.split()[0]} of"):
        prune(net, [first, second[:2]])
