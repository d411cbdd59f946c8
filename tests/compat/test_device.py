"""compat.sparsegpt on a pretend CUDA device: no devices are mixed, and results are the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import pretend
from torch import nn

from lobs_native.compat.ablate import AblateGPT
from lobs_native.compat.sparsegpt import SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["reference", "kernels"])
def device(request):
    row = request.getfixturevalue("emulated") if request.param == "kernels" else None
    with pretend.device(row):
        yield


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0, "prunen": 2, "prunem": 4}])
def test_sparsegpt(device, target, capsys):
    torch.manual_seed(0)
    here, x = nn.Linear(20, 6), torch.randn(3, 30, 20)
    there = copy.deepcopy(here).to(pretend.CUDA)
    for layer, inputs in ((here, x), (there, x.to(pretend.CUDA))):
        gpt = SparseGPT(layer)
        gpt.add_batch(inputs, None)
        assert gpt.H.device == gpt.dev == layer.weight.device
        gpt.fasterprune(**target, blocksize=8)
        gpt.free()
    assert there.weight.device == pretend.CUDA
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-5, atol=1e-6)
    assert int((here.weight == 0).sum()) == (63 if target["sparsity"] else 60)


def test_ablate(device):
    torch.manual_seed(0)
    here, x = nn.Linear(20, 6), torch.randn(3, 30, 20)
    there = copy.deepcopy(here).to(pretend.CUDA)
    for layer, inputs in ((here, x), (there, x.to(pretend.CUDA))):
        gpt = AblateGPT(layer)
        gpt.add_batch(inputs, None)
        gpt.fasterprune(None, 0, mask=gpt.get_wanda_mask(0, 2, 4))
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-5, atol=1e-6)
    assert int((here.weight == 0).sum()) == 60
