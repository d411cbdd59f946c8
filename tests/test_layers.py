"""Layer types: the Hessian is that of the layer's own output, and weights survive the round
trip."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import distance
from torch import nn
from torch.nn.utils import prune as torch_prune

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, ShapeError
from lobs_native.layers import LAYERS, layer_for
from lobs_native.layers import conv as conv_file

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 2, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 4},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate", "stride": 3},
    {"kernel_size": 1},
]


def random_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    if kind == "linear":
        return nn.Linear(7, 5).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    settings = CONVOLUTIONS[int(kind)]
    return nn.Conv2d(4, 8, **settings).double(), torch.randn(3, 4, 9, 10, dtype=torch.float64)


KINDS = ["linear", *map(str, range(len(CONVOLUTIONS)))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", KINDS)
def test_the_quadratic_form_is_the_change_of_the_module_s_own_output(kind):
    """tr(dW H dW^T) * rows == ||module with dW||^2: stride, padding, dilation and groups cannot be
    wrong unseen."""
    module, x = random_layer(kind)
    layer = layer_for("m", module)
    assert layer is not None
    moments = [lobs.Hessian(layer.width) for _ in range(layer.groups)]
    for group, rows in layer.columns(x):
        moments[group].update(rows)
    module.bias = None
    with torch.no_grad():
        out = module(x)
    W = layer.weight()
    total = sum(float((W[g] @ h.matrix() * W[g]).sum() * h.rows) for g, h in enumerate(moments))
    assert total == pytest.approx(float(out.square().sum()), rel=1e-12)
    assert W.shape == (layer.groups, layer.rows, layer.width)
    positions = out.numel() // (layer.groups * layer.rows)
    assert [h.rows for h in moments] == [positions] * layer.groups


@pytest.mark.parametrize("kind", KINDS)
def test_weights_survive_the_round_trip(kind):
    module, _ = random_layer(kind)
    layer = layer_for("m", module)
    assert layer is not None
    before = {k: v.clone() for k, v in module.state_dict().items()}
    W, b = layer.weight().clone(), layer.bias()
    layer.write_back(W * 2, None if b is None else b * 3)
    assert torch.equal(module.state_dict()["weight"], before["weight"] * 2)
    if b is not None:
        assert torch.equal(module.state_dict()["bias"], before["bias"] * 3)
    assert layer.weight().data_ptr() == module.weight.data_ptr()


def test_channels_last_weights_keep_their_format():
    module = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    layer = layer_for("m", module)
    assert layer is not None
    W = layer.weight().clone()
    layer.write_back(W + 1, None)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.weight(), W + 1)


def test_patches_come_in_pieces_and_never_a_whole_batch(monkeypatch):
    module = nn.Conv2d(4, 8, 3, padding=1, groups=2).double()
    x = torch.randn(6, 4, 16, 16, dtype=torch.float64)
    layer = layer_for("m", module)
    assert layer is not None
    whole = [torch.cat([r for g, r in layer.columns(x) if g == group]) for group in range(2)]
    for limit in (1, 16 * 18 * 8 * 2 * 5, 1 << 18):
        monkeypatch.setattr(conv_file, "PATCH_BYTES", limit)
        pieces = list(layer.columns(x))
        line = 16 * layer.width * 8  # one output line of one image, one group
        assert max(rows.numel() * 8 for _, rows in pieces) <= max(limit, line)
        for group in range(2):
            H = whole[group].T @ whole[group]
            rows = torch.cat([r for g, r in pieces if g == group])
            assert len(rows) == len(whole[group])
            assert distance(rows.T @ rows, H) < 1e-13


def test_one_image_without_a_batch_is_accepted():
    module = nn.Conv2d(4, 8, 3)
    layer = layer_for("m", module)
    assert layer is not None
    x = torch.randn(4, 9, 9)
    for (g, a), (k, b) in itertools.zip_longest(layer.columns(x), layer.columns(x[None])):
        assert g == k
        assert torch.equal(a, b)
    with pytest.raises(ShapeError, match="'m'"):
        next(layer.columns(torch.randn(3, 9, 9)))


def test_only_known_forwards_are_prunable():
    class Scaled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    class Renamed(nn.Linear):
        pass

    assert layer_for("m", Scaled(2, 2)) is None
    assert layer_for("m", nn.ReLU()) is None
    assert layer_for("m", Renamed(2, 2)) is not None
    assert all(
        layer_for("m", kind.module_type(*args)) is not None
        for kind, args in zip(LAYERS, [(2, 2), (2, 2, 1)], strict=True)
    )


def test_computed_weights_are_refused():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="parametrized"):
        layer_for("deep.one", module)
    masked = nn.Linear(3, 3)
    torch_prune.l1_unstructured(masked, "weight", 0.5)
    with pytest.raises(ArgumentError, match=r"prune\.remove"):
        layer_for("deep.two", masked)


def test_integer_weights_are_refused():
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    layer = layer_for("q", module)
    assert layer is not None
    with pytest.raises(DtypeError, match="int8"):
        layer.weight()
