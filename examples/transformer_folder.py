"""Prune a transformer that lies in a folder, as the command line does, and look at the new folder.

    pip install ".[hf]"
    python examples/transformer_folder.py

Takes some seconds, without the network: the folder is made here, with a tiny random network and a
tokenizer of 60 words. With a real model, only the command at the end is needed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lobs_native.cli import main

transformers.utils.logging.disable_progress_bar()
WORDS = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(60))]


def make_folder(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


with tempfile.TemporaryDirectory() as scratch:
    model, text, pruned = (Path(scratch) / name for name in ("model", "text.txt", "pruned"))
    make_folder(model)
    chosen = random.Random(0)
    text.write_text("\n".join(" ".join(chosen.choices(WORDS[2:], k=30)) for _ in range(200)))

    # lobs-native prune model --calibration text.txt --out pruned --sparsity 0.5 ...
    how = ["--sparsity", "0.5", "--masks", "--no-progress"]
    code = main(["prune", str(model), "--calibration", str(text), "--out", str(pruned), *how])
    print(f"\nexit code {code}; the new folder holds:")
    for file in sorted(pruned.iterdir()):
        print(f"  {file.name:24} {file.stat().st_size:9,} bytes")
    again = transformers.AutoModel.from_pretrained(pruned)  # an ordinary checkpoint
    masks = load_file(pruned / "masks.safetensors")
    zeros = sum(int((again.get_submodule(n).weight == 0).sum()) for n in masks)
    print(f"{zeros:,} of {sum(m.numel() for m in masks.values()):,} weights of its layers are zero")
