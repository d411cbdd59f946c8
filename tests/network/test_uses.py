"""Weights that no layer type describes are pruned where they are plain operands of products,
however these are written, and otherwise left out with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.own_weights import Net, images, moment, prune, rows, sequences
from helpers.tolerances import distance
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.layers import stored_weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- weights that functions multiply -------------------------------------------------------------


class Recentered(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, w, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class Spelled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Two(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.sum()


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def generated(net: Any, x: Tensor) -> Tensor:
    filters = torch.sigmoid(net.router(pooled(x))) @ net.w
    return pooled(functional.conv2d(x[:1], filters[:1].view(8, 4, 3, 3)))


PRODUCTS = {
    "linear": (rows, lambda m, x: functional.linear(x, m.w), {"w": torch.randn(8, 16)}),
    "matmul": (sequences, lambda m, x: x @ m.w, {"w": torch.randn(16, 8)}),
    "einsum": (
        sequences,
        lambda m, x: torch.einsum("bnd,dhe->bnhe", x, m.w).flatten(2),
        {"w": torch.randn(16, 2, 4)},
    ),
    "two rows of blocks": (
        rows,
        lambda m, x: functional.linear(x, m.w[:8]) * functional.linear(x, m.w[8:]),
        {"w": torch.randn(16, 16)},
    ),
    "conv2d": (
        images,
        lambda m, x: pooled(functional.conv2d(x, m.w, stride=2, padding=1, groups=2)),
        {"w": torch.randn(8, 2, 3, 3)},
    ),
    "conv_transpose2d": (
        images,
        lambda m, x: pooled(functional.conv_transpose2d(x, m.w, stride=2, output_padding=1)),
        {"w": torch.randn(4, 8, 3, 3)},
    ),
    "conv1d of a matrix": (
        sequences,
        lambda m, x: functional.conv1d(x.mT, m.w[:, None], groups=16).mean(2)[:, :8],
        {"w": torch.randn(16, 3)},
    ),
    "a module's weight, without a call of it": (
        rows,
        lambda m, x: functional.linear(x, m.w.weight),
        {"w": nn.Linear(16, 8)},
    ),
    "padding of its own": (images, lambda m, x: pooled(m.w(x)), {"w": Padded(4, 8, 3, 2)}),
    "a forward in other words": (rows, lambda m, x: m.w(x), {"w": Spelled(16, 8)}),
    "a forward that returns two tensors": (rows, lambda m, x: m.w(x)[0], {"w": Two(16, 8)}),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("inputs", ["corrected", "dense"])
def test_weights_in_plain_products_are_pruned_however_these_are_written(kind, inputs):
    data, forward, parts = PRODUCTS[kind]
    net = Net(forward, **parts)
    report = prune(net, data(), inputs=inputs)
    assert [layer.name for layer in report.layers] == ["w", "last"]
    assert report.skipped == ()
    assert report.layers[0].sparsity == 0.5
    assert lobs.apply_masks(net, report.masks) == 0


@pytest.mark.parametrize("kind", ["linear", "matmul", "a forward that returns two tensors"])
def test_the_second_moment_is_that_of_the_product_s_inputs(kind):
    data, forward, parts = PRODUCTS[kind]
    net, batches = Net(forward, **parts), data()
    weight = stored_weights(net)["w"].clone()
    matrix = weight.T.contiguous() if kind == "matmul" else weight
    bias = net.w.bias.detach().clone() if isinstance(net.w, nn.Linear) else None
    report = prune(net, batches, inputs="dense")
    H = moment(*batches)
    if bias is not None:
        H = moment(*(functional.pad(x, (0, 1), value=1.0) for x in batches))
        assert not torch.equal(bias, net.w.bias)  # updated, since only the product adds it
    out = lobs.prune_weight(matrix, H, sparsity=0.5, bias=bias)
    now = stored_weights(net)["w"]
    assert distance(now.T if kind == "matmul" else now, out.weight) < 1e-9
    assert report.layers[0].error == pytest.approx(out.error, rel=1e-6)


def test_a_filter_has_the_second_moment_of_the_module_that_does_the_same():
    torch.manual_seed(0)
    plain = Net(lambda m, x: pooled(m.w(x)), w=nn.Conv2d(4, 8, 3, 2, 1, bias=False))
    own = Net(
        lambda m, x: pooled(functional.conv2d(x, m.w, stride=2, padding=1)),
        w=plain.w.weight.detach().clone(),
    )
    own.last.load_state_dict(plain.last.state_dict())
    data = images()
    for net in (plain, own):
        prune(net, data)
    assert distance(own.w.detach(), plain.w.weight.detach()) < 1e-12
    assert distance(own.last.weight.detach(), plain.last.weight.detach()) < 1e-12


def test_both_inputs_count_where_a_module_s_weight_is_used_by_a_function_too():
    scale = torch.linspace(0, 10, 16).double()
    net = Net(
        lambda m, x: m.a(x) + functional.linear(x * scale, m.a.weight),
        a=nn.Linear(16, 8, bias=False),
    )
    data = rows()
    before = net.a.weight.detach().clone()
    report = prune(net, data, inputs="dense")
    out = lobs.prune_weight(before, moment(*data, *(x * scale for x in data)), sparsity=0.5)
    assert distance(net.a.weight.detach(), out.weight) < 1e-9
    assert report.layers[0].rows == 160


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(torch.softmax(q @ k.mT, -1) @ v)


def test_attention_with_a_forward_of_its_own_is_pruned_but_for_its_biases():
    net = Net(lambda m, x: m.attention(x)[..., :8], attention=Attention(16, 2, batch_first=True))
    report = prune(net, sequences())
    names = [f"attention.{which}_proj" for which in ("q", "k", "v", "out")]
    assert [x.name for x in report.layers] == [*names, "last"]
    assert all("bias was not updated" in x.notes[0] for x in report.layers[:4])


class Reused(nn.Module):
    """A stack whose blocks use a parameter of the network, or of the first block, as well."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        owner = self.blocks[0] if inside else self
        owner.register_parameter("shared", nn.Parameter(torch.randn(16, 16) / 4))
        for block in self.blocks:
            block.register_forward_hook(lambda m, _, y: functional.linear(y, owner.shared))
        self.owner = [owner]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.owner[0].shared)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("inside", [True, False])
