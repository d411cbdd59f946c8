"""compat.sparsegpt against the published rules, and against the published files where they are.

``LOBS_HOSTS=FOLDER`` names a folder that holds clones of IST-DASLab/sparsegpt and locuslab/wanda.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import published_sparsegpt as published
from torch import nn

import lobs_native as lobs
from lobs_native.compat.ablate import AblateGPT
from lobs_native.compat.sparsegpt import SparseGPT, SparseGPTOfWanda
from lobs_native.compat.sparsegpt import sweep as host_sweep

ROWS = 20
PATTERNS = {
    "30%": {"sparsity": 0.3},
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "2:4": {"n": 2, "m": 4},
    "4:8": {"n": 4, "m": 8},
}
SPELLED = {"n": "prunen", "m": "prunem"}


def conv1d(inputs, rows):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(rows, inputs)


KINDS = {
    "Linear": lambda: nn.Linear(168, ROWS),
    "Conv1D": lambda: conv1d(168, ROWS),
    "Conv2d": lambda: nn.Conv2d(14, ROWS, (3, 4), stride=2, padding=1),  # 14 * 12 = 168
}


def as_matrix(layer):
    weight = layer.weight.detach()
    return (weight.T if type(layer).__name__ == "Conv1D" else weight.flatten(1)).clone()


def inputs_of(layer):
    """Batches of inputs, correlated, with small and large columns."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Conv2d):
        images = torch.randn(6, 14, 9, 10, generator=generator)
        return list((images + 0.3 * images.mean(1, keepdim=True)).split(3))
    C = as_matrix(layer).shape[1]
    mix = torch.eye(C) + 0.3 * torch.randn(C, C, generator=generator) / C**0.5
    mix *= torch.logspace(-0.5, 0.5, C)
    return [torch.randn(b, 60, C, generator=generator) @ mix for b in (2, 3, 1)]


def collected(layer, batches, kind=SparseGPT):
    gpt = kind(layer)
    for x in batches:
        gpt.add_batch(x, None)
    return gpt


def distance(H, expected):
    """Largest difference, in units of the largest entry."""
    return float((H - expected).abs().max() / expected.abs().max())


def spelled(pattern):
    renamed = {SPELLED.get(name, name): value for name, value in pattern.items()}
    return {"sparsity": 0.0, **renamed}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


# ---- parity with the published rules -------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_mask_weights_and_error_are_the_published_ones(kind, pattern, capsys):
    layer = kind()
    gpt = collected(layer, inputs_of(layer))
    expected = published.prune(as_matrix(layer), gpt.peek(), **pattern)
    gpt.fasterprune(**spelled(pattern))
    after = as_matrix(layer)
    assert torch.equal(after == 0, expected.gone)
    largest = expected.weight.abs().max()
    assert (after - expected.weight).abs().max() < 1e-4 * largest
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("time ")
    assert float(first.split()[1]) >= 0
    assert second.startswith("error ")
    assert float(second.split()[1]) == pytest.approx(expected.error, rel=1e-3)


@pytest.mark.parametrize(("columns", "blocksize"), [(130, 128), (100, 33), (7, 128), (64, 1)])
@pytest.mark.parametrize("dead", [False, True])
def test_odd_sizes_and_dead_columns(columns, blocksize, dead):
    layer = nn.Linear(columns, ROWS)
    batches = inputs_of(layer)
    if dead:
        for x in batches:
            x[..., [2, 5]] = 0.0
    gpt = collected(layer, batches)
    expected = published.prune(as_matrix(layer), gpt.peek(), 0.5, blocksize=blocksize)
    gpt.fasterprune(0.5, blocksize=blocksize)
    assert torch.equal(layer.weight == 0, expected.gone | (expected.weight == 0))
    torch.testing.assert_close(layer.weight.double(), expected.weight, rtol=1e-4, atol=1e-5)
    if dead:
        assert not layer.weight[:, [2, 5]].any()


