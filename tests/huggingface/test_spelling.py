"""A pruned folder has the names and dtypes of the old one, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_folders
from safetensors.torch import load_file, save_file
from torch import Tensor

from lobs_native.errors import CheckpointError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.spelling import spelled

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # as in test_checkpoint

Tensors = dict[str, Tensor]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def all_of(folder: Path) -> Tensors:
    return {n: x for path in folder.glob("model*.safetensors") for n, x in load_file(path).items()}


def halved(folder: Path, weight: str, out: Path, shard_bytes: int = 10**9) -> dict[str, Any]:
    """Load a folder, halve one weight and zero a part of it, and save the network."""
    checkpoint = hf.examine(folder)
    model = hf.load(checkpoint)
    parameter = model.get_parameter(weight)
    with torch.no_grad():
        parameter.mul_(0.5)[0] = 0
    mask = torch.ones_like(parameter, dtype=torch.bool)
    mask[0] = False
    out.mkdir()
    name = weight.removesuffix(".weight")
    return hf.save(model, checkpoint, out, {name: mask}, shard_bytes=shard_bytes)


def in_single(*parts: str) -> Callable[[Tensors], Tensors]:
    """Tensors whose names have one of the parts become float32, with digits beyond 16 bits."""

    def change(old: Tensors) -> Tensors:
        return {
            n: x.float() + 1e-4 * torch.randn(x.shape) if any(p in n for p in parts) else x
            for n, x in old.items()
        }

    return change


def legacy(old: Tensors) -> Tensors:
    names = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
        for n in old
    }
    return {names[n]: x.float() if "Norm" in n else x for n, x in old.items()}


LLAMA, BERT = "model.layers.0.mlp.up_proj.weight", "encoder.layer.0.output.dense.weight"
# What the old folder holds: class, dtype of most tensors, changes to the others, weight to prune.
FOLDERS: dict[str, tuple[str, torch.dtype, Callable[[Tensors], Tensors], str]] = {
    "norms beside float16": ("LlamaForCausalLM", HALF, in_single("norm"), LLAMA),
    "norms beside bfloat16": ("LlamaForCausalLM", BRAIN, in_single("norm"), LLAMA),
    "the pruned weight itself": ("LlamaForCausalLM", BRAIN, in_single("up_proj"), LLAMA),
    "old names of norms": ("BertModel", HALF, legacy, BERT),
    "names with a prefix": (
        "BertModel", BRAIN, lambda old: {f"bert.{n}": x for n, x in legacy(old).items()}, BERT,
    ),
    "names without a prefix": (
        "BertForMaskedLM", SINGLE,
        lambda old: {n.removeprefix("bert."): x for n, x in old.items()}, f"bert.{BERT}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_names_dtypes_and_unpruned_bytes_are_those_of_the_old_folder(tmp_path, case):
    kind, dtype, change, weight = FOLDERS[case]
    source = hf_folders.save(tmp_path / "in", kind, dtype=dtype)
    old = change(all_of(source))
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    settings = halved(source, weight, tmp_path / "out")
    new = all_of(tmp_path / "out")
    assert {n: x.dtype for n, x in new.items()} == {n: x.dtype for n, x in old.items()}
    (pruned,) = [n for n in old if n.endswith(weight.removeprefix("bert."))]
    assert [n for n in old if not torch.equal(old[n], new[n])] == [pruned]
    assert torch.equal(new[pruned][1:], (old[pruned].to(dtype) * 0.5).to(old[pruned].dtype)[1:])
    other = [pruned] if case == "the pruned weight itself" else []
    assert settings["tensors pruned in another dtype"] == other
    assert settings["tensors left out"] == []


def test_values_beyond_the_range_of_most_tensors_are_computed_in_float32(tmp_path):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM", dtype=HALF)
    old = all_of(source)
    old["model.norm.weight"] = old["model.norm.weight"].float() * 1e5
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    assert next(hf.load(hf.examine(source)).parameters()).dtype == SINGLE
    settings = halved(source, LLAMA, tmp_path / "out")
    new = all_of(tmp_path / "out")
    assert {n: x.dtype for n, x in new.items()} == {n: x.dtype for n, x in old.items()}
    assert [n for n in old if not torch.equal(old[n], new[n])] == [LLAMA]
    assert settings["tensors pruned in another dtype"] == [LLAMA]


def test_a_pruned_value_beyond_the_range_of_its_file_is_an_error(tmp_path):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    old = all_of(source)
    old[LLAMA] = old[LLAMA].half()
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = hf.examine(source)
    model = hf.load(checkpoint)
    with torch.no_grad():
        model.get_parameter(LLAMA)[0, 0] = 1e6
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=rf"{LLAMA} has values beyond the range of float16"):
        hf.save(model, checkpoint, tmp_path / "out", {}, shard_bytes=10**9)


def test_shards_and_their_index_have_the_old_names_and_the_new_sizes(tmp_path):
    source = hf_folders.save(tmp_path / "in", "BertModel", dtype=BRAIN)
    old = legacy(all_of(source))
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    halved(source, BERT, tmp_path / "out", shard_bytes=20_000)
    index = hf._json(tmp_path / "out" / hf.INDEX)
    assert set(index["weight_map"]) == set(old)
    assert index["metadata"]["total_size"] == sum(x.numel() * x.itemsize for x in old.values())
    for file in set(index["weight_map"].values()):
        inside = load_file(tmp_path / "out" / file)
        assert set(inside) == {n for n, f in index["weight_map"].items() if f == file}
        assert all(x.dtype == old[n].dtype for n, x in inside.items())


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (["a.weight", "bert.a.weight"], "a.weight"),
        (["bert.a.weight"], "bert.a.weight"),
        (["a.gamma"], "a.gamma"),
        (["bert.a.gamma", "a.bias"], "bert.a.gamma"),
        (["b.weight", "a.bias"], "a.weight"),
    ],
)
def test_a_name_of_the_class_is_looked_up_in_the_spellings_of_files(known, found):
    assert spelled("a.weight", known, "bert") == found
