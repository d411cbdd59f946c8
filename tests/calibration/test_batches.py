"""Batches that do not fit the model, and data without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lobs_native as lobs


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x + y)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


X, LABELS = torch.randn(9, 6), torch.arange(9)
MISFITS = {
    "pairs": (chain, [(X, LABELS)], r"of 2 parts .*forward\(input\).*pass the inputs only"),
    "lists": (chain, [[X, LABELS]], "of 2 parts"),
    "loader": (chain, DataLoader(TensorDataset(X, LABELS), batch_size=3), "of 2 parts"),
    "later": (chain, [X, (X, LABELS)], "of 2 parts"),
    "dict": (chain, [{"input": X, "labels": LABELS}], "keys input, labels .*'labels'"),
    "too few": (Sum, [X], r"one tensor .*forward\(x, y\).*'y'; pass a tuple or dict"),
    "too few by name": (Sum, [{"x": X}], r"keys x .*'y'"),
    "too many": (Sum, [(X, X, LABELS)], "of 3 parts"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_batches_that_the_model_cannot_take_are_refused_with_a_way_out(kind):
    make, data, message = MISFITS[kind]
    model = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(lobs.ArgumentError, match=f"calibration: a batch .*{message}.*forward="):
        lobs.prune(model, data, sparsity=0.5, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_the_way_out_works():
    report = lobs.prune(
        chain(),
        DataLoader(TensorDataset(X, LABELS), batch_size=3),
        forward=lambda model, batch: model(batch[0]),
        sparsity=0.5,
        progress=False,
    )
    assert [layer.rows for layer in report.layers] == [9, 9]


def test_a_type_error_of_the_model_s_own_is_left_as_it_is():
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return self.a(x) + "text"

    with pytest.raises(TypeError, match="unsupported operand"):
        lobs.prune(Wrong(), [X], sparsity=0.5, progress=False)


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
def test_data_without_rows_is_refused_by_the_layer(inputs):
    with pytest.raises(lobs.ArgumentError, match="calibration: the model never calls '0'"):
        lobs.prune(chain(), [X[:0]], sparsity=0.5, inputs=inputs, progress=False)


def test_data_of_padding_alone_is_refused_by_the_layer():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(x)

    batch = {"x": X[None], "attention_mask": torch.zeros(1, 9)}
    with pytest.raises(lobs.ArgumentError, match=r"layer 'a': it saw no rows.*padding"):
        lobs.prune(Masked(), [batch], sparsity=0.5, progress=False)


def test_some_empty_batches_do_no_harm():
    report = lobs.prune(chain(), [X[:0], X, X[:0]], sparsity=0.5, progress=False)
    assert [layer.rows for layer in report.layers] == [9, 9]