@pytest.mark.parametrize(("columns", "blocksize"), [(131, 128), (99, 34)])
def test_groups_are_counted_from_the_start_of_a_block(columns, blocksize):
    """The rest at the end of a block is a group smaller than m."""
    layer = nn.Linear(columns, ROWS)
    gpt = collected(layer, inputs_of(layer))
    expected = published.prune(as_matrix(layer), gpt.peek(), n=2, m=4, blocksize=blocksize)
    gpt.fasterprune(0, prunen=2, prunem=4, blocksize=blocksize)
    assert torch.equal(layer.weight == 0, expected.gone)
    torch.testing.assert_close(layer.weight.double(), expected.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer = nn.Linear(168, ROWS).to(dtype)
    batches = [x.to(dtype) for x in inputs_of(layer)]
    gpt = collected(layer, batches)
    expected = published.prune(as_matrix(layer), gpt.peek(), 0.5)
    gpt.fasterprune(0.5)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight == 0, expected.gone)
    eps = max(torch.finfo(dtype).eps, 1e-4)
    assert (layer.weight - expected.weight).abs().max() < eps * expected.weight.abs().max()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
def test_a_block_loses_one_more_than_its_share(sparsity):
    """The host's count: sort()[int(numel * s)] with <=. At s = 0 it still removes one per block."""
    layer = nn.Linear(300, ROWS)
    collected(layer, inputs_of(layer)).fasterprune(sparsity)
    for block in layer.weight.split(128, dim=1):
        assert int((block == 0).sum()) == int(block.numel() * sparsity) + 1


def test_all_ties_of_the_threshold_are_removed():
    layer = nn.Linear(8, 8, bias=False)
    nn.init.ones_(layer.weight)
    gpt = SparseGPT(layer)
    gpt.H = torch.eye(8)
    gpt.fasterprune(0.25)
    assert not layer.weight.any()


@pytest.mark.parametrize("kind", ["spread", "few values", "sorted", "sorted down", "constant"])
@pytest.mark.parametrize("sparsity", [0.0, 1e-4, 0.5, 0.97, 0.99999])
def test_the_threshold_of_a_large_block_is_the_same_as_by_sorting(kind, sparsity):
    score = torch.rand(300, 128) ** 4
    if kind == "few values":
        score = (score * 7).round()
    elif kind == "constant":
        score.fill_(0.3)
    elif kind.startswith("sorted"):
        score = score.flatten().sort(descending=kind.endswith("down")).values.view(300, 128)
    cut = score.flatten().sort().values[int(score.numel() * sparsity)]
    assert torch.equal(host_sweep.by_threshold(score, sparsity), score <= cut)


class Quantizer:
    """The interface of the published one, four bits, one scale per row."""

    maxq = torch.tensor(15)

    def __init__(self):
        self.scale = self.zero = torch.zeros(1)

    def ready(self):
        return bool((self.scale != 0).all())

    def find_params(self, x, weight=False):
        assert weight
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        self.scale = (high - low) / self.maxq
        self.zero = torch.round(-low / self.scale)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["50%", "2:4"])
def test_a_quantizer_is_used_in_the_same_sweep(pattern):
    layer = nn.Linear(168, ROWS)
    gpt = collected(layer, inputs_of(layer))
    gpt.quantizer = Quantizer()
    known = Quantizer()
    known.find_params(layer.weight.detach(), weight=True)

    def quantize(x):
        level = torch.clamp(torch.round(x / known.scale) + known.zero, 0, 15)
        return known.scale.double() * (level - known.zero)

    expected = published.prune(as_matrix(layer), gpt.peek(), **pattern, quantize=quantize)
    gpt.fasterprune(**spelled(pattern))
    # A weight half-way between two levels may round either way, which changes the rest of its row.
    same = (layer.weight - expected.weight).abs().amax(1) < 1e-4
    assert int(same.sum()) >= ROWS - 2
    levels = layer.weight.detach() / known.scale
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


