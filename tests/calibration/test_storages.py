"""What is known of tensors holds for all views of their memory, and only while that lasts."""

from __future__ import annotations

import torch

from lobs_native.calibration.mixtures import Outputs
from lobs_native.calibration.storages import Storages, address


def test_views_share_a_value_and_a_freed_storage_has_none():
    kept, x = Storages[str](), torch.ones(5000)
    assert kept.note((x, None), "it")
    assert kept.of(x.view(50, 100)[3:]) == "it"
    assert kept.of(x.clone()) is None
    assert not kept.note(torch.empty(0), "nothing")
    where = address(x)
    del x
    for _ in range(20):
        again = torch.ones(5000)
        if address(again) == where:
            assert kept.of(again) is None
    kept.forget_freed()
    assert not kept


def test_an_output_names_each_layer_once_however_often_it_is_combined_with_itself():
    outputs, x = Outputs[str](), torch.ones(3)
    outputs.note(["a"], x)
    for _ in range(20):
        x, before = x + x, x
        outputs.follow(torch.ops.aten.add.Tensor, (before, before), x)
    assert list(outputs.of(x)) == ["a"]
