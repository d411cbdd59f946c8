"""Networks of transformers with a few thousand random weights, made from the default configuration
of their type, with two batches of inputs.

Sizes in the configuration and in those nested in it are recognised by their names and made small.
Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from quality.small_inputs import IMAGE, Batch, batches, configs

__all__ = ["NotMadeError", "made", "types", "without_caches"]

LARGEST = 2_000_000  # parameters
VOCABULARY = 160


class NotMadeError(Exception):
    """No small network of a type could be made and run; the message says why."""


# The first rule whose pattern is found in a field's name gives its size; a function gets the old
# value. Longer names come first.
_RULES: list[tuple[str, int | Callable[[int], int]]] = [
    (r"vocab_size|vocabulary_size|num_tokens$|num_embeddings$|^entity_vocab", VOCABULARY),
    (r"max_\w*position|n_positions|n_ctx|max_seq|block_size|max_source|max_target", 64),
    (r"num_(key_value|kv)_heads|n_kv_heads|num_key_value|kv_n_heads|multi_query_group", 2),
    (r"head_dim|d_kv|kv_channels|key_length|head_size|qk_\w*dim|v_head|head_width", 8),
    (r"rotary_dim", 4),
    (r"num_groups|norm_groups|groupnorm", lambda n: min(n, 4)),
    (r"_heads|n_head|num_head", 4),
    (r"(layers|depth|num_blocks|n_layer|num_hidden_groups|n_blocks)$", lambda n: min(n, 2)),
    (r"layers_per|_layers_in|num_stages|num_levels", lambda n: n),
    (r"experts_per|top_?k|moe_k$|n_group|topk_group", lambda n: min(n, 2)),
    (r"num_experts|n_\w*experts|num_local_experts|expert_num|moe_num", lambda n: min(n, 4)),
    (r"lora_rank", 8),
    (r"image_size|input_size|img_size", IMAGE),
    (r"temporal_patch|tubelet", lambda n: n),
    (r"patch_size|patch_stride", lambda n: 4 if n <= 4 else 8),
    (r"intermediate|ffn|d_ff|dff|d_inner|mlp_dim|inner_dim|feedforward|expand_dim", 48),
    (
        r"hidden_(size|dim)|d_model|n_embd|embed_dim|embedding_(size|dim)|^dim$|model_dim|emb_dim",
        32,
    ),
    (r"(output|proj\w*|projection|latent\w*|text|vision|encoder|decoder|out)_?(dim|size)$", 32),
    (r"num_mel|mel_bins|feature_size|input_feat", 16),
    (r"num_queries|query_tokens|num_latents|num_query", lambda n: min(n, 8)),
]
_KEPT = re.compile(
    r"dropout|num_labels|_id$|_index$|num_channels|kernel|stride|padding|group_size$"
)
_HIDDEN_LIST = re.compile(r"hidden_sizes|embed_dims?$|dims$|channels|widths|d_model|conv_dim|_dim$")


def types() -> list[str]:
    """The types of transformers that have a model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(set(CONFIG_MAPPING_NAMES) & {name for _, name in _mapped()})


