"""Masks as bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.network.packed import PackedMask, packed_bytes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 11), (0, 4)])
def test_a_mask_comes_back_bit_for_bit_from_an_eighth_of_its_bytes(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    for each in (mask, ~mask, mask.mT if mask.ndim > 1 else mask):
        before = each.clone()
        packed = PackedMask.of(each)
        assert torch.equal(packed.unpacked(), before)
        assert torch.equal(each, before)
        assert packed.bits.numel() == packed_bytes(mask.numel()) == (mask.numel() + 7) // 8
        assert packed.removed == int((~before).sum())


def test_the_first_entry_is_in_the_lowest_bit():
    mask = torch.tensor([True, False, False, True, False, False, False, False, True])
    assert PackedMask.of(mask).bits.tolist() == [0b1001, 1]


def test_masks_of_the_report_are_what_the_network_has():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9), nn.ReLU(), nn.Conv1d(1, 3, 2), nn.Flatten(1))
    model[1] = nn.Sequential(nn.ReLU(), nn.Unflatten(1, (1, 9)))
    dense = copy.deepcopy(model)
    report = lobs.prune(model, [torch.randn(40, 13)], sparsity=0.4, progress=False)
    assert set(report.masks) == {"0", "2"}
    for name, mask in report.masks.items():
        weight = model.get_submodule(name).weight
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert torch.equal(mask, weight != 0)
    assert report.removed == sum(int((~mask).sum()) for mask in report.masks.values())
    assert report.weights == sum(dense.get_submodule(n).weight.numel() for n in report.masks)
