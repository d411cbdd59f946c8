"""The bytes are those of the safetensors library, and reading returns what was written."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lobs_native.errors import ArgumentError, CheckpointError, DtypeError
from lobs_native.files import atomic as files
from lobs_native.files import fs, safefile, strict_json

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(sorted(safefile.TYPES.values(), key=str)))
        bits = torch.randint(0, 2, shape)
        found[name] = (
            bits.to(torch.float32).to(dtype) if dtype.is_floating_point else bits.to(dtype)
        )
    return found


def written(values: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    for piece in safefile.pieces(values):
        file.write(piece)
    return file.getvalue()


def raw(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_the_bytes_are_those_of_the_library(values):
    data = written(values)
    assert data == save(values)
    assert len(data) == safefile.size(values)
    again = safefile.tensors_of(raw(data), "file")
    assert set(again) == set(values)
    for name, value in values.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value)
        assert torch.equal(load(data)[name], value)


def test_tensors_need_not_be_contiguous():
    whole = torch.arange(24.0).reshape(4, 6)
    values = {"t": whole.T, "s": whole[1:3, ::2], "p": torch.nn.Parameter(whole), "n": whole[0, 0]}
    again = safefile.tensors_of(raw(written(values)), "file")
    for name, value in values.items():
        assert torch.equal(again[name], value), name
        assert not again[name].requires_grad


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"a": torch.ones(2, dtype=torch.complex64)},
            DtypeError,
            "tensors\\['a'\\]: dtype is comp",
        ),
        ({"a": [1.0]}, DtypeError, r"tensors\['a'\]: expected a torch\.Tensor, got list"),
        ({"a": torch.ones(2, device="meta")}, DtypeError, "meta device"),
        ({3: torch.ones(2)}, ArgumentError, "tensors: 3 cannot be the name"),
        ({"__metadata__": torch.ones(2)}, ArgumentError, "'__metadata__' cannot be the name"),
        ({"\ud800": torch.ones(2)}, ArgumentError, "cannot be the name"),
        ({"n" * 100_000: torch.ones(2)}, ArgumentError, "names are too long"),
    ],
)
def test_a_tensor_that_cannot_be_written_is_refused_by_name(values, error, message):
    with pytest.raises(error, match=message):
        written(values)


def test_a_header_is_read_without_the_tensors(tmp_path):
    values = {"weight": torch.ones(3, 4), "mask": torch.ones(5, dtype=torch.bool)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(values, metadata={"format": "pt", "more": "text"}))
    os.truncate(path, path.stat().st_size)
    found = safefile.read_header(path)
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
        "weight": ("F32", (3, 4)),
        "mask": ("BOOL", (5,)),
    }
    assert [(e.begin, e.end) for e in found.values()] == [(0, 48), (48, 53)]


def test_a_header_is_read_through_a_link_as_in_caches(tmp_path):
    (tmp_path / "blob").write_bytes(save({"a": torch.ones(2)}))
    (tmp_path / "a.safetensors").symlink_to("blob")
    assert list(safefile.read_header(tmp_path / "a.safetensors")) == ["a"]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63) + 1, 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=("Cs",))),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner),
        max_leaves=20,
    )
)
def test_sealed_json_is_read_back(value):
    sealed = strict_json.seal({"value": value, "more": 1})
    again, check = strict_json.unseal(sealed, "file")
    assert json.dumps(again) == json.dumps({"value": value, "more": 1})
    assert sealed.endswith(b',"check":"' + check.encode() + b'"}')


@pytest.mark.parametrize("indent", [None, 1])
def test_a_seal_detects_every_flipped_bit_and_every_cut(indent):
    sealed = strict_json.seal({"format": 1, "name": "layer \N{SNOWMAN}"}, indent=indent)
    assert json.loads(sealed)["name"] == "layer \N{SNOWMAN}"
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match=r"^file: "):
            strict_json.unseal(bytes(changed), "file")
    for length in range(len(sealed)):
        with pytest.raises(CheckpointError, match=r"^file: "):
            strict_json.unseal(sealed[:length], "file")


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        [float("inf")],
        {"a": 2**63},
        {1: 2, "1": 3},
        {"a": object},
        {("a",): 1},
        "\udc80",
        [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
    ],
    ids=repr,
)
def test_values_that_could_not_be_read_back_are_refused(value):
    with pytest.raises(ArgumentError, match=r"^info: "):
        strict_json.plain(value, "info")


def test_plain_values_are_those_read_back():
    assert strict_json.plain({"a": (1, 2), "b": None}, "info") == {"a": [1, 2], "b": None}


def test_writing_copies_nothing(tmp_path):
    values = {str(i): torch.ones(1 << 20) for i in range(4)}
    folder = fs.open_folder(tmp_path)
    tracemalloc.start()
    files.put(folder, "a.safetensors", safefile.pieces(values))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    fs.close(folder)
    assert peak < 1 << 20
    assert Path(tmp_path / "a.safetensors").stat().st_size == safefile.size(values)
