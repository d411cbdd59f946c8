"""Padding that torch's own transformer layers and attention are told of, and nested tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.session import Session
from lobs_native.layers import layers_of

LENGTHS = torch.tensor([5, 2, 4])
PADDING = torch.arange(5)[None] >= LENGTHS[:, None]  # (3, 5)


def layer(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(8, 2, 12, dtype=torch.float64, dropout=0.0, **options)


def made(count: int = 2, **options: Any) -> nn.TransformerEncoder:
    one = layer(nn.TransformerEncoderLayer, **options)
    return nn.TransformerEncoder(one, count, enable_nested_tensor=options["batch_first"])


def moments(model: nn.Module, batch: Any, token_mask: bool = True) -> dict[str, Moments]:
    session = Session(model, [batch], None, None, 0, False, token_mask)
    with session.evaluating():
        return calibrate(layers_of(model), session, "test")


def close(a: Moments, b: Moments) -> bool:
    x, y = a.matrices()[0], b.matrices()[0]
    return a.rows == b.rows and float((x - y).norm()) < 1e-12 * float(y.norm())


def alone(model: nn.Module, x: Tensor, padding: Tensor) -> list[dict[str, Moments]]:
    """The moments of each sequence of x (B, T, C) by itself, without its padding."""
    return [moments(model, row[~pad][None], False) for row, pad in zip(x, padding, strict=True)]


def together(parts: list[dict[str, Moments]], name: str) -> Tensor:
    """The second moment of the rows of all parts."""
    rows = sum(part[name].rows for part in parts)
    return sum(part[name].matrices()[0] * part[name].rows for part in parts) / rows


@pytest.mark.parametrize("order", ["batch first", "length first"])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_encoders_see_what_sequences_without_padding_show_them(order, mask):
    first = order == "batch first"
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = PADDING if mask == "bool" else torch.zeros(3, 5).double().masked_fill(PADDING, -1e999)
    given = x if first else x.transpose(0, 1)
    found = moments(made(batch_first=first), {"src": given, "src_key_padding_mask": padding})
    parts = alone(made(batch_first=True), x, PADDING)
    for name, seen in found.items():
        assert seen.rows == int(LENGTHS.sum())
        expected = together(parts, name)
        assert float((seen.matrices()[0] - expected).norm()) < 1e-12 * float(expected.norm()), name


@pytest.mark.parametrize("order", ["batch first", "length first"])
def test_decoders_have_padding_of_their_own_and_of_the_memory(order):
    first = order == "batch first"
    lengths = torch.tensor([3, 4, 1])
    memory_padding = torch.arange(4)[None] >= lengths[:, None]
    batch = [torch.randn(3, n, 8, dtype=torch.float64) for n in (5, 4)]
    tgt, memory = batch if first else [x.transpose(0, 1) for x in batch]
    model = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, batch_first=first), 1)
    found = moments(
        model,
        {
            "tgt": tgt,
            "memory": memory,
            "tgt_key_padding_mask": PADDING,
            "memory_key_padding_mask": memory_padding,
        },
    )
    keys = {f"layers.0.multihead_attn.{which}_proj" for which in "kv"}
    for name, seen in found.items():
        assert seen.rows == int(lengths.sum() if name in keys else LENGTHS.sum()), name
    rows = batch[1][~memory_padding]
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    for name in keys:
        assert torch.allclose(found[name].matrices()[0], rows.T @ rows / len(rows), atol=1e-12)


def test_a_mask_that_the_model_makes_counts_as_well():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = made(batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            padding = torch.arange(x.shape[1])[None] >= lengths[:, None]
            return self.encoder(x, src_key_padding_mask=padding)

    data = [(torch.randn(3, 5, 8, dtype=torch.float64), LENGTHS) for _ in range(3)]
    report = lobs.prune(Net(), data, sparsity=0.5, progress=False)
    assert report.settings["blocks"] == ["encoder.layers"]
    for x in report.layers:
        assert x.rows == 3 * int(LENGTHS.sum())
        assert "12 rows were padding (key_padding_mask) and were left out" in x.notes
    report = lobs.prune(Net(), data, sparsity=0.5, token_mask=None, progress=False)
    assert {x.rows for x in report.layers} == {45}


def test_attention_of_itself_and_of_others_is_told_of_different_rows():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = self.a(x, x, x, key_padding_mask=PADDING)[0]
            return self.a(x, y, y)[0]

    found = moments(Net(), (torch.randn(3, 5, 8), torch.randn(3, 2, 8)))
    rows = {name.removeprefix("a."): m.rows for name, m in found.items()}
    assert rows == {"q_proj": 11 + 15, "k_proj": 11 + 6, "v_proj": 11 + 6, "out_proj": 11 + 15}


@pytest.mark.parametrize("options", [{}, {"blocks": None}, {"inputs": "dense", "scope": "model"}])
def test_nested_encoders_are_pruned_as_others_are(options):
    data = [{"src": torch.randn(3, 5, 8).double(), "src_key_padding_mask": PADDING}] * 2
    nets, reports = [], []
    for nested in (True, False):
        one = layer(nn.TransformerEncoderLayer, batch_first=True)
        nets.append(nn.TransformerEncoder(one, 2, enable_nested_tensor=nested))
        reports.append(lobs.prune(nets[-1], data, sparsity=0.5, progress=False, **options))
    a, b = (list(net.parameters()) for net in nets)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert reports[0].error_bound.measured == reports[1].error_bound.measured > 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("inputs", ["corrected", "dense"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_pruned_as_their_rows_are(layout, inputs):
    parts = [torch.randn(n, 6).double() for n in (4, 1, 7)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    b = copy.deepcopy(a)
    one, two = (
        lobs.prune(net, [x], sparsity=0.5, inputs=inputs, progress=False)
        for net, x in ((a, nested), (b, torch.cat(parts)))
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [x.rows for x in one.layers] == [12, 12]
    assert one.error_bound.measured == pytest.approx(two.error_bound.measured)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_of_attention_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(n, 8).double() for n in (4, 2)])
    model = made(batch_first=True)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(lobs.DtypeError, match=r"nested tensor.*pass padded tensors"):
        lobs.prune(model, [nested], sparsity=0.5, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
