"""Memory that shows parts of files."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import mapped, safefile
from lobs_native.files.mapped import Mapped, Scratch, check_system, is_shown
from lobs_native.files.shelf import Place

VALUES = torch.arange(5000, dtype=torch.float32)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where the values lie in a file, beyond its first page and not at the beginning of one."""
    (tmp_path / "file").write_bytes(bytes(5000) + VALUES.numpy().tobytes() + bytes(10))
    return Place(tmp_path / "file", 5000)


def test_it_shows_what_is_in_the_file_and_writes_nothing_there(place):
    before = place.path.read_bytes()
    shown = Mapped(place, VALUES.shape, VALUES.dtype)
    assert torch.equal(shown.tensor, VALUES)
    shown.tensor[7] = -1
    assert float(shown.tensor[7]) == -1
    shown.drop()
    assert torch.equal(shown.tensor, VALUES), "what was written is gone"
    assert place.path.read_bytes() == before


def test_the_address_stays_whatever_is_shown(place, tmp_path):
    shown, scratch = Mapped(place, VALUES.shape, VALUES.dtype), Scratch(tmp_path)
    view, address = shown.tensor[2:], shown.tensor.data_ptr()
    for factor in (2, 3):
        slot = scratch.room(shown.offset, 4 * len(VALUES))
        scratch.write(slot, factor * VALUES)
        shown.show(slot)
        assert torch.equal(view, factor * VALUES[2:])
    shown.show(place)
    assert torch.equal(view, VALUES[2:])
    assert shown.tensor.data_ptr() == address
    assert address % 64 == place.begin % 64


def test_a_file_without_a_name_is_gone_with_its_scratch(tmp_path):
    scratch = Scratch(tmp_path)
    slot = scratch.room(0, 8)
    scratch.write(slot, torch.ones(2))
    assert os.stat(slot.path).st_size == 8
    assert not list(tmp_path.iterdir())
    del scratch
    assert not slot.path.exists()


def test_a_file_that_is_changed_meanwhile_is_refused(place):
    shown = Mapped(place, VALUES.shape, VALUES.dtype)
    shown.show(place)
    with place.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        shown.show(place)


def test_memory_is_given_back_with_the_last_tensor(place):
    def areas() -> int:
        return Path("/proc/self/maps").read_text().count(str(place.path))

    part = Mapped(place, VALUES.shape, VALUES.dtype).tensor[:3]
    gc.collect()
    assert areas() == 1
    assert part.tolist() == [0, 1, 2]
    del part
    gc.collect()
    assert areas() == 0


def test_what_a_file_shows_is_known_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.rand(3000), "b": torch.rand(3000)}, path)
    places = {name: Place(path, begin) for name, (_, begin) in safefile.places(path).items()}
    with safe_open(path, "pt") as file:
        loaded = {name: file.get_tensor(name) for name in places}
    found = {name: (value, places[name]) for name, value in loaded.items()}
    found["copy"] = (loaded["a"].clone(), places["a"])
    found["elsewhere"] = (loaded["a"], places["b"])
    assert is_shown(found) == {"a", "b"}
    loaded["b"][0] = 5
    assert "b" not in is_shown(found)


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(mapped.sys, "platform", "win32")
    with pytest.raises(ArgumentError, match="offload: it needs Linux, and this is win32"):
        check_system("offload")


def test_room_begins_where_it_is_asked_to(tmp_path):
    scratch = Scratch(tmp_path)
    slots = [scratch.room(offset, 100) for offset in (0, 40, 4000)]
    assert [slot.begin % mmap.PAGESIZE for slot in slots] == [0, 40, 4000]
    assert all(b.begin >= a.begin + 100 for a, b in itertools.pairwise(slots))
