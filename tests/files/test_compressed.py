"""Compressed files: every bit comes back, and damage is told."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lobs_native as lobs
from lobs_native.errors import ArgumentError, CheckpointError, DtypeError
from lobs_native.files import safefile


def pruned(sparsity: float, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=generator) * 0.02
    return x.masked_fill_(torch.rand(shape, generator=generator) < sparsity, 0).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def tensors() -> dict[str, Tensor]:
    odd = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 1.0])
    found = {
        "a": pruned(0.5, torch.float32, 7, 5),
        "a.bits": pruned(0.9, torch.bfloat16, 4, 3, 3),
        "layout": odd,
        "transposed": pruned(0.5, torch.float16, 6, 9).T,
        "all zeros": torch.zeros(3, 3),
        "no entries": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "trained": torch.nn.Parameter(torch.ones(2, 2)),
    }
    for name, dtype in safefile.TYPES.items():
        found[name] = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 1, 0]]).to(dtype)
    return found


def test_every_bit_comes_back(tmp_path):
    path, given = tmp_path / "small.safetensors", tensors()
    assert lobs.save_compressed(given, path) == path.stat().st_size
    found = lobs.load_compressed(path)
    assert list(found) == list(given)
    for name, value in given.items():
        assert same_bits(found[name], value.detach()), name
    lobs.save_compressed({}, path)
    assert lobs.load_compressed(path) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_file_is_smaller_than_deflate_makes_it(tmp_path, dtype, sparsity):
    value = pruned(sparsity, dtype, 200, 300)
    size = lobs.save_compressed({"w": value}, tmp_path / "small.safetensors")
    raw = value.view(torch.uint8).numpy().tobytes()
    assert size < 0.9 * len(zlib.compress(raw, 9))
    entropy = -sum(p * math.log2(p) for p in (sparsity, 1 - sparsity)) / 8
    least = value.numel() * entropy + int((value != 0).sum())  # of values, sign and mantissa
    assert size > least  # else something is missing


def test_the_loader_of_the_guide_reads_it(tmp_path):
    path, given = tmp_path / "small.safetensors", tensors()
    lobs.save_compressed(given, path)
    guide = Path(__file__).resolve().parents[2] / "docs/guide/saving.md"
    text = guide.read_text(encoding="utf-8")
    code = next(b for b in text.split("```python\n")[1:] if "def load(" in b).split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)  # the documentation's own words
    found = names["load"](path)
    assert all(same_bits(found[name], value.detach()) for name, value in given.items())


def test_arguments_that_are_wrong_write_nothing(tmp_path):
    path = tmp_path / "small.safetensors"
    one = torch.ones(2)
    for wrong, error, message in (
        ([one], DtypeError, "tensors: expected"),
        ({3: one}, DtypeError, "a key is a int"),
        ({"w": [1.0]}, DtypeError, r"tensors\['w'\]"),
        ({"w": one.to(torch.complex64)}, DtypeError, r"tensors\['w'\]"),
        ({"w": one.to_sparse()}, DtypeError, r"tensors\['w'\]"),
        ({"\ud800": one}, ArgumentError, "tensors"),
    ):
        with pytest.raises(error, match=message):
            lobs.save_compressed(wrong, path)
    assert not path.exists()
    with pytest.raises(CheckpointError, match="could not be written"):
        lobs.save_compressed({"w": one}, tmp_path)


def stream(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(zlib.compress(data), np.uint8).copy())


def layout(values: object) -> Tensor:
    return stream(json.dumps(values).encode())


DAMAGE = {  # of the file of w = [[0, 1, 0], [0, 0, 2]]
    "no layout": (lambda t: t.pop("layout"), "has no tensor 'layout'"),
    "layout not a stream": (lambda t: t.update(layout=torch.ones(9, dtype=torch.uint8)), "damaged"),
    "layout of floats": (lambda t: t.update(layout=torch.ones(9)), "not uint8"),
    "layout not JSON": (lambda t: t.update(layout=stream(b"{")), "layout"),
    "layout a list": (lambda t: t.update(layout=layout([])), "not an object"),
    "a bomb": (lambda t: t.update(layout=stream(bytes(17 << 20))), "does not end"),
    "a tensor more": (lambda t: t.update({"v.bits": t["w.bits"].clone()}), "'v.bits' is only in"),
    "a tensor less": (lambda t: t.pop("w.values"), "'w.values' is only in"),
    "no shape": (lambda t: t.update(layout=layout({"w": ["float32"]})), "no dtype and shape"),
    "dtype": (lambda t: t.update(layout=layout({"w": ["float31", [2, 3]]})), "unknown dtype"),
    "shape": (lambda t: t.update(layout=layout({"w": ["float32", [2, -3]]})), "impossible shape"),
    "huge": (lambda t: t.update(layout=layout({"w": ["float32", [1 << 61, 9]]})), "impossible"),
    "another shape": (lambda t: t.update(layout=layout({"w": ["float32", [3, 3]]})), "bits"),
    "another dtype": (lambda t: t.update(layout=layout({"w": ["float16", [2, 3]]})), "values"),
    "bits beyond": (lambda t: t.update({"w.bits": stream(b"\xe2")}), "beyond its 6 entries"),
    "a bit more": (lambda t: t.update({"w.bits": stream(b"\x23")}), "values"),
    "stream cut": (lambda t: t.update({"w.values": t["w.values"][:-1]}), "damaged"),
    "stream longer": (
        lambda t: t.update({"w.values": torch.cat([t["w.values"], t["w.values"]])}),
        "damaged",
    ),
    "a byte": (lambda t: t["w.values"][6].bitwise_xor_(4), "damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told(tmp_path, damage, message):
    path = tmp_path / "small.safetensors"
    lobs.save_compressed({"w": torch.tensor([[0.0, 1, 0], [0, 0, 2]])}, path)
    stored = {name: value.clone() for name, value in load_file(path).items()}
    damage(stored)
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        lobs.load_compressed(path)
    assert "small.safetensors" in str(caught.value)


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    with pytest.raises(CheckpointError, match="small"):
        lobs.load_compressed(path)
    lobs.save_compressed({"w": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    for wrong in (b"", content[:-1], content[:20], b"\xff" * 99):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"not a complete|claims"):
            lobs.load_compressed(path)
    layout_of_bool = {"w": ["bool", [2]]}
    parts = {"w.bits": stream(b"\x03"), "w.values": stream(b"\x01\x02")}
    save_file({**parts, "layout": layout(layout_of_bool)}, path)
    with pytest.raises(CheckpointError, match="neither true nor false"):
        lobs.load_compressed(path)
