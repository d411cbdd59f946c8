"""Zeros that are there before a layer with corrected inputs is pruned: they stay, or the layer is
not corrected and says so."""

from __future__ import annotations

import pytest
import torch
from helpers.corrected import chain, convolutions, pruned, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_existing_zeros_stay_zeros():
    model = chain()
    with torch.no_grad():
        model[2].weight.view(-1)[::3] = 0
        model[4].weight.zero_()
    zeros = {i: model[i].weight == 0 for i in (2, 4)}
    report = pruned(model, rows(model))
    assert bool((model[2].weight[zeros[2]] == 0).all())
    assert int((model[2].weight == 0).sum()) == round(0.6 * 30 * 16)
    assert report.layers[1].inherited > 0
    assert bool((model[4].weight == 0).all())
    assert "it already has more zeros (80) than were asked for" in report.layers[2].notes[0]
    assert report.layers[2].sparsity == 1.0
    assert report.layers[2].inherited is not None


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs", "magnitude", "wanda"])
@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_a_sparse_network_pruned_again_has_the_zeros_that_the_report_says(method, inputs, target):
    model = chain()
    options = {"method": method, "inputs": inputs}
    pruned(model, rows(model), **options)
    before = [model[i].weight == 0 for i in (0, 2, 4)]
    report = pruned(model, rows(model), sparsity=target, **options)
    for layer, i, zeros in zip(report.layers, (0, 2, 4), before, strict=True):
        now = model[i].weight == 0
        assert bool(now[zeros].all())
        assert torch.equal(~report.masks[layer.name], now)
        assert layer.sparsity == pytest.approx(max(0.6, target), abs=0.01)
        assert any("more zeros" in note for note in layer.notes) == (target < 0.6)
        assert not any("not corrected" in note for note in layer.notes)


NO_TARGET = {"sparsity": None, "pattern": "1:2"}
ROW = {"scope": "row"}


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs", "magnitude"])
@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (slice(1, 20, 2), NO_TARGET),
        (slice(4, 12), {"pattern": "1x2"}),
        (slice(4, 12), {"pattern": "1x2", **ROW}),
        (slice(4, 12), ROW),
    ],
    ids=["N:M", "blocks", "blocks of a row", "row"],
)
def test_zeros_that_are_removed_anyway_stay_zeros_in_corrected_layers(method, columns, options):
    model = chain()
    with torch.no_grad():
        model[2].weight[3:9, columns] = 0
    zeros = model[2].weight == 0
    report = pruned(model, rows(model), **{"method": method, **options})
    assert bool((model[2].weight[zeros] == 0).all())
    assert report.layers[1].inherited > 0
    assert not any("not corrected" in note for note in report.layers[1].notes)
    sparsity = 0.5 if options is NO_TARGET else 0.6
    assert report.layers[1].sparsity == pytest.approx(sparsity, abs=1e-3)


def test_zeros_stay_zeros_in_corrected_layers_at_any_threshold():
    model = chain()
    with torch.no_grad():
        model[2].weight[3:9, 4:12] = 0
    zeros = model[2].weight == 0
    report = pruned(model, rows(model), sparsity=None, method="lobs", threshold=0.0)
    assert torch.equal(model[2].weight == 0, zeros)
    assert report.layers[1].inherited is not None


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (slice(4, 6), NO_TARGET),
        (slice(5, 8), {"pattern": "1x2"}),
        (slice(0, 22), {"pattern": "1x2", **ROW}),
        (slice(0, 21), ROW),
        (slice(0, 1), {"sparsity": None, "max_error": 0.1}),
    ],
    ids=["N:M", "blocks", "blocks of a row", "row", "max_error"],
)
def test_layers_with_zeros_that_would_be_filled_are_not_corrected_and_have_a_note(columns, options):
    model = chain()
    with torch.no_grad():
        model[2].weight[3, columns] = 0
    report = pruned(model, rows(model), **options)
    assert (
        "not corrected, only calibrated on pruned inputs: its weights"
        in (report.layers[1].notes[0])
    )
    assert report.layers[1].inherited is None


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs", "wanda"])
def test_zeros_of_some_groups_of_a_convolution_stay_zeros(method):
    """Two of the four groups are empty: half of the layer, but more than a group's 60 percent."""
    model = convolutions()
    with torch.no_grad():
        model[2].weight[:4] = 0
    report = pruned(model, rows(model), method=method)
    weight = model[2].weight
    assert bool((weight[:4] == 0).all())
    assert int((weight == 0).sum()) == round(0.6 * weight.numel())
    assert report.layers[1].inherited > 0
