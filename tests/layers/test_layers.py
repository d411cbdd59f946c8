"""Layers that read their module's inputs: the second moment is that of the values by which the
module itself multiplies each weight, and weights survive the round trip."""

from __future__ import annotations

import itertools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from helpers.tolerances import distance
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, ShapeError
from lobs_native.layers import Layer, layers_for, layers_of
from lobs_native.layers import conv as conv_file
from lobs_native.layers.conv1d_of_transformers import TransformersConv1D


class Conv1D(nn.Module):
    """As in transformers, including the name of its Python module."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return out.view((*x.size()[:-1], self.nf))


# name -> (module, sizes of the input after batch and channels)
CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 8, 3), (9,)),
    "1d, strided, dilated, groups": (
        nn.Conv1d(4, 8, 3, stride=2, dilation=2, padding=3, groups=2),
        (11,),
    ),
    "1d, same, circular": (nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular"), (8,)),
    "2d": (nn.Conv2d(4, 8, 3), (9, 10)),
    "2d, all different": (nn.Conv2d(4, 8, (1, 3), stride=(2, 1), padding=(0, 1)), (9, 10)),
    "2d, dilated, groups": (nn.Conv2d(4, 8, 3, dilation=2, padding=2, groups=2), (9, 10)),
    "2d, same, even": (nn.Conv2d(4, 8, (2, 4), padding="same"), (9, 10)),
    "2d, same, reflect": (
        nn.Conv2d(4, 8, 3, padding="same", dilation=(1, 2), padding_mode="reflect"),
        (9, 10),
    ),
    "2d, valid": (nn.Conv2d(4, 8, 2, padding="valid", bias=False), (9, 10)),
    "2d, depthwise": (
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=4),
        (9, 10),
    ),
    "2d, replicate": (
        nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="replicate", stride=3),
        (9, 10),
    ),
    "2d, 1 x 1": (nn.Conv2d(4, 8, 1), (9, 10)),
    "3d": (nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)), (4, 5, 3)),
    "3d, depthwise, reflect": (
        nn.Conv3d(2, 2, 2, groups=2, padding=1, padding_mode="reflect", dilation=(1, 2, 1)),
        (3, 4, 3),
    ),
    "1d transposed": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (7,)),
    "2d transposed": (nn.ConvTranspose2d(4, 6, 3), (5, 4)),
    "2d transposed, groups": (
        nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 2), groups=2, dilation=(2, 1)),
        (5, 4),
    ),
    "2d transposed, depthwise": (
        nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=4, bias=False),
        (5, 4),
    ),
    "2d transposed, more padding than reach": (
        nn.ConvTranspose2d(4, 6, 2, stride=2, padding=2, output_padding=(1, 0)),
        (5, 4),
    ),
    "3d transposed": (
        nn.ConvTranspose3d(2, 4, (1, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1)),
        (3, 4, 3),
    ),
}
KINDS = ["linear", "transformers", *CONVOLUTIONS]


def example(kind: str) -> tuple[nn.Module, Layer, Tensor]:
    """A module in float64 with its layer, and a batch of inputs for it."""
    torch.manual_seed(0)
    if kind in ("linear", "transformers"):
        module: nn.Module = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
        x = torch.randn(3, 4, 7)
    else:
        module, sizes = CONVOLUTIONS[kind]
        x = torch.randn(3, module.in_channels, *sizes)
    (layer,) = layers_for("m", module.double())
    return module, layer, x.double()


def second_moments(layer: Layer, *inputs: object) -> list[lobs.Hessian]:
    moments = [lobs.Hessian(layer.width) for _ in range(layer.groups)]
    for group, rows in layer.columns(*inputs):
        moments[group].update(rows)
    return moments


def multiplied_by(module: nn.Module, layer: Layer, *inputs: object) -> list[Tensor]:
    """The values by which the module itself multiplies each weight of the first row of each group:
    its outputs when that weight is one and all others are zero. G times (N, C)."""
    factors = []
    for g in range(layer.groups):
        columns = []
        for c in range(layer.width):
            W = torch.zeros(layer.groups, layer.rows, layer.width, dtype=torch.float64)
            W[g, 0, c] = 1
            state = {"weight": layer.unpack(W)}
            if module.bias is not None:
                state["bias"] = torch.zeros_like(module.bias)
            out = torch.func.functional_call(module, state, inputs)
            out = out.movedim(1, -1) if isinstance(layer, conv_file.Conv) else out
            columns.append(out[..., g * layer.rows].reshape(-1))
        factors.append(torch.stack(columns, 1).detach())
    return factors


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_are_those_of_the_values_that_weights_are_multiplied_by(kind):
    module, layer, x = example(kind)
    moments = second_moments(layer, x)
    for h, X in zip(moments, multiplied_by(module, layer, x), strict=True):
        assert h.rows == len(X)
        assert distance(h.matrix(), X.T @ X / len(X)) < 1e-13


def test_a_transposed_convolution_may_be_called_with_an_output_size():
    module = nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1).double()
    (layer,) = layers_for("m", module)
    x = torch.randn(2, 4, 4, 5).double()
    X = multiplied_by(module, layer, x, (12, 14))[0]
    (h,) = second_moments(layer, x, (12, 14))
    assert h.rows == len(X) == 2 * 12 * 14
    assert distance(h.matrix(), X.T @ X / len(X)) < 1e-13
    report = lobs.prune(
        nn.ModuleDict({"up": module}),
        [x],
        sparsity=0.5,
        forward=lambda m, b: m["up"](output_size=(2, 4, 12, 14), input=b),
        progress=False,
    )
    assert report.layers[0].rows == 2 * 12 * 14


@pytest.mark.parametrize("kind", KINDS)
def test_weights_survive_the_round_trip_bit_for_bit(kind):
    module, layer, _ = example(kind)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    W, b = layer.weight().clone(), layer.bias()
    assert W.shape == (layer.groups, layer.rows, layer.width)
    assert torch.equal(layer.unpack(layer.pack(module.weight)), module.weight)
    layer.write_back(W, b)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    parameter = module.weight
    layer.write_back(W * 2, None if b is None else b * 3)
    assert module.weight is parameter
    assert torch.equal(module.weight, before["weight"] * 2)
    assert torch.equal(layer.weight(), W * 2)
    if b is not None:
        assert torch.equal(module.bias, before["bias"] * 3)
        assert torch.equal(layer.bias().reshape(-1), before["bias"] * 3)


@pytest.mark.parametrize("kind", ["2d", "2d, dilated, groups", "1d", "3d"])
def test_columns_are_ordered_by_kernel_position_then_input_channel(kind):
    module, layer, _ = example(kind)
    filters = module.weight.detach().flatten(2)
    channels = filters.shape[1]
    for g, r, c, k in itertools.product(
        range(layer.groups), range(layer.rows), range(channels), range(filters.shape[2])
    ):
        assert layer.weight()[g, r, k * channels + c] == filters[g * layer.rows + r, c, k]
    assert layer.neighbours == channels


@pytest.mark.parametrize(
    ("module", "along"),
    [
        (nn.Conv2d(8, 4, 3), 1),
        (nn.Conv1d(8, 4, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 4, 3, stride=2), 0),
        (nn.Conv3d(4, 4, 2), 1),
    ],
    ids=lambda x: type(x).__name__,
)
def test_groups_of_a_pattern_are_neighbouring_input_channels(module, along):
    x = torch.randn(2, module.in_channels, *[6] * len(module.kernel_size))
    report = lobs.prune(nn.Sequential(module), [x], pattern="2:4", progress=False)
    kept = (module.weight != 0).movedim(along, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert bool((kept == 2).all())
    assert torch.equal(report.masks["0"], module.weight != 0)
    # not by chance: the rule does not hold along the kernel
    flat = (module.weight != 0).flatten()[: module.weight.numel() // 4 * 4].view(-1, 4).sum(1)
    assert not bool((flat == 2).all())


def test_a_pattern_must_divide_the_channels_not_the_filter():
    model = nn.Sequential(nn.Conv2d(6, 4, 2))  # 24 weights per filter, 6 channels
    x = [torch.randn(2, 6, 5, 5)]
    with pytest.raises(lobs.PatternError, match=r"layer '0'.*rows of 6 .*kernel position"):
        lobs.prune(model, x, pattern="2:4", progress=False)
    lobs.prune(model, x, pattern="1:3", progress=False)


def test_channels_last_weights_keep_their_format():
    module = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    (layer,) = layers_for("m", module)
    W = layer.weight().clone()
    layer.write_back(W + 1, None)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.weight(), W + 1)


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 8, 3, padding=1, groups=2)],
    ids=["forward", "transposed"],
)
def test_patches_are_materialised_in_pieces_not_for_a_whole_batch(monkeypatch, module):
    x = torch.randn(6, 4, 16, 16, dtype=torch.float64)
    (layer,) = layers_for("m", module.double())
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


@pytest.mark.parametrize("module", [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3)])
def test_one_image_without_a_batch_is_accepted(module):
    (layer,) = layers_for("m", module)
    x = torch.randn(4, 9, 9)
    for (g, a), (k, b) in itertools.zip_longest(layer.columns(x), layer.columns(x[None])):
        assert g == k
        assert torch.equal(a, b)
    with pytest.raises(ShapeError, match=r"'m'.*expected \(B, 4, h, w\)"):
        next(layer.columns(torch.randn(3, 9, 9)))


@pytest.mark.parametrize("shape", [(2, 32, 3), (64,), ()])  # the first would make whole rows
def test_inputs_of_another_width_are_refused(shape):
    (layer,) = layers_for("m", nn.Linear(4, 8))
    message = re.escape(f"'m': input {shape}, expected (..., 4)")
    with pytest.raises(ShapeError, match=message):
        next(layer.columns(torch.zeros(shape)))
    model = nn.Sequential(nn.Linear(4, 8))
    before = model[0].weight.clone()
    with pytest.raises(ShapeError, match=message.replace("'m'", "'0'")):
        lobs.prune(model, [torch.zeros(shape)], sparsity=0.5)
    assert torch.equal(model[0].weight, before)


# ---- modules that are refused --------------------------------------------------------------------


def test_only_known_forwards_are_prunable():
    class Scaled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    class Renamed(nn.Linear):
        pass

    assert layers_for("m", nn.ReLU()) == []
    layers_for("m", Renamed(2, 2))[0].check()
    with pytest.raises(ArgumentError, match=r"layer 'm': Scaled has a forward of its own.*exclude"):
        layers_for("m", Scaled(2, 2))[0].check()
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    with pytest.raises(ArgumentError, match="forward of its own"):
        layers_for("m", replaced)[0].check()


def test_the_conv1d_of_transformers_is_recognised_without_importing_it():
    class Other(nn.Module):
        __qualname__ = __name__ = "Conv1D"

    (layer,) = layers_for("m", Conv1D(3, 2))
    assert isinstance(layer, TransformersConv1D)
    assert layers_for("m", Other()) == []
    transformers = pytest.importorskip("transformers.pytorch_utils")
    (layer,) = layers_for("m", transformers.Conv1D(3, 2))
    assert isinstance(layer, TransformersConv1D)
    assert (layer.rows, layer.width) == (3, 2)


def test_computed_weights_that_cannot_be_assigned_to_are_refused():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
    masked = nn.Linear(3, 3)
    torch_prune.l1_unstructured(masked, "weight", 0.5)
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    for module, why in (
        (spectral, "largest singular value"),
        (old, "by a hook: SpectralNorm"),
        (masked, r"masked by torch\.nn\.utils\.prune"),
        (orthogonal, "parametrized by _Orthogonal"),
    ):
        with pytest.raises(ArgumentError, match=rf"layer 'deep\.one'.*{why}.*prune\.remove"):
            layers_for("deep.one", module)[0].check()


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ArgumentError, match=r"'0': its weight has no shape yet; run the model"):
        lobs.prune(model, [torch.randn(9, 4)], sparsity=0.5, progress=False)


def test_offloaded_weights_are_refused_with_the_way_out():
    module = nn.Linear(3, 3, device="meta")
    module._hf_hook = object()
    with pytest.raises(ArgumentError, match=r"'0': its weight is offloaded.*remove_hook"):
        lobs.prune(nn.Sequential(module), [torch.randn(9, 3)], sparsity=0.5, progress=False)


def test_integer_weights_are_refused():
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    (layer,) = layers_for("q", module)
    with pytest.raises(DtypeError, match="int8"):
        layer.weight()


def test_shared_modules_and_parts_of_a_module_are_listed_once():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(2, 2)})
    model["again"] = model["b"]
    names = [layer.name for layer in layers_of(model)]
    assert names == ["a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj", "b"]


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("six", [torch.tensor(6), np.int64(6)], ids=["tensor", "numpy"])
def test_sizes_of_a_module_may_be_tensors_or_numpy_integers(six, kind):
    sizes = (six, 4) if kind is nn.Linear else (six, 4, 3)
    model = nn.ModuleDict({"used": kind(*sizes), "unused": kind(*sizes)})
    batch = torch.randn(20, 6) if kind is nn.Linear else torch.randn(2, 6, 5, 5)
    with pytest.warns(UserWarning, match="in unused: never called"):
        report = lobs.prune(
            model, [batch], sparsity=0.5, forward=lambda m, x: m["used"](x), progress=False
        )
    (layer,), (skipped,) = report.layers, report.skipped
    assert layer.sparsity == 0.5
    assert skipped.weights == model["unused"].weight.numel()
    assert json.dumps(report.to_dict())