# ---- the second moment ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_h_is_scaled_by_sequences(kind, dtype):
    layer = KINDS[kind]().to(dtype)
    batches = [x.to(dtype) for x in inputs_of(layer)]
    batches.append(batches[0][0])  # (T, C): one sequence
    gpt = collected(layer, batches)
    assert gpt.nsamples == 7
    expected = published.second_moment(
        [(x.reshape(-1, 168), len(x) if x.ndim == 3 else 1) for x in batches]
    )
    assert gpt.H.dtype == torch.float32
    assert distance(gpt.H, expected) < 1e-6
    assert torch.equal(gpt.H, gpt.H.T)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding": "same", "dilation": 2},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 3)},
    ],
)
def test_h_of_a_convolution_is_that_of_its_patches(changes):
    """With one weight set to one, the layer's own output is a column of patches."""
    layer = nn.Conv2d(3, 2 * 3 * 4, (2, 4), bias=False, **changes).double()
    layer.weight.data = torch.eye(24, dtype=torch.float64).reshape(24, 3, 2, 4)
    images = torch.randn(3, 3, 8, 9, dtype=torch.float64)
    patches = layer(images).detach().movedim(1, -1).reshape(-1, 24)
    gpt = collected(layer, [images[:2], images[2]])
    assert gpt.nsamples == 3
    torch.testing.assert_close(gpt.H.double(), 2 / 3 * patches.T @ patches, rtol=1e-5, atol=1e-4)


def test_h_may_be_read_changed_and_replaced_at_any_time():
    layer = nn.Linear(24, 4)
    first, second = torch.randn(2, 5, 24), torch.randn(3, 7, 24)
    gpt = collected(layer, [first])
    gpt.H += torch.eye(24)
    gpt.add_batch(second, None)
    expected = published.second_moment([(first.reshape(-1, 24), 2), (second.reshape(-1, 24), 3)])
    expected += 2 / 5 * torch.eye(24)
    torch.testing.assert_close(gpt.H.double(), expected, rtol=1e-5, atol=1e-5)
    gpt.H.mul_(2)  # as an all_reduce would, on the tensor itself
    torch.testing.assert_close(gpt.peek().double(), 2 * expected, rtol=1e-5, atol=1e-5)
    gpt.H = torch.eye(24)
    torch.testing.assert_close(gpt.peek(), torch.eye(24))
    gpt.nsamples = 1
    gpt.add_batch(torch.zeros(1, 1, 24), None)
    torch.testing.assert_close(gpt.H, torch.eye(24) / 2)


def test_a_changed_nsamples_reweights_what_has_been_collected():
    layer = nn.Linear(24, 4)
    x = torch.randn(2, 5, 24)
    gpt = collected(layer, [x])
    before = gpt.peek()
    gpt.nsamples = 6
    gpt.add_batch(torch.zeros(2, 5, 24), None)
    torch.testing.assert_close(gpt.H, before * 6 / 8)


