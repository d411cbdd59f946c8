"""One run on the first batch shows how a model uses its weights; what that leaves out is waited
for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.stacks import batches, made
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.survey import Survey
from lobs_native.calibration.watch import Touch


class Sometimes(nn.Module):
    """Uses some of its weights only where a batch says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own, self.never = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.ran: list[tuple[str, ...]] = []

    def forward(self, x: Tensor, which: tuple[str, ...] = ()) -> Tensor:
        self.ran.append(which)
        x = self.a(x)
        if "own" in which:
            x = x @ self.own.T
        return self.b(x) if "b" in which else x


@pytest.fixture
def surveyed(monkeypatch):
    """For each run of a model under the survey, what the model had run by then."""
    runs: list[Any] = []
    running = Survey.running

    @contextlib.contextmanager
    def spy(self: Survey) -> Iterator[None]:
        with running(self):
            yield
        runs.append(self.model)

    monkeypatch.setattr(Survey, "running", spy)
    return runs


def test_batches_are_looked_at_closely_only_where_they_use_something_new(surveyed):
    ways = [(), ("own",), (), ("b",), ("own", "b"), ()]
    model = Sometimes()
    data = [(torch.randn(20, 6), way) for way in ways]
    with pytest.warns(UserWarning, match="36 in never: it is not used"):
        report = lobs.prune(model, data, sparsity=0.5, progress=False)
    assert {layer.name for layer in report.layers} == {"a", "b", "own"}
    (never,) = (x for x in report.skipped if x.name == "never")
    assert never.reason == "it is not used on the calibration data"
    assert len(surveyed) == 3
    # Once for each batch, and again for the two that use something for the first time.
    assert model.ran[:8] == [(), ("own",), ("own",), (), ("b",), ("b",), ("own", "b"), ()]


def test_the_first_batch_is_enough_if_it_uses_everything(surveyed):
    model = Sometimes()
    del model.never
    data = [(torch.randn(20, 6), ("own", "b")), (torch.randn(20, 6), ("own",))]
    lobs.prune(model, data, sparsity=0.5, progress=False)
    assert len(surveyed) == 1


@pytest.mark.parametrize("blocks", ["auto", None])
def test_one_run_of_the_first_batch_shows_uses_order_and_blocks(blocks):
    model = made()
    before = model.forwards
    plan = lobs.plan_prune(model, batches(), sparsity=0.5, blocks=blocks)
    assert plan.seconds > 0
    # Then, without computing the blocks, once to see how they are called; and once, with stand-ins
    # for tensors, to see whether Theorem 3.2 covers it.
    assert model.forwards - before == (3 if blocks else 2)


@pytest.mark.parametrize("use", ["product", "view", "lookup", "written", "listed", "beside"])
def test_a_touch_is_any_operation_on_the_memory_of_a_tensor(use):
    memory = torch.zeros(6, 4)
    tensors = [torch.zeros(3), memory[2:4], torch.zeros(2, 2)]
    with Touch(tensors) as touch:
        if use == "product":
            torch.ones(2, 4) @ tensors[1].T
        elif use == "view":
            memory.view(-1)[9:10] + 1
        elif use == "lookup":
            nn.functional.embedding(torch.tensor([1]), memory)
        elif use == "written":
            memory[3].fill_(1.0)
        elif use == "listed":
            torch.cat([torch.ones(1, 4), memory[3:4]])
        else:
            memory[:2] + memory[4:]
            memory[2:4].view(8)
    assert touch.touched == (use != "beside")
