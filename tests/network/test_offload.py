"""Weights that lie in files: the bits of weights in memory, and memory for one block at a time."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.on_ranks import seen
from helpers.stacks import Model, batches, made
from torch import nn

import lobs_native as lobs
from lobs_native.calibration.offload import Offload
from lobs_native.errors import ArgumentError, CheckpointError, NonFiniteError
from lobs_native.files import fs
from lobs_native.files.mapped import Scratch

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "dense": {"inputs": "dense", "method": "sweep"},
    "pruned": {"inputs": "pruned", "pattern": "2:4", "sparsity": None},
    "search": {"scope": "model", "search": 2, "held_back": 0.3},
    "whole": {"blocks": None},
    "tokens": {"token_weights": "output"},
    "limited": {"memory": 20_000_000},
}


def network(**options: Any) -> Model:
    return made(width=40, blocks=2, **options)


def pruned(**options: Any) -> tuple[nn.Module, lobs.Report]:
    model = network()
    return model, lobs.prune(model, batches(6), progress=False, **{"sparsity": 0.5, **options})


def held(parameter: nn.Parameter) -> int:
    """Kilobytes of a mapped parameter that are in memory."""
    text = Path("/proc/self/smaps").read_text()
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        begin, end = (int(x, 16) for x in area.split(" ")[0].split("-"))
        if begin <= parameter.data_ptr() < end:
            return int(re.search(r"^Rss: +(\d+) kB", area, re.M)[1])
    raise AssertionError("it is not mapped")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_are_those_of_weights_in_memory(name, tmp_path):
    usual, offloaded = pruned(**OPTIONS[name]), pruned(**OPTIONS[name], offload=tmp_path / "off")
    assert seen(*offloaded) == seen(*usual)
    assert not list((tmp_path / "off").iterdir()), "files have no names"


@pytest.mark.parametrize("kind", ["tied", "embedded", "convolutions"])
def test_kinds_of_networks(kind, tmp_path):
    def make() -> tuple[nn.Module, list[torch.Tensor]]:
        torch.manual_seed(0)
        data = [torch.randn(9, 40) for _ in range(3)]
        if kind == "tied":
            shared = nn.Linear(40, 40)
            return nn.Sequential(shared, nn.ReLU(), shared), data
        if kind == "embedded":
            layers = nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 40)
            model = nn.Sequential(nn.Embedding(50, 40), *layers)
            return model, [torch.randint(50, (4, 5)) for _ in range(3)]
        parts = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3)
        return nn.Sequential(*parts), [torch.randn(2, 3, 8, 8) for _ in range(3)]

    found = []
    for offload in (None, tmp_path):
        model, data = make()
        report = lobs.prune(model, data, sparsity=0.5, progress=False, offload=offload)
        found.append(seen(model, report))
    assert found[0] == found[1]


def test_a_part_is_in_memory_only_while_it_is_used(tmp_path):
    model = made(width=200, blocks=3)
    before = [p.detach().clone() for p in model.parameters()]
    offload = Offload(model, tmp_path, {})
    weights = [block.up.weight for block in model.layers]
    with torch.no_grad():
        x = torch.randn(2, 7, 200)
        for i, block in enumerate(model.layers):
            block(x)
            assert [held(w) > 100 for w in weights] == [k == i for k in range(3)]
    offload.close()
    assert not any(map(held, weights))
    assert all(map(torch.equal, before, model.parameters()))
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    block = sum(p.numel() * p.element_size() for p in model.layers[0].parameters())
    assert 0.9 * block < offload.largest <= block
    assert offload.rest < 0.05 * every


def test_originals_come_back_without_copies(tmp_path):
    model = network()
    p = model.layers[0].up.weight
    offload, old, address = Offload(model, tmp_path, {}), p.detach().clone(), p.data_ptr()
    with torch.no_grad():
        p.mul_(2)
    offload.keep([p])
    offload.show_originals([p])
    assert torch.equal(p, old)
    offload.show_present([p])
    assert torch.equal(p, 2 * old)
    offload.forget([p])
    offload.show_present([p])
    assert torch.equal(p, old)
    assert p.data_ptr() == address


def test_an_error_gives_all_weights_their_old_values_back(tmp_path):
    model, data = network(), batches(3)
    before = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise ValueError("in the middle")
        return model(batch)

    options = {"blocks": None, "forward": forward, "progress": False}
    with pytest.raises(ValueError, match="in the middle"):
        lobs.prune(model, data, sparsity=0.5, offload=tmp_path, **options)
    assert calls == 12
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(NonFiniteError):
        lobs.prune(model, [x * torch.nan for x in data], sparsity=0.5, offload=tmp_path)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_full_disk_gives_all_weights_their_old_values_back(tmp_path, monkeypatch):
    model, write, written = network(), fs.write, 0
    before = [p.detach().clone() for p in model.parameters()]

    def full(handle: int, data: Any) -> None:
        nonlocal written
        written += 1
        if written == 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle, data)

    monkeypatch.setattr(fs, "write", full)
    with pytest.raises(CheckpointError, match=r"offload: .*: .*No space left"):
        lobs.prune(model, batches(3), sparsity=0.5, offload=tmp_path, progress=False)
    assert all(map(torch.equal, before, model.parameters()))


def test_it_resumes_what_began_without_it(tmp_path):
    usual, _ = pruned()
    model, calls = network(), 0

    def stopping(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise ValueError("in the middle")

    options = {"sparsity": 0.5, "progress": False, "run_dir": tmp_path / "run"}
    hook = model.layers[1].register_forward_pre_hook(stopping)
    with pytest.raises(ValueError, match="in the middle"):
        lobs.prune(model, batches(6), **options)
    hook.remove()
    report = lobs.prune(model, batches(6), offload=tmp_path / "off", **options)
    assert 0 < report.settings["resumed layers"] < len(report.layers)
    assert seen(model, None) == seen(usual, None)


def test_the_plan_says_what_is_in_memory_at_a_time(tmp_path):
    usual = lobs.plan_prune(network(), batches(3), sparsity=0.5)
    offloaded = lobs.plan_prune(network(), batches(3), sparsity=0.5, offload=tmp_path)
    assert usual.offloaded == 0
    assert usual.network == sum(4 * p.numel() for p in network().parameters())
    assert offloaded.network < 0.6 * usual.network
    assert offloaded.kept + offloaded.masks < usual.kept + usual.masks
    assert offloaded.disk >= offloaded.offloaded > 0
    assert "of the model at a time" in str(offloaded)
    assert "besides the model, the data" in str(usual)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tune": "blocks"}, "offload: tune='blocks' needs the weights in memory"),
        ({"device": "cuda"}, "offload: it keeps weights in files that the CPU reads"),
        ({"offload": ""}, "offload: '' is not the path of a folder"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, match, tmp_path):
    with pytest.raises(ArgumentError, match=re.escape(match)):
        lobs.prune(network(), batches(3), sparsity=0.5, **{"offload": tmp_path, **options})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"offload: .*file"):
        lobs.prune(network(), batches(3), sparsity=0.5, offload=tmp_path / "file")
    with pytest.raises(OSError, match="No such file"):
        Scratch(tmp_path / "nowhere")
