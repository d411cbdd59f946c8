"""Folders with tiny random networks of transformers, and a tokenizer made here. Nothing is
downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = len(WORDS) + len(SPECIAL)


def text(lines: int = 40, words: int = 24) -> str:
    """Running text of known words, with a heading and a short line that should be left out."""
    chosen = random.Random(0)
    running = [" ".join(chosen.choices(WORDS, k=words + i % 3)) for i in range(lines)]
    return "\n".join(["= Heading " + "w1 " * words, "w1 w2", "", *running]) + "\n"


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words, with [CLS] and [SEP] around a line."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def network(kind: str, **changed: Any) -> Any:
    """A random network with two layers of width 32."""
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    usual = {
        **size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        **changed,
    }
    if kind.startswith("Bert"):
        config: Any = transformers.BertConfig(**usual)
    elif kind.startswith("Llama"):
        config = transformers.LlamaConfig(num_key_value_heads=2, **usual)
    elif kind.startswith("Mixtral"):
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(num_key_value_heads=2, **experts, **usual)
    else:
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = transformers.GPT2Config(**{**size, **small, **changed})
    return getattr(transformers, kind)(config).eval()


def save(
    folder: Path,
    kind: str = "BertModel",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **changed: Any,
) -> Path:
    """A folder with a network and its tokenizer."""
    network(kind, **changed).to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder
