"""Layers that compute their weight in each call are replaced by plain ones that hold it, and are
then pruned in what the network multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.network.folding import SamePaddedConv2d

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-6


class Standardized(nn.Conv2d):
    """Rows of mean 0 and variance 1, times a gain: as convolutions without batch norm have them."""

    def __init__(self, *arguments: int, same: bool = False, **more: int) -> None:
        super().__init__(*arguments, **more)
        self.same = same
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            for axis, k, s in zip((3, 2), self.kernel_size, self.stride, strict=True):
                total = max(0, (-(x.shape[axis] // -s) - 1) * s + k - x.shape[axis])
                sides = (total // 2, total - total // 2)
                x = functional.pad(x, sides if axis == 3 else (0, 0, *sides))
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = self.gain.view(-1)
        weight = functional.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=EPS)
        weight = weight.reshape(self.weight.shape)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Halved(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        half = self.weight / 2
        return functional.conv_transpose1d(x, half, self.bias, self.stride, self.padding)


def standardized(layer: Standardized) -> Tensor:
    w = layer.weight.detach().double()
    w = w - w.mean((1, 2, 3), keepdim=True)
    return layer.gain.detach() * w / (w.var((1, 2, 3), unbiased=False, keepdim=True) + EPS).sqrt()


CONVOLUTIONS = {
    "plain": {},
    "stride and groups": {"stride": 2, "groups": 2, "padding": 1},
    "padded by size": {"stride": 2, "same": True, "bias": False},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_standardized_convolution_is_pruned_in_the_weight_that_it_convolves_with(kind):
    torch.manual_seed(0)
    net = nn.Sequential(Standardized(4, 8, 3, **CONVOLUTIONS[kind]), nn.ReLU(), nn.Conv2d(8, 2, 3))
    net.double()
    x = torch.randn(3, 4, 12, 15).double()
    before, expected = net(x), standardized(net[0])
    assert lobs.fold_weights(net) == ["0"]
    assert torch.equal(net(x), before)
    conv = net[0]
    assert type(conv) is (SamePaddedConv2d if kind == "padded by size" else nn.Conv2d)
    assert torch.allclose(conv.weight, expected, atol=1e-12)
    report = lobs.prune(net, [x], sparsity=0.5, inputs="dense", progress=False)
    assert int((conv.weight == 0).sum()) == conv.weight.numel() // 2
    assert report.skipped == ()
    old = copy.deepcopy(conv)
    old.weight.data = expected
    if conv.bias is not None:
        old.bias.data = conv.bias.data  # its update is in the error as well
    out = old(x)
    change = (conv(x) - out).detach()
    if conv.bias is None:
        error = float(change.square().sum()) / (change.numel() // len(change[0]))
        assert report.layers[0].error == pytest.approx(error, rel=1e-9)


def test_linear_and_transposed_layers_are_folded_wherever_they_are_held():
    twice = Scaled(6, 6)
    net = nn.Sequential(
        twice, nn.ReLU(), twice, nn.Unflatten(1, (3, 2)), Halved(3, 4, 2, bias=False)
    )
    net[0].weight.requires_grad_(False)
    net[0].bias.requires_grad_(False)
    net.train()
    x = torch.randn(10, 6)
    before, weight = net(x), net[0].weight / net[0].weight.norm()
    assert lobs.fold_weights(net) == ["0", "4"]
    assert net[0] is net[2]
    assert type(net[0]) is nn.Linear
    assert type(net[4]) is nn.ConvTranspose1d
    assert torch.equal(net[0].weight, weight)
    assert torch.allclose(net(x), before)
    assert net[0].training
    assert not net[0].weight.requires_grad
    assert net[4].weight.requires_grad
    assert net[4].bias is None
    report = lobs.prune(net, [x], sparsity=0.5, progress=False)
    assert report.coverage.removed == (36 + 24) / 2
    assert lobs.fold_weights(net) == []


def test_a_weight_under_spectral_norm_becomes_what_it_is_in_eval_mode():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 2)).eval()
    net[0].weight  # noqa: B018
    x = torch.randn(20, 6)
    before = net(x)
    assert lobs.fold_weights(net) == ["0"]
    assert not parametrize.is_parametrized(net[0])
    assert torch.equal(net(x), before)
    assert lobs.prune(net, [x], sparsity=0.5, progress=False).coverage.not_understood == 0


class OfInputs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * x.mean(), self.bias)


class Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * torch.rand(6), self.bias)


class More(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 2, self.bias).relu()


class Picky(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not for these inputs")


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [OfInputs, Random, More, Picky, Same, nn.Linear])
def test_other_layers_and_the_random_state_stay_as_they_are(kind):
    net = nn.Sequential(kind(6, 6), nn.Linear(6, 2))
    layer, state = net[0], torch.get_rng_state()
    assert lobs.fold_weights(net) == []
    assert net[0] is layer
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_with_hooks_or_shared_parameters_stay_as_they_are():
    hooked, shared, other = Scaled(6, 6), Scaled(6, 6), nn.Linear(6, 6)
    hooked.register_forward_hook(lambda *_: None)
    other.weight = shared.weight
    net = nn.Sequential(hooked, shared, other)
    assert lobs.fold_weights(net) == []
    assert [type(m) for m in net] == [Scaled, Scaled, nn.Linear]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_folded_in_place_is_refused():
    with pytest.raises(ArgumentError, match="model: it is a Scaled itself"):
        lobs.fold_weights(Scaled(4, 4))
    with pytest.raises(DtypeError, match="model: expected an nn"):
        lobs.fold_weights([Scaled(4, 4)])
    with pytest.raises(DtypeError, match="TorchScript"):
        lobs.fold_weights(torch.jit.script(nn.Linear(4, 4)))


def test_a_network_of_standardized_convolutions_is_pruned_as_a_whole():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
    config = transformers.BitConfig(**sizes, global_padding="same")
    model = transformers.BitForImageClassification(config).eval()
    data = [{"pixel_values": torch.randn(2, 3, 33, 33)} for _ in range(2)]
    before = model(**data[0]).logits
    assert len(lobs.fold_weights(model)) == 9
    assert torch.equal(model(**data[0]).logits, before)
    report = lobs.prune(model, data, sparsity=0.5, method="sweep", progress=False)
    assert report.coverage.not_understood == report.coverage.on_purpose == 0
    assert report.coverage.removed * 2 == report.coverage.total
