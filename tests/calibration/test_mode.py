"""Modes see operations, and leave torch's compiler where it is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lobs_native.calibration.mode import Mode
from lobs_native.calibration.sums import Sums
from stress.forks import Forks

PRUNE = """
import sys, torch, lobs_native as lobs
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
for inputs in ("corrected", "pruned"):
    lobs.prune(model, [torch.randn(20, 4)], sparsity=0.5, inputs=inputs, progress=False)
print("torch._dynamo" in sys.modules)
"""


class Names(Mode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiler", [False, True])
def test_a_mode_sees_operations_with_the_compiler_and_without(compiler, monkeypatch):
    if compiler:
        pytest.importorskip("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with Names() as seen:
        result = torch.ones(2) + 1
    assert seen.names == ["aten::ones", "aten::add.Tensor"]
    assert result.tolist() == [2, 2]


def test_operations_do_not_pass_through_python_where_no_sum_is_looked_for():
    with Sums({}):
        assert _get_current_dispatch_mode() is None
    with Sums({"layer": torch.nn.Linear(2, 2)}) as sums:
        assert _get_current_dispatch_mode() is sums
    assert _get_current_dispatch_mode() is None


def test_pruning_does_not_load_the_compiler():
    with Forks() as fresh:  # other tests have modules loaded for the shared ones
        assert fresh.run(["-c", PRUNE]).stdout == "False\n"