def test_results_do_not_depend_on_torch_s_default_dtype():
    layer = nn.Linear(24, 4)
    other = nn.Linear(24, 4)
    other.load_state_dict(layer.state_dict())
    batches = inputs_of(layer)
    collected(layer, batches).fasterprune(0.5)
    torch.set_default_dtype(torch.float64)
    try:
        collected(other, batches).fasterprune(0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(layer.weight, other.weight)


def test_peeking_changes_nothing():
    layer = nn.Linear(24, 4)
    batches = [torch.randn(3, 5, 24), torch.randn(4, 5, 24)]
    plain = collected(layer, batches)
    peeked = SparseGPT(layer)
    for x in batches:
        peeked.add_batch(x, None)
        peeked.peek()
    assert torch.equal(plain.H, peeked.H)


def test_pruning_consumes_h():
    layer = nn.Linear(24, 4)
    gpt = collected(layer, inputs_of(layer))
    gpt.fasterprune(0.5)
    assert not hasattr(gpt, "H")
    with pytest.raises(lobs.ArgumentError, match="consumed"):
        gpt.fasterprune(0.5)
    gpt.free()
    assert gpt.H is None
    with pytest.raises(lobs.ArgumentError, match="make a new object"):
        gpt.add_batch(torch.zeros(1, 24), None)


# ---- intended differences ------------------------------------------------------------------------


def test_the_old_weight_tensor_is_unchanged():
    layer = KINDS["Conv1D"]()
    held, before = layer.weight.data, layer.weight.data.clone()
    collected(layer, inputs_of(layer)).fasterprune(0.5)
    assert torch.equal(held, before)
    assert layer.weight.is_contiguous()
    assert layer.weight.requires_grad


def test_a_failed_inversion_changes_nothing():
    layer = nn.Linear(24, 4)
    gpt = collected(layer, [torch.randn(1, 3, 24)])
    before, H = layer.weight.data.clone(), gpt.peek()
    with pytest.raises(lobs.NotPositiveDefiniteError, match="percdamp=0"):
        gpt.fasterprune(0.5, percdamp=0.0)
    assert torch.equal(layer.weight, before)
    assert torch.equal(gpt.peek(), H)
    gpt.fasterprune(0.5, percdamp=0.01)
    assert int((layer.weight == 0).sum()) == 49


def test_inputs_that_are_not_finite_are_refused_at_once():
    layer = nn.Linear(24, 4)
    gpt = collected(layer, [torch.randn(1, 3, 24)])
    H = gpt.peek()
    with pytest.raises(lobs.NonFiniteError):
        gpt.add_batch(torch.full((1, 3, 24), torch.nan), None)
    assert torch.equal(gpt.peek(), H)
    assert gpt.nsamples == 1


def test_a_weight_that_overflows_its_dtype_is_an_error():
    layer = nn.Linear(2, 1).half()
    layer.weight.data = torch.tensor([[6e4, 6e4]]).half()
    gpt = SparseGPT(layer)
    gpt.H = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    with pytest.raises(lobs.NonFiniteError, match="overflowed float16"):
        gpt.fasterprune(0.0, percdamp=0.0)
    assert torch.equal(layer.weight, torch.tensor([[6e4, 6e4]]).half())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, lobs.ArgumentError, "sparsity: 1.0"),
        ({"sparsity": -0.1}, lobs.ArgumentError, "sparsity: -0.1"),
        ({"sparsity": 0, "prunen": 5, "prunem": 4}, lobs.ArgumentError, "5 of every 4"),
        ({"sparsity": 0, "prunen": 2, "prune_n": 1, "prunem": 4}, lobs.ArgumentError, "contradict"),
        ({"sparsity": 0.5, "blocksize": 0}, lobs.ArgumentError, "blocksize: 0"),
        ({"sparsity": 0.5, "percdamp": -1}, lobs.ArgumentError, "percdamp: -1"),
        ({"sparsity": 0, "prunen": 3, "prunem": 4, "blocksize": 22}, lobs.PatternError, "of 2"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_used_up(arguments, error, message):
    layer = nn.Linear(48, 4)
    gpt = collected(layer, inputs_of(layer))
    before = layer.weight.data.clone()
    with pytest.raises(error, match=message):
        gpt.fasterprune(**arguments)
    assert torch.equal(layer.weight, before)
    gpt.fasterprune(0.5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(3, 4, 2), "a Conv1d"),
        (nn.Conv2d(4, 4, 2, groups=2), "2 groups"),
        (nn.Embedding(3, 4), "a Embedding"),
    ],
)
def test_layers_that_the_host_gets_wrong_are_refused(layer, message):
    with pytest.raises(lobs.LobsError, match=message):
        SparseGPT(layer)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(lobs.ShapeError, match="24 inputs"):
        SparseGPT(nn.Linear(24, 4)).add_batch(torch.zeros(2, 3, 12), None)


@pytest.mark.parametrize(
    ("H", "error", "message"),
    [
        (torch.eye(12), lobs.ShapeError, r"H: \(12, 12\)"),
        (torch.eye(24).double(), lobs.DtypeError, "H: dtype"),
    ],
)
def test_an_h_that_does_not_fit_is_refused(H, error, message):
    gpt = SparseGPT(nn.Linear(24, 4))
    with pytest.raises(error, match=message):
        gpt.H = H


def test_a_layer_without_inputs_is_not_emptied():
    """The published rule for dead inputs would set all its weights to zero."""
    layer = nn.Linear(24, 4)
    before = layer.weight.data.clone()
    with pytest.raises(lobs.ArgumentError, match="no inputs"):
        collected(layer, [torch.zeros(1, 5, 24)]).fasterprune(0.5)
    assert torch.equal(layer.weight, before)


def test_both_spellings_of_groups():
    one, other = nn.Linear(48, 4), nn.Linear(48, 4)
    other.load_state_dict(one.state_dict())
    collected(one, inputs_of(one)).fasterprune(0, prunen=2, prunem=4)
    collected(other, inputs_of(one)).fasterprune(0, prune_n=2, prune_m=4)
    assert torch.equal(one.weight, other.weight)
    assert ((one.weight.view(4, 12, 4) == 0).sum(2) == 2).all()


