"""What blocks are called with, and what parts of them return, is not computed more often than
needed."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from helpers.stacks import Model, batches, made
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration import replay
from lobs_native.calibration.blocks import find_stacks
from lobs_native.calibration.finished import Finished
from lobs_native.calibration.replay import Replay
from lobs_native.calibration.session import Session
from lobs_native.files import shelf

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(model: nn.Module, data: Any, **options: Any) -> tuple[lobs.Report, dict[str, Tensor]]:
    report = lobs.prune(model, data, progress=False, **{"sparsity": 0.5, **options})
    return report, {name: p.detach().clone() for name, p in model.state_dict().items()}


class Derived(Model):
    """An argument of the blocks is computed from the hidden state along the way."""

    def between(self, x: Tensor, i: int) -> dict[str, Any]:
        return {"scale": float(x.abs().mean())}


class Windowed(Model):
    """Blocks in turn see the whole sequence, or a window of it, which has no mask while the
    sequence is shorter."""

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(x)
        far = torch.ones(x.shape[1], x.shape[1]).tril(-3).bool()
        window = torch.zeros(far.shape).masked_fill(far, -1e4) if far.any() else None
        for i, layer in enumerate(self.layers):
            x = layer(x, mask=window if i % 2 else None)[0]
        return self.head(x)


def counted(model: Model) -> list[int]:
    """How often each block is called and computes something, counted from now on."""
    counts = [0] * len(model.layers)

    def add(i: int) -> Any:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    for i, layer in enumerate(model.layers):
        layer.norm.register_forward_hook(add(i))
    return counts


@pytest.mark.parametrize("kind", [Model, Windowed])
@pytest.mark.parametrize("inputs", ["pruned", "corrected"])
def test_what_blocks_are_called_with_is_known_without_computing_them(kind, inputs, monkeypatch):
    data = [x[:, :length] for x, length in zip(batches(), (2, 7, 7), strict=True)]
    model = made(kind)
    counts, computed = counted(model), []
    enter = Replay.__enter__

    def spy(self: Replay) -> Replay:
        before = list(counts)
        enter(self)
        computed.append([b - a for a, b in zip(before, counts, strict=True)])
        for number, batch in enumerate(data):
            for hollow, call in zip(self._pruned.calls[number], self._calls(batch), strict=True):
                assert hollow.args == call.with_hidden(None).args == (None,)
                masks = hollow.kwargs["mask"], call.kwargs["mask"]
                assert masks[0] is masks[1] is None or torch.equal(*masks)
        return self

    monkeypatch.setattr(Replay, "__enter__", spy)
    report, found = pruned(model, data, inputs=inputs)
    assert report.settings["blocks"] == ["layers"]
    assert computed == [[0, 0, 0]]
    _, plain = pruned(made(kind), data, inputs=inputs, blocks=None)
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_blocks_after_the_last_pruned_one_run_in_whole_networks_only():
    model = made(blocks=4)
    counts = counted(model)
    report, found = pruned(model, batches(), include=["layers.0.*", "layers.1.*"])
    assert report.settings["blocks"] == ["layers"]
    # The norm is called twice. The look at the first batch is a part of measuring the output.
    assert counts[2] == counts[3] == 2 * (2 * 3)
    _, plain = pruned(made(blocks=4), batches(), include=["layers.0.*", "layers.1.*"], blocks=None)
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


class Failing(Model):
    """Something is computed from the second result of each block."""

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(x)
        for layer in self.layers:
            x, weights = layer(x)
            self.entropy = weights.log().mean()
        return self.head(x)


@pytest.mark.parametrize("kind", [Derived, Failing])
def test_blocks_compute_where_what_they_are_called_with_depends_on_it(kind):
    model = made(kind)
    session = Session(model, batches(), None, None, 0, False)
    with session.evaluating():
        (stack,), _ = find_stacks(session, [f"layers.{i}.q" for i in range(3)])
        assert stack.calls_without_computing(session, batches()[0]) is None
    assert "forward" not in vars(model.layers[0])


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(width, width) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return self.o(torch.softmax(self.q(x) @ x.mT, 2) @ self.v(x)), None


class PartsBlock(nn.Module):
    """An attention whose result is written to, and an mlp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        # What hooks do is done to repeated outputs too, and not twice.
        self.attention.register_forward_hook(lambda m, args, output: (2 * output[0], None))

    def forward(self, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        y = self.attention(x)[0]
        y += x
        return y + self.mlp(y)


class Parts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PartsBlock(12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, mask=torch.ones(1), scale=1.0)
        return self.head(x)


@pytest.mark.parametrize("inputs", ["pruned", "corrected"])
def test_a_part_of_a_block_is_computed_once_more_after_its_last_layer_was_pruned(
    inputs, monkeypatch
):
    calls: list[list[int]] = []
    for memory in (None, 10**9):  # with a limit, nothing is repeated
        model = made(Parts)
        report, found = pruned(model, batches(), inputs=inputs, memory=memory)
        assert report.settings["blocks"] == ["layers"]
        calls.append([layer.attention.calls for layer in model.layers])
        if memory is None:
            repeated = found
    assert all(torch.equal(value, found[name]) for name, value in repeated.items())
    _, whole = pruned(made(Parts), batches(), inputs=inputs, blocks=None)
    assert all(torch.equal(value, repeated[name]) for name, value in whole.items())
    # Of the passes for q, o, the first and the last layer of the mlp, and to the next block, the
    # last two need it no more, on each of three batches and in each network. After the last block
    # there is a check on the first batch. Corrected, there are two more looks at the first batch.
    saved = [b - a for a, b in zip(*calls, strict=True)]
    assert saved == ([6, 6, 4] if inputs == "pruned" else [6 + 8, 6 + 8, 4 + 6])


@pytest.mark.parametrize("room", [True, False])
def test_a_layer_that_others_wait_for_is_computed_once_more_if_the_disk_has_room(room, monkeypatch):
    calls: list[int] = []

    def watched(model: nn.Module) -> nn.Module:
        first = model.layers[0].mlp[0]

        def forward(x: Tensor, forward: Any = first.forward) -> Tensor:
            calls.append(1)
            return forward(x)

        first.forward = forward
        return model

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    _, expected = pruned(watched(made(Parts)), batches(), inputs="pruned", memory=10**9)
    every, calls[:] = len(calls), []
    monkeypatch.setattr(replay, "_REPEATED", 0)
    if not room:
        monkeypatch.setattr(shelf._OnDisk, "write", full)
    _, found = pruned(watched(made(Parts)), batches(), inputs="pruned")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    # It is computed and kept for the second layer of the mlp, and not again to the next block.
    assert every - len(calls) == (3 if room else 0)


def test_outputs_that_take_more_memory_than_hidden_states_are_not_repeated():
    finished, part = Finished(), nn.Linear(4, 8)
    forward, x = part.forward, torch.randn(3, 4)
    finished.add(part)
    for most, expected in ((3 * 8 * 4 - 1, []), (3 * 8 * 4, [5])):
        with finished.repeating(5, most, last=False):
            y = part(x)
        assert list(finished._outputs[part]) == expected
    with torch.no_grad():
        part.weight.zero_()
    with finished.repeating(5, 1, last=True):
        assert torch.equal(part(x), y)
    assert part.forward == forward
    assert not torch.equal(part(x), y)
