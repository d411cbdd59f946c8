"""Folders of networks with an encoder and a decoder, whose decoder reads the same lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_folders

from lobs_native.cli import commands as cli
from lobs_native.errors import ArgumentError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.text import text_batches

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")

SIZE = {"vocab_size": hf_folders.VOCABULARY, "d_model": 16, "pad_token_id": 0, "eos_token_id": 3}


def t5(start: int | None = 0) -> Any:
    config = transformers.T5Config(
        **SIZE, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=start
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(
        **SIZE, **layers, **heads, **widths, bos_token_id=2, decoder_start_token_id=3
    )
    return transformers.BartForConditionalGeneration(config)


def saved(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    hf_folders.save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(hf_folders.text())
    return folder


@pytest.mark.parametrize("made", [t5, bart])
def test_both_parts_are_pruned_and_the_stock_class_loads_them(tmp_path, made):
    source, out = saved(made(), tmp_path / "in"), tmp_path / "out"
    line = ["prune", str(source), "--calibration", str(tmp_path / "text.txt"), "--length", "16"]
    assert cli.main([*line, "--sparsity", "0.5", "--method", "sweep", "--out", str(out)]) == cli.OK
    report = json.loads((out / "report.json").read_text())
    assert "which the decoder reads as well" in report["settings"]["text as"]
    assert report["coverage"]["not_understood"] == 0
    names = [layer["name"] for layer in report["layers"]]
    for part in ("encoder.", "decoder."):
        assert any(part in name for name in names)
    assert all(layer["rows"] == report["settings"]["tokens"] for layer in report["layers"])
    again = type(made()).from_pretrained(out)
    for name in names:
        weight = again.get_submodule(name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_the_decoder_begins_with_its_token_and_reads_the_line(tmp_path):
    source = saved(t5(start=1), tmp_path / "in")
    checkpoint = hf.examine(source)
    text = text_batches(checkpoint, hf.load(checkpoint), tmp_path / "text.txt", length=12)
    for batch in text.batches:
        ids, read = batch["input_ids"], batch["decoder_input_ids"]
        assert torch.equal(read[:, 1:], ids[:, :-1])
        assert bool((read[:, 0] == 1).all())


def test_a_decoder_without_a_token_to_begin_with_is_refused(tmp_path):
    source = saved(t5(start=None), tmp_path / "in")
    checkpoint = hf.examine(source)
    with pytest.raises(ArgumentError, match="no decoder_start_token_id"):
        text_batches(checkpoint, hf.load(checkpoint), tmp_path / "text.txt", length=12)
