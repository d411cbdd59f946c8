"""Folders that are pruned without memory for the whole network: the tensors of the usual way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_folders
from safetensors.torch import load_file

from lobs_native.cli import commands as cli
from lobs_native.cli import job
from lobs_native.errors import CheckpointError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface import rewriting
from lobs_native.huggingface.spelling import places_of, same_bits

pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "lobs-native[hf]"'
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(hf_folders.text())
    return path


def prune(source: Path, text: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The tensors that the command writes."""
    arguments = ["--sparsity", "0.5", "--length", "32", "--out", str(out), *more]
    assert cli.main(["prune", str(source), "--calibration", str(text), *arguments]) == cli.OK
    return {k: v for path in out.glob("model*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("LlamaForCausalLM", {"shard": "20KB"}),
        ("LlamaForCausalLM", {"dtype": torch.bfloat16, "tie_word_embeddings": True}),
        ("BertModel", {}),
        ("GPT2LMHeadModel", {}),
        ("MixtralForCausalLM", {}),  # its class joins tensors of the folder
    ],
    ids=str,
)
def test_the_tensors_are_those_of_the_usual_way(kind, how, tmp_path, text, monkeypatch):
    source = hf_folders.save(tmp_path / "in", kind, **how)
    usual = prune(source, text, tmp_path / "usual")
    rewritten: list[Any] = []
    rewrite = job.rewrite
    monkeypatch.setattr(job, "rewrite", lambda *given: rewritten.append(given) or rewrite(*given))
    folder = tmp_path / "off"
    offloaded = prune(source, text, tmp_path / "out", "--offload", str(folder), "--masks")
    assert len(rewritten) == (not kind.startswith("Mixtral"))
    assert usual.keys() <= offloaded.keys()
    assert all(same_bits(usual[name], offloaded[name]) for name in usual)
    assert not list(folder.iterdir())
    if rewritten:
        names = sorted(p.name for p in source.iterdir())
        more = {"masks.safetensors", "report.html", "report.json"}
        assert sorted({p.name for p in (tmp_path / "out").iterdir()} - more) == names
    hf.load(hf.examine(tmp_path / "out"))
    settings = json.loads((tmp_path / "out/report.json").read_text())["settings"]
    assert settings["plan"]["offloaded"] > 0
    assert settings["plan"]["network"] < 1.01 * sum(x.nbytes for x in usual.values())


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    checkpoint = hf.examine(source)
    model = hf.load(checkpoint)
    places = places_of(model, source, checkpoint.files)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(rewriting, "memory_of", lambda x: bytes(x.nbytes))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight differs from what was written"):
        rewriting.rewrite(model, checkpoint, tmp_path / "out", {}, places, {}, list)


def test_weights_that_were_removed_must_be_zero(tmp_path):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    checkpoint = hf.examine(source)
    model = hf.load(checkpoint)
    places = places_of(model, source, checkpoint.files)
    name = "model.layers.0.mlp.up_proj"
    mask = torch.zeros(48, 32, dtype=torch.bool)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="would be written with 1536 weights"):
        rewriting.rewrite(model, checkpoint, tmp_path / "out", {name: mask}, places, {}, list)


def test_the_command_plans_with_it(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    arguments = ["--calibration", str(text), "--sparsity", "0.5", "--length", "32"]
    planning = ["--plan", "--offload", str(tmp_path / "off")]
    assert cli.main(["prune", str(source), *arguments, *planning]) == cli.OK
    assert "of the model at a time" in capsys.readouterr().out
