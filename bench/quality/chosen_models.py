"""Networks of transformers that multiply their weights in different ways, chosen by hand.

Each has a few thousand random weights. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TWO_HEADS = {**SMALL, "num_key_value_heads": 2}
MIXTURE = {**TWO_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}

# name -> (model class, config class, arguments of the config)
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "beit": ("BeitModel", "BeitConfig", IMAGE),  # qkv as a function with another bias
    "dbrx": (  # experts in one matrix, in blocks
        "DbrxModel",
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "vocab_size": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "ibert": ("IBertModel", "IBertConfig", SMALL),  # own parameters in F.linear
    "jetmoe": (  # experts as slices of a parameter
        "JetMoeModel",
        "JetMoeConfig",
        {**TWO_HEADS, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (  # a router that is a Linear
        "Llama4TextModel",
        "Llama4TextConfig",
        {**MIXTURE, "intermediate_size_mlp": 64, "head_dim": 8},
    ),
    "wav2vec2": (  # weight normalization along the last dimension
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            **SMALL,
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "xlnet": (  # weights that are rearranged in memory
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
}


def network(name: str) -> nn.Module:
    """A network of this kind with random weights."""
    import transformers

    model, config, arguments = KINDS[name]
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    return made.eval()


def batches(name: str) -> list[dict[str, Tensor]]:
    """Two batches that fit a network of this kind."""
    model = KINDS[name][0]
    drawn = torch.Generator().manual_seed(1)

    def batch() -> dict[str, Tensor]:
        if model.startswith("Beit"):
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=drawn)}
        if model.startswith("Wav2Vec2"):
            return {"input_values": torch.randn(2, 800, generator=drawn)}
        return {"input_ids": torch.randint(3, 60, (4, 16), generator=drawn)}

    return [batch() for _ in range(2)]


def report_on(name: str) -> lobs.Report:
    """The report of pruning a network of this kind."""
    first: Callable[[nn.Module, Any], Any] = lambda model, batch: model(**batch)[0]  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lobs_native")
        return lobs.prune(
            network(name),
            batches(name),
            sparsity=0.5,
            method="magnitude",
            inputs="pruned",
            forward=first,
            progress=False,
        )