def test_wanda_s_copy_prints_nothing(capsys):
    layer = nn.Linear(48, 4)
    collected(layer, inputs_of(layer), SparseGPTOfWanda).fasterprune(0.5)
    assert capsys.readouterr().out == ""


# ---- other masks ---------------------------------------------------------------------------------


class Args:
    def __init__(self, prune_method):
        self.prune_method = prune_method


def test_ablate_repairs_for_any_mask():
    layer = nn.Linear(168, ROWS)
    gpt = collected(layer, inputs_of(layer), AblateGPT)
    mask = torch.rand(ROWS, 168) < 0.4
    expected = published.prune(as_matrix(layer), gpt.peek(), mask=mask)
    gpt.fasterprune(Args(""), 0.0, mask=mask)
    assert torch.equal(layer.weight == 0, mask)
    assert distance(layer.weight.detach(), expected.weight) < 1e-4


def test_ablate_chooses_by_magnitude_and_by_wanda():
    """On uncorrelated inputs nothing is repaired, so the weights show the choice."""
    for method in ("ablate_mag", "ablate_wanda"):
        layer = nn.Linear(64, ROWS)
        before = as_matrix(layer)
        gpt = AblateGPT(layer)
        gpt.H = torch.eye(64)
        gpt.scaler_row = torch.linspace(0.1, 3, 64)
        score = before.abs() * (gpt.scaler_row.sqrt() if "wanda" in method else 1)
        assert torch.equal(
            gpt.get_wanda_mask(0.25, 0, 0), _lowest(before.abs() * gpt.scaler_row.sqrt(), 16)
        )
        pairs = (before.abs() if "mag" in method else score).view(ROWS, 16, 4)
        mask = gpt.get_mag_mask(0, 2, 4) if "mag" in method else gpt.get_wanda_mask(0, 2, 4)
        assert torch.equal(mask.view(ROWS, 16, 4), _lowest(pairs, 2))
        assert int(gpt.get_mag_mask(0.5, 0, 0).sum()) == before.numel() // 2 + 1
        gpt.fasterprune(Args(method), 0.5)
        cut = score.flatten().sort().values[before.numel() // 2]
        assert torch.equal(layer.weight == 0, score <= cut)


def _lowest(score, count):
    return score.argsort(dim=-1).argsort(dim=-1) < count


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 0.5}, lobs.ArgumentError, "prune_method"),
        ({"sparsity": 0.5, "mask": torch.ones(2, 2, dtype=torch.bool)}, lobs.ShapeError, "mask"),
        ({"sparsity": 0.5, "mask": torch.ones(4, 24)}, lobs.DtypeError, "mask"),
    ],
)
def test_ablate_refuses_wrong_arguments(arguments, error, message):
    layer = nn.Linear(24, 4)
    gpt = collected(layer, inputs_of(layer), AblateGPT)
    with pytest.raises(error, match=message):
        gpt.fasterprune(Args("sparsegpt"), **arguments)
    gpt.fasterprune(Args("mag"), 0.5)


# ---- our own numerics ----------------------------------------------------------------------------


def true_error(before, layer, H):
    change = as_matrix(layer).double() - before.double()
    return float((change @ H.double() * change).sum()) / 2


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["50%", "2:4"])
def test_the_exact_method_is_available_under_the_host_s_name(pattern, capsys):
    errors = {}
    for method in ("host", "sweep", "exact"):
        torch.manual_seed(5)
        layer = nn.Linear(168, ROWS)
        before = as_matrix(layer)
        gpt = collected(layer, inputs_of(layer))
        H = gpt.peek()
        if method != "host":
            gpt.numerics, gpt.method = "ours", method
        gpt.fasterprune(**spelled(pattern))
        errors[method] = true_error(before, layer, H)
        printed = float(capsys.readouterr().out.split()[-1])
        if method != "host":
            assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
            assert printed == pytest.approx(errors[method], rel=1e-4)
            assert gpt.result.method == method
    assert errors["exact"] < 0.9 * errors["sweep"]
    assert errors["sweep"] < 1.05 * errors["host"]


