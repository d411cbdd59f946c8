"""GGUF files: read as dense weights, pruned, and written as an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import hf_folders

from lobs_native.cli import commands as cli

transformers = pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "lobs-native[hf]"'
)
gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


def gguf_file(path: Path) -> Path:
    """A network of two blocks with weights of 8 bits, and a tokenizer of whole words."""
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    space, digits = "\u0120", [str(i) for i in range(10)]
    numbers = [str(i) for i in range(48)]
    words = [space, "w", *digits, f"{space}w", *(f"{space}w{n}" for n in numbers)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *words])
    writer.add_token_types([3, 3, 3, *[1] * len(words)])
    writer.add_token_merges([f"{space} w", *(f"{space}w{n[:-1]} {n[-1]}" for n in numbers)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)

    def add(name: str, *shape: int) -> None:
        data = torch.randn(shape).numpy() / 6
        if len(shape) == 1:
            writer.add_tensor(name, abs(data) + 1)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    add("token_embd.weight", 64, 32)
    add("output_norm.weight", 32)
    add("output.weight", 64, 32)
    for i in range(2):
        for name, shape in {
            "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
            "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
            "attn_norm": (32,), "ffn_norm": (32,),
        }.items():  # fmt: skip
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(hf_folders.text())
    return path


def test_a_gguf_file_becomes_a_folder_without_a_mark_of_quantization(tmp_path, text):
    file, out = gguf_file(tmp_path / "model.gguf"), tmp_path / "out"
    command = ["prune", str(file), "--calibration", str(text), "--length", "16", "--lines", "10"]
    assert cli.main([*command, "--sparsity", "0.5", "--out", str(out)]) == cli.OK
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    report = json.loads((out / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert report["settings"]["files left out"] == ["model.gguf"]
    for name, weight in dense.named_parameters():
        now = model.get_parameter(name)
        if name.removesuffix(".weight") in {x["name"] for x in report["layers"]}:
            assert int((now == 0).sum()) == weight.numel() // 2
        else:
            assert torch.equal(now, weight)
    tokens = transformers.AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]
    assert tokens == transformers.AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=file.name
    )("w1 w2")["input_ids"]  # fmt: skip
    again = tmp_path / "again"  # the new folder is one like any other
    command[1] = str(out)
    assert cli.main([*command, "--sparsity", "0.6", "--out", str(again)]) == cli.OK


def test_what_is_no_gguf_file_is_refused(tmp_path, text, capsys):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUX" + bytes(100))
    command = ["prune", str(file), "--calibration", str(text), "--sparsity", "0.5", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == cli.FAILED
    assert "is not a GGUF file" in capsys.readouterr().err
    file.write_bytes(b"GGUF" + bytes(100))
    assert cli.main([*command, str(tmp_path / "out")]) == cli.FAILED
    assert "transformers cannot load" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
