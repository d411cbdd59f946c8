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
    "bert": ("BertModel", "BertConfig", SMALL),
    "bit": (  # standardized convolutions
        "BitModel",
        "BitConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4},
    ),
    "bloom": ("BloomModel", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_head": 4}),
    "clip": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {**SMALL, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
    ),
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
    "deberta": ("DebertaV2Model", "DebertaV2Config", {**SMALL, "relative_attention": True}),
    "deepseek": (
        "DeepseekV3Model",
        "DeepseekV3Config",
        {
            **SMALL,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "falcon": ("FalconModel", "FalconConfig", {**SMALL}),  # a Linear of its own
    "gpt_oss": ("GptOssModel", "GptOssConfig", {**MIXTURE, "head_dim": 8}),
    "gpt2": (
        "GPT2Model",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "ibert": ("IBertModel", "IBertConfig", SMALL),  # own parameters in F.linear
    "jetmoe": (  # experts as slices of a parameter
        "JetMoeModel",
        "JetMoeConfig",
        {**TWO_HEADS, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama": ("LlamaModel", "LlamaConfig", TWO_HEADS),
    "llama4": (  # a router that is a Linear
        "Llama4TextModel",
        "Llama4TextConfig",
        {**MIXTURE, "intermediate_size_mlp": 64, "head_dim": 8},
    ),
    "longformer": ("LongformerModel", "LongformerConfig", {**SMALL, "attention_window": 4}),
    "mamba": ("MambaModel", "MambaConfig", {**SMALL, "state_size": 4}),
    "mixtral": ("MixtralModel", "MixtralConfig", MIXTURE),
    "mobilebert": (  # an empty weight
        "MobileBertModel",
        "MobileBertConfig",
        {**SMALL, "intermediate_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16},
    ),
    "perceiver": (  # learned inputs
        "PerceiverModel",
        "PerceiverConfig",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "rwkv": ("RwkvModel", "RwkvConfig", {**SMALL, "attention_hidden_size": 32}),
    "switch": (
        "SwitchTransformersEncoderModel",
        "SwitchTransformersConfig",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4},
    ),
    "swinv2": (
        "Swinv2Model",
        "Swinv2Config",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
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
        if model.startswith(("Beit", "Bit", "ResNet", "Swin")):
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=drawn)}
        if model.startswith("Wav2Vec2"):
            return {"input_values": torch.randn(2, 800, generator=drawn)}
        if model.startswith("Perceiver"):
            return {"inputs": torch.randn(2, 12, 32, generator=drawn)}
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
