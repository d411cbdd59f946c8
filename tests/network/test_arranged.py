"""Weights that are copied in another order or dtype before they are multiplied, joined with others,
or multiplied in parts that do not lie together, are pruned like all others."""

from __future__ import annotations

import pytest
import torch
from helpers.own_weights import Net, prune, rows, sequences
from torch.nn import functional

import lobs_native as lobs

pytestmark = pytest.mark.usefixtures("one_thread")

ARRANGED = {
    "einsum that copies": (
        sequences,
        lambda m, x: torch.einsum("bnd,hde->bnhe", x, m.w).flatten(2),
        {"w": torch.randn(2, 16, 4)},
    ),
    "output projection of heads": (
        sequences,
        lambda m, x: torch.einsum("bnhd,ohd->bno", x.unflatten(2, (2, 8)), m.w),
        {"w": torch.randn(8, 2, 8)},
    ),
    "transposed copy": (
        rows,
        lambda m, x: functional.linear(x, m.w.T.contiguous()),
        {"w": torch.randn(16, 8)},
    ),
    "copy in another dtype": (
        rows,
        lambda m, x: functional.linear(x.float(), m.w.float()).double(),
        {"w": torch.randn(8, 16)},
    ),
    "columns": (
        rows,
        lambda m, x: torch.cat([x[:, :8] @ m.w[:, :8].T, x[:, 8:] @ m.w[:, 8:].T], 1),
        {"w": torch.randn(4, 16)},
    ),
    "heads in the middle": (
        sequences,
        lambda m, x: torch.einsum("bnhd,shd->bnhs", x.unflatten(2, (4, 4)), m.w).flatten(2),
        {"w": torch.randn(2, 4, 4)},
    ),
}


@pytest.mark.parametrize("kind", ARRANGED)
@pytest.mark.parametrize("method", ["exact", "magnitude"])
def test_the_error_is_the_change_of_the_product_in_whatever_order_the_weight_is_copied(
    kind, method
):
    data, forward, parts = ARRANGED[kind]
    net, batches = Net(forward, **parts), data()
    before = [net.run(net, x) for x in batches]
    report = prune(net, batches, inputs="dense", method=method)
    assert report.skipped == ()
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.5]
    change = [(net.run(net, x) - y).detach() for x, y in zip(batches, before, strict=True)]
    rows_seen = sum(y.shape[:-1].numel() for y in before)
    error = sum(float(d.square().sum()) for d in change) / rows_seen
    tolerance = 1e-5 if "dtype" in kind else 1e-9
    assert report.layers[0].error == pytest.approx(error, rel=tolerance)
    assert report.layers[0].rows == rows_seen


@pytest.mark.parametrize("kind", ARRANGED)
def test_corrected_inputs_masks_and_other_targets_work_in_that_order_too(kind):
    data, forward, parts = ARRANGED[kind]
    net, batches = Net(forward, **parts), data()
    report = prune(net, batches, inputs="corrected", scope="row")
    assert lobs.apply_masks(net, report.masks) == 0
    again = prune(net, batches, sparsity=0.75, scope="model", sensitivity=None)
    assert again.removed == 0.75 * again.weights
    for name, mask in again.masks.items():
        assert not bool((mask & ~report.masks[name]).any())  # zeros stay


# ---- weights that are joined in one tensor first -------------------------------------------------

JOINED = {  # and the part of the inputs (n, 16) that each weight is multiplied by
    "rows": (
        lambda m, x: functional.linear(x, torch.cat([m.a, m.b])),
        {"a": (slice(None), (3, 16)), "b": (slice(None), (5, 16))},
    ),
    "rows, and something fixed": (
        lambda m, x: functional.linear(x, torch.cat([m.a, m.fixed, m.b])),
        {"a": (slice(None), (3, 16)), "b": (slice(None), (4, 16))},
    ),
    "columns": (
        lambda m, x: functional.linear(x, torch.cat([m.a, m.b], 1)),
        {"a": (slice(0, 6), (8, 6)), "b": (slice(6, 16), (8, 10))},
    ),
    "transposed": (
        lambda m, x: x @ torch.cat([m.a.T, m.b.T], -1),
        {"a": (slice(None), (3, 16)), "b": (slice(None), (5, 16))},
    ),
    "stacked": (
        lambda m, x: torch.einsum("nc,erc->ner", x, torch.stack([m.a, m.b])).flatten(1),
        {"a": (slice(None), (4, 16)), "b": (slice(None), (4, 16))},
    ),
    "stacked in the middle": (
        lambda m, x: torch.einsum("nc,rec->nre", x, torch.stack([m.a, m.b], 1)).flatten(1),
        {"a": (slice(None), (4, 16)), "b": (slice(None), (4, 16))},
    ),
}


def joined(kind: str) -> tuple[Net, dict[str, slice]]:
    forward, parts = JOINED[kind]
    net = Net(forward, **{name: torch.randn(shape) for name, (_, shape) in parts.items()})
    net.register_buffer("fixed", torch.randn(1, 16).double())
    return net, {name: part for name, (part, _) in parts.items()}


@pytest.mark.parametrize("kind", JOINED)
def test_weights_joined_before_they_are_multiplied_are_pruned_each_with_its_own_inputs(kind):
    net, parts = joined(kind)
    batches = rows()
    before = {name: getattr(net, name).detach().clone() for name in parts}
    report = prune(net, batches, inputs="dense")
    assert report.skipped == ()
    assert [layer.name for layer in report.layers] == [*parts, "last"]
    for layer in report.layers[:-1]:
        inputs = torch.cat(batches)[:, parts[layer.name]]
        change = (getattr(net, layer.name).detach() - before[layer.name]) @ inputs.T
        assert layer.rows == len(inputs)
        assert layer.error == pytest.approx(float(change.square().sum()) / len(inputs), rel=1e-9)


@pytest.mark.parametrize("kind", JOINED)
def test_joined_weights_are_corrected_too(kind):
    net, parts = joined(kind)
    report = prune(net, rows(), inputs="corrected")
    assert [layer.sparsity for layer in report.layers] == [0.5] * (len(parts) + 1)


def test_weights_that_are_joined_and_then_changed_are_named():
    net, _ = joined("rows")
    for change in (lambda w: w - w.mean(), lambda w: 2 * w):
        net.run = lambda m, x, change=change: functional.linear(x, change(torch.cat([m.a, m.b])))
        report = prune(net, rows())
        assert [layer.name for layer in report.skipped] == ["a", "b"]
        assert all("before it is multiplied" in layer.reason for layer in report.skipped)
