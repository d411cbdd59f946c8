"""Masks with one bit per weight, and under the names of weight files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, ShapeError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def test_names_of_weight_files_and_bits_are_taken_too():
    torch.manual_seed(0)
    masks = {"0": torch.rand(9, 6) < 0.5, "2": torch.rand(4, 9) < 0.5}
    packed = lobs.pack_masks(masks)
    assert {name: tuple(bits.shape) for name, bits in packed.items()} == {"0": (7,), "2": (5,)}
    for name, bits in packed.items():
        expected = np.packbits(masks[name].numpy().reshape(-1), bitorder="little")
        assert bits.tolist() == expected.tolist()
    for given in (
        masks,
        packed,
        {"0.weight": masks["0"], "2.weight": packed["2"]},
    ):
        model = network()
        lobs.apply_masks(model, given)
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight == 0, ~mask)
        with lobs.keep_masks(model, given) as kept:
            with torch.no_grad():
                model[2].weight.add_(1.0)
            kept.apply()
        assert torch.equal(model[2].weight == 0, ~masks["2"])
    alone = nn.Linear(6, 9)
    assert lobs.apply_masks(alone, {"weight": packed["0"]}) == int((~masks["0"]).sum())


def test_bits_that_do_not_fit_are_refused():
    model = network()
    masks = {"0": torch.ones(9, 6, dtype=torch.bool)}
    before = model[0].weight.detach().clone()
    bits = lobs.pack_masks(masks)["0"]
    with pytest.raises(ShapeError, match=r"masks\['0'\]: uint8 of shape \(6,\)"):
        lobs.apply_masks(model, {"0": bits[:6]})
    with pytest.raises(ShapeError, match="uint8"):
        lobs.apply_masks(model, {"0": masks["0"].to(torch.uint8)})
    beyond = bits.clone()
    beyond[6] = 0xFF
    with pytest.raises(ArgumentError, match="beyond its 54 weights"):
        lobs.apply_masks(model, {"0": beyond})
    with pytest.raises(DtypeError, match="masks"):
        lobs.pack_masks({"0": torch.ones(3)})
    with pytest.raises(DtypeError, match="mapping"):
        lobs.pack_masks([masks["0"]])
    assert torch.equal(model[0].weight, before)