def _mapped() -> Iterator[tuple[dict[str, Any], str]]:
    """(mapping, type) of the mappings from types to classes, the plain models first."""
    from transformers.models.auto import modeling_auto

    first = "MODEL_MAPPING_NAMES"
    names = [n for n in vars(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", n)]
    for mapping in sorted(names, key=lambda n: (n != first, n)):
        table = getattr(modeling_auto, mapping)
        for name in table:
            yield table, name


def _small(name: str, value: Any) -> Any:
    """A field's value, or a smaller one of the same kind."""
    if _KEPT.search(name):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    if isinstance(value, int):
        for pattern, size in _RULES:
            if re.search(pattern, name):
                return size(value) if callable(size) else size
        return value
    if not value or not all(type(x) is int for x in value):
        return value
    if re.search(r"depth|layers|blocks|repeats", name):
        return type(value)(min(x, 1) for x in value)
    if re.search(r"deepstack\w*(index|layer)", name):
        return type(value)([0, 1])
    if re.search(r"heads", name):
        return type(value)(min(x, 2) for x in value)
    if re.search(r"image_size|img_size", name):
        return type(value)(IMAGE for _ in value)
    if _HIDDEN_LIST.search(name) and max(value) >= 32:
        return type(value)(max(8, 16 * round(16 * x / max(value) / 8)) for x in value)
    return value


def _shrunk(config_class: Any) -> Any:
    """A small configuration of this class."""
    from transformers import PreTrainedConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default: Any = config_class()
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = _value(default, field.name)
        if isinstance(value, PreTrainedConfig):
            chosen[field.name] = _shrunk(type(value))
            continue
        if field.name in common and field.name not in ("pad_token_id", "bos_token_id"):
            continue
        given = value if field.default in (dataclasses.MISSING, None) else field.default
        if field.default is None and not isinstance(given, int):
            continue  # derived from the others
        small = _small(field.name, given)
        if field.name.endswith(("token_id", "token_index")) and isinstance(given, int):
            drawn = 5 <= given < 100  # by the inputs, as text
            free = given < VOCABULARY - 40 and not drawn
            small = given if free else VOCABULARY - 1 - len(chosen) % 40
        if small != given or small != value:
            chosen[field.name] = small
    if _value(default, "num_key_value_heads") == _value(default, "num_attention_heads"):
        chosen.pop("num_key_value_heads", None)  # not grouped
        if isinstance(_value(default, "num_key_value_heads"), int):
            chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
    return config_class(**(chosen | _in_sections(default) | CHANGES.get(default.model_type, {})))


def _value(config: Any, name: str) -> Any:
    """An attribute, or None; and None where layers differ in it."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _in_sections(config: Any) -> Batch:
    """The fields of heads whose rotations are divided among time, height and width."""
    rotary = _value(config, "rope_parameters")
    if not isinstance(rotary, dict) or not rotary.get("mrope_section"):
        return {}
    each = max(1, round(8 * rotary.get("partial_rotary_factor", 1)) // 3)  # of heads of 16
    sections = [round(8 * rotary.get("partial_rotary_factor", 1)) - 2 * each, each, each]
    heads: Batch = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if isinstance(_value(config, "head_dim"), int):
        heads["head_dim"] = 16
    return {**heads, "rope_parameters": {**rotary, "mrope_section": sections}}


def _model(name: str) -> nn.Module:
    """A small network of a type with random weights."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _shrunk(CONFIG_MAPPING[name])
    classes = next(table[key] for table, key in _mapped() if key == name)
    kind = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in kind(config).parameters())
        except Exception:  # some cannot be made without values
            size = 0
    if size > LARGEST:
        raise ValueError(f"it would have {size:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    return model


# Heads of 16 whose rotations are divided among time, height and width.
_SECTIONS: Batch = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}
_HALF = {**_SECTIONS["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}

# What the rules cannot know, by the type of a configuration.
CHANGES: dict[str, Batch] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_moe_text": {**_SECTIONS, "head_dim": 16, "rope_parameters": _HALF},
    "glm4v_text": {**_SECTIONS, "rope_parameters": _HALF},
    "glm_image_text": {**_SECTIONS, "rope_parameters": _HALF},
    "glm_ocr_text": {**_SECTIONS, "head_dim": 16, "rope_parameters": _HALF},
    "glmasr_encoder": {"intermediate_size": 128},
    "granite_docling_vision": {"deepstack_visual_indexes": [0, 1]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kosmos-2.5": {"latent_query_num": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "minicpm_ocr": {"image_token_id": 150, "insert_layer_id": 0},
    "minicpmv4_6": {"image_token_id": 150, "insert_layer_id": 0},
    "minicpmv4_7": {"image_token_id": 150, "insert_layer_id": 0},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "ministral": {"head_dim": 8},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-2, -1, 0, 1, 2]},
    "voxtral": {"audio_token_id": 150},
    "voxtral_encoder": {"intermediate_size": 128},
}


def made(name: str) -> tuple[nn.Module, list[Batch]]:
    """A small network of a type in eval mode, and two batches for it. Raises NotMadeError."""
    try:
        model = _model(name)
    except Exception as error:  # whatever a configuration makes a class raise
        raise NotMadeError(
            f"made: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    with without_caches(model):  # as it will be while the network is pruned
        return model, _taken(model)


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Turn off caches of keys and values, if the model has a configuration for them."""
    nested = configs(model) if hasattr(model, "config") else ()
    caching = [config for config in nested if getattr(config, "use_cache", None) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _taken(model: nn.Module) -> list[Batch]:
    """Two batches that a model takes. Raises NotMadeError."""
    first = ""
    for number, (small, large) in enumerate(zip(batches(model, 2), batches(model, 4), strict=True)):
        try:
            with torch.no_grad():
                model(**small)
                model(**large)
            return [large, small]
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            first = first or f"{number}: {sorted(small)}: {text}"
    raise NotMadeError(f"run: {first}")