def test_our_numerics_refuse_unsupported_arguments():
    layer = nn.Linear(48, 4)
    gpt = collected(layer, inputs_of(layer))
    gpt.numerics = "ours"
    gpt.quantizer = Quantizer()
    with pytest.raises(lobs.ArgumentError, match="quantizer"):
        gpt.fasterprune(0.5)
    gpt.numerics = "theirs"
    with pytest.raises(lobs.ArgumentError, match="'theirs'"):
        gpt.fasterprune(0.5)
    with (
        pytest.raises(lobs.ArgumentError, match="method: 'obs'"),
        lobs.compat.patch("sparsegpt", numerics="ours", method="obs"),
    ):
        pass


# ---- the published files -------------------------------------------------------------------------

HOSTS = os.environ.get("LOBS_HOSTS")
FILES = {"sparsegpt": ("sparsegpt", "sparsegpt"), "wanda": ("wanda", "lib.sparsegpt")}
needs_hosts = pytest.mark.skipif(HOSTS is None, reason="LOBS_HOSTS names no folder with the hosts")


@pytest.fixture(params=FILES)
def original(request, monkeypatch):
    """The host's own module, which calls CUDA, replaced here since there is none."""
    folder, name = FILES[request.param]
    if not (Path(HOSTS) / folder).is_dir():
        pytest.skip(f"LOBS_HOSTS has no folder {folder}")
    monkeypatch.syspath_prepend(str(Path(HOSTS) / folder))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    before = set(sys.modules)
    yield importlib.import_module(name)
    for added in set(sys.modules) - before:
        if added in ("sparsegpt", "quant", "lib", "lib.sparsegpt", "lib.ablate"):
            del sys.modules[added]


def groups(module, n, m):
    names = ("prunen", "prunem") if module.__name__ == "sparsegpt" else ("prune_n", "prune_m")
    return dict(zip(names, (n, m), strict=True))


@needs_hosts
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_host_s_own_class_gives_the_same(original, kind, pattern, dtype):
    """From the same H: identical masks, weights within 1e-4."""
    layer = kind().to(dtype)
    other = kind().to(dtype)
    other.load_state_dict(layer.state_dict())
    batches = [x.to(dtype) for x in inputs_of(layer)]
    ours, theirs = collected(layer, batches), original.SparseGPT(other)
    if not isinstance(layer, nn.Conv2d):  # the host fails on images
        for x in batches:
            theirs.add_batch(x, None)
        assert distance(ours.peek(), theirs.H) < 1e-6
        assert ours.nsamples == theirs.nsamples
    theirs.H = ours.peek()
    arguments = groups(original, pattern.get("n", 0), pattern.get("m", 0))
    for gpt in (ours, theirs):
        gpt.fasterprune(pattern.get("sparsity", 0), **arguments)
    assert torch.equal(layer.weight == 0, other.weight == 0)
    bound = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert distance(layer.weight.detach(), other.weight.detach()) <= bound
    assert type(theirs).__module__ == original.__name__


@needs_hosts
def test_the_host_s_quantisation_gives_the_same(original):
    if original.__name__ != "sparsegpt":
        pytest.skip("wanda's copy does not quantise")
    layer, other = nn.Linear(168, ROWS), nn.Linear(168, ROWS)
    other.load_state_dict(layer.state_dict())
    ours, theirs = collected(layer, inputs_of(layer)), original.SparseGPT(other)
    theirs.H = ours.peek()
    for gpt in (ours, theirs):
        gpt.quantizer = original.Quantizer()
        gpt.quantizer.configure(4, perchannel=True, sym=False, mse=False)
        gpt.fasterprune(0.5)
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-4, atol=1e-5)