def test_blocks_that_use_a_parameter_of_another_module_are_not_run_one_by_one(inside):
    report = prune(Reused(inside), sequences(1))
    assert report.settings["blocks"] == []
    assert len(report.layers) == 4
    assert [x.rows for x in report.layers] == [160, 40, 40, 40]


REASONS = {
    "scaled": (
        rows,
        lambda m, x: functional.linear(x, m.w * 0.5),
        {"w": torch.randn(8, 16)},
        "mul",
    ),
    "scaled copy": (
        rows,
        lambda m, x: functional.linear(x, m.w.T.contiguous() * 0.5),
        {"w": torch.randn(16, 8)},
        "aten::clone, aten::mul",
    ),
    "part of a copy": (
        rows,
        lambda m, x: functional.linear(x, m.w.T.contiguous()[:8]),
        {"w": torch.randn(16, 12)},
        "several ways",
    ),
    "two orientations": (
        rows,
        lambda m, x: functional.linear(functional.linear(x, m.w), m.w.T)[:, :8],
        {"w": torch.randn(8, 16)},
        "several ways",
    ),
    "uneven parts": (
        rows,
        lambda m, x: functional.linear(x, m.w[:8]) + functional.linear(x, m.w[8:]).sum(-1)[:, None],
        {"w": torch.randn(12, 16)},
        "several ways",
    ),
    "convolutions of two forms": (
        images,
        lambda m, x: pooled(functional.conv2d(x, m.w)) + pooled(functional.conv2d(x, m.w, None, 2)),
        {"w": torch.randn(8, 4, 3, 3)},
        "several forms",
    ),
    "also looked up": (
        rows,
        lambda m, x: functional.embedding((x @ m.w.T).argmax(-1), m.w)[:, :8],
        {"w": torch.randn(8, 16)},
        "looked up as well",
    ),
    "also looked up, in a module": (
        rows,
        lambda m, x: functional.embedding(m.w(x).argmax(-1), m.w.weight)[:, :8],
        {"w": nn.Linear(16, 8)},
        "outside the calls of its module",
    ),
    "standardized": (
        images,
        lambda m, x: pooled(m.w(x)),
        {"w": Standardized(4, 8, 3)},
        "aten::std",
    ),
    "recentered": (images, lambda m, x: pooled(m.w(x)), {"w": Recentered(4, 8, 3)}, "aten::mean"),
    "bilinear": (rows, lambda m, x: m.w(x, x), {"w": nn.Bilinear(16, 16, 8)}, "_trilinear"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_plain_product_is_left_out_with_the_reason(kind):
    data, forward, parts, reason = REASONS[kind]
    net = Net(forward, **parts)
    before = stored_weights(net)["w"].clone()
    report = prune(net, data())
    (skipped,) = report.skipped
    assert (skipped.name, skipped.weights) == ("w", before.numel())
    assert reason in skipped.reason
    assert torch.equal(stored_weights(net)["w"], before)
    assert skipped.on_purpose == (kind.startswith("also"))
    if not skipped.on_purpose:
        with pytest.raises(ArgumentError, match="layer 'w': "):
            prune(net, data(), strict=True)


def test_two_weights_that_make_one_are_left_out():
    net = Net(
        lambda m, x: functional.linear(x, m.a @ m.b), a=torch.randn(8, 2), b=torch.randn(2, 16)
    )
    report = prune(net, rows())
    assert {x.name for x in report.skipped} == {"a", "b"}
    net = Net(generated, router=nn.Linear(4, 2), w=torch.randn(2, 288))
    report = prune(net, images())
    assert [x.name for x in report.skipped] == ["w"]
    assert [x.name for x in report.layers] == ["router", "last"]


def test_tables_positions_and_learned_inputs_are_left_alone_on_purpose():
    net = Net(
        lambda m, x: m.layer(x + m.position + m.table(torch.arange(10))) + m.layer(m.query),
        layer=nn.Linear(16, 8),
        table=nn.Embedding(10, 16),
        position=torch.randn(10, 16),
        query=torch.randn(1, 10, 16),
    )
    report = prune(net, sequences())
    assert {x.name for x in report.skipped} == {"table", "position", "query"}
    assert all(x.on_purpose for x in report.skipped)
    assert report.coverage.missed == 0


def test_a_learned_query_of_attention_is_left_alone_on_purpose():
    def attend(m: nn.Module, x: Tensor) -> Tensor:
        query, x = m.query.expand(len(x), -1, -1, -1), x[:, None]  # one head
        return m.layer(functional.scaled_dot_product_attention(query, x, x))

    net = Net(attend, query=torch.randn(1, 1, 3, 16), layer=nn.Linear(16, 8)).float()
    report = prune(net, [x.float() for x in sequences()])
    assert [(x.name, x.on_purpose) for x in report.skipped] == [("query", True)]
    assert "learned input" in report.skipped[0].reason


# ---- recurrent layers ----------------------------------------------------------------------------


RECURRENT = {
    "lstm": (nn.LSTM(16, 8, 2, batch_first=True), lambda m, x: m.rnn(x)[0]),
    "both directions": (
        nn.LSTM(16, 4, batch_first=True, bidirectional=True, bias=False),
        lambda m, x: m.rnn(x)[0],
    ),
    "projected": (nn.LSTM(16, 12, proj_size=8, batch_first=True), lambda m, x: m.rnn(x)[0]),
    "gru": (nn.GRU(16, 8, batch_first=True), lambda m, x: m.rnn(x)[0]),
    "rnn": (nn.RNN(16, 8, batch_first=True), lambda m, x: m.rnn(x)[0]),
    "cell": (nn.LSTMCell(16, 8), lambda m, x: m.rnn(x[:, 0])[0]),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_matrix_of_a_recurrent_layer_is_pruned(kind):
    module, forward = RECURRENT[kind]
    net, enabled = Net(forward, rnn=module), torch._C._get_mkldnn_enabled()
    report = prune(net, sequences())
    matrices = {f"rnn.{n}" for n, p in net.rnn.named_parameters() if p.ndim == 2}
    assert {x.name for x in report.layers} == matrices | {"last"}
    assert report.skipped == ()
    assert torch._C._get_mkldnn_enabled() == enabled


def test_the_hidden_weights_of_an_lstm_see_the_states_of_all_steps():
    lstm = nn.LSTM(16, 8, batch_first=True, bias=False)
    net, data = Net(lambda m, x: m.rnn(x)[0], rnn=lstm), sequences(1)
    lstm = net.rnn
    before = lstm.weight_hh_l0.detach().clone()
    states = lstm(data[0])[0].detach()
    states = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    prune(net, data, inputs="dense")
    out = lobs.prune_weight(before, moment(states), sparsity=0.5)
    assert distance(lstm.weight_hh_l0.detach(), out.weight) < 1e-9