@needs_hosts
def test_the_host_is_patched_verified_and_restored(original, capsys):
    own = original.SparseGPT
    layer = nn.Linear(168, ROWS)
    with lobs.compat.patch("sparsegpt", verify=1) as record:
        assert original.SparseGPT is not own
        gpt = original.SparseGPT(layer)
        for x in inputs_of(layer):
            gpt.add_batch(x, None)
        gpt.fasterprune(0.5)
        gpt.free()
    assert original.SparseGPT is own
    add, prune = record.lines[-2:] if original.__name__ == "lib.sparsegpt" else record.lines[:2]
    assert (add.calls, add.verified, prune.calls, prune.verified) == (3, 3, 1, 1)
    assert add.values < 1e-5
    assert prune.values < 1e-5
    assert prune.mask == 0
    assert capsys.readouterr().out.count("error") == (original.__name__ == "sparsegpt")


@needs_hosts
@pytest.mark.parametrize("method", ["ablate_wanda_iter", "ablate_mag_iter", "mask"])
@pytest.mark.parametrize("pattern", [(0.5, 0, 0), (0, 2, 4)], ids=["50%", "2:4"])
def test_wanda_s_ablation_gives_the_same(original, method, pattern):
    if original.__name__ != "lib.sparsegpt":
        pytest.skip("only wanda has it")
    theirs_of = importlib.import_module("lib.ablate").AblateGPT
    layer, other = nn.Linear(168, ROWS), nn.Linear(168, ROWS)
    other.load_state_dict(layer.state_dict())
    ours, theirs = (
        collected(x, inputs_of(x), k) for x, k in ((layer, AblateGPT), (other, theirs_of))
    )
    torch.testing.assert_close(ours.scaler_row, theirs.scaler_row, rtol=1e-5, atol=0)
    sparsity, n, m = pattern
    theirs.H, theirs.scaler_row = ours.peek(), ours.scaler_row.clone()
    masks = [gpt.get_wanda_mask(*pattern) for gpt in (ours, theirs)]
    assert torch.equal(*masks)
    for gpt, mask in zip((ours, theirs), masks, strict=True):
        chosen = mask if method == "mask" else None
        gpt.fasterprune(Args(method), sparsity, mask=chosen, prune_n=n, prune_m=m)
    assert torch.equal(layer.weight == 0, other.weight == 0)
    assert distance(layer.weight.detach(), other.weight.detach()) < 1e-4


# The host's own behaviour where ours differs intentionally, so that a change there shows here.


@needs_hosts
def test_the_host_fails_on_images(original):
    layer = KINDS["Conv2d"]()
    with pytest.raises(RuntimeError):
        original.SparseGPT(layer).add_batch(inputs_of(layer)[0], None)


@needs_hosts
def test_the_host_loses_h_when_it_fails(original):
    theirs = collected(nn.Linear(24, 4), [torch.randn(1, 3, 24)], original.SparseGPT)
    with pytest.raises(torch.linalg.LinAlgError):
        theirs.fasterprune(0.5, percdamp=0.0)
    assert not hasattr(theirs, "H")


@needs_hosts
def test_the_host_empties_a_layer_without_inputs(original):
    layer = nn.Linear(24, 4)
    original.SparseGPT(layer).fasterprune(0.5)
    assert not layer.weight.any()


@needs_hosts
def test_the_host_writes_infinities(original):
    layer = nn.Linear(2, 1).half()
    layer.weight.data = torch.tensor([[6e4, 6e4]]).half()
    theirs = original.SparseGPT(layer)
    theirs.H = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    theirs.fasterprune(0.0, percdamp=0.0)
    assert bool(torch.isinf(layer.weight).any())


@needs_hosts
def test_the_host_removes_at_sparsity_0_and_fails_at_1(original):
    layer = nn.Linear(300, 4)
    collected(layer, inputs_of(layer), original.SparseGPT).fasterprune(0.0)
    assert int((layer.weight == 0).sum()) == 3  # one per block
    with pytest.raises(IndexError):
        collected(layer, inputs_of(layer), original.SparseGPT).fasterprune(1.0)


def test_later_batches_count_less_in_scaler_row():
    """The host divides twice by the samples seen, so among equal batches the k-th counts 1 / k."""
    one, three = torch.ones(1, 5, 8), 3 * torch.ones(1, 5, 8)
    rising, falling = (
        collected(nn.Linear(8, 4), batches, AblateGPT).scaler_row
        for batches in ([one, three], [three, one])
    )
    torch.testing.assert_close(rising, torch.full((8,), 27.5))
    torch.testing.assert_close(falling, torch.full((8,), 47.5))
