"""Networks of transformers with a few thousand random weights, made from the default configuration
of their type; and inputs that they take.

Sizes in the configuration and in those nested in it are recognised by their names and made small.
Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NotMadeError", "made", "types", "without_caches"]

LARGEST = 2_000_000  # parameters
VOCABULARY, HIDDEN, TOKENS, IMAGE = 160, 32, 16, 32
Batch = dict[str, Any]


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
            small = given if given < VOCABULARY - 40 else VOCABULARY - 1 - len(chosen) % 40
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
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "minicpm_ocr": {"image_token_id": 150, "insert_layer_id": 0},
    "minicpmv4_6": {"image_token_id": 150, "insert_layer_id": 0},
    "minicpmv4_7": {"image_token_id": 150, "insert_layer_id": 0},
    "ministral": {"head_dim": 8},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-2, -1, 0, 1, 2]},
    "voxtral_encoder": {"intermediate_size": 128},
}


# ---- inputs --------------------------------------------------------------------------------------


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configuration and those nested in it."""
    from transformers import PreTrainedConfig

    waiting: list[Any] = [model.config]
    while waiting:
        config = waiting.pop(0)
        yield config
        waiting += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]


def _first(model: nn.Module, names: str, default: Any) -> Any:
    """The first of these attributes that a configuration has."""
    for config in _configs(model):
        for name in names.split():
            if isinstance(value := getattr(config, name, None), (int, list, tuple)):
                return value
    return default


def _batches(model: nn.Module, size: int) -> Iterator[Batch]:
    """Batches that a model may take, by the arguments of its forward; the likeliest first."""
    takes = set(inspect.signature(model.forward).parameters)
    drawn = torch.Generator().manual_seed(size)

    def ids(length: int = TOKENS) -> Tensor:
        return torch.randint(5, 100, (size, length), generator=drawn)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=drawn)

    common: Batch = {}
    if "decoder_input_ids" in takes and ("input_ids" not in takes or _two_sides(model)):
        common["decoder_input_ids"] = ids(8)
    if "protein_input_ids" in takes:
        common["protein_input_ids"] = ids()
        common["protein_attention_mask"] = torch.ones(size, TOKENS, dtype=torch.long)
    if "bbox" in takes:
        common["bbox"] = torch.zeros(size, TOKENS, 4, dtype=torch.long)
    for media in _media(model, takes, size, noise):
        if "input_ids" in takes:
            yield {**_with_places(model, takes, media, ids()), **media, **common}
            yield {"input_ids": ids(), **media, **common}
        yield {**media, **common}
    if "input_ids" in takes:
        yield {"input_ids": ids(), **common}
    yield {"input_ids": ids(), "decoder_input_ids": ids(8)}


def _media(
    model: nn.Module, takes: set[str], size: int, noise: Callable[..., Tensor]
) -> Iterator[Batch]:
    """Images, videos, sounds or series that a model may take, with what must come beside them."""
    side = _first(model, "image_size img_size input_size", IMAGE)
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    channels = _first(model, "num_channels in_channels in_chans", 3)
    mels = _first(model, "num_mel_bins feature_size input_feat_per_channel n_mels", 16)
    images = [noise(channels, height, width), noise(channels, 64, 64), noise(channels, 128, 128)]
    videos = [noise(n, channels, height, width) for n in (_first(model, "num_frames", 8), 2, 16, 1)]
    waves = [noise(1600), noise(1, 1600), noise(4800), noise(32, mels), noise(128, mels)]
    spectra = [noise(32, mels), noise(mels, 32), noise(mels, 128), noise(1, 64, 16)]
    yield from _patches(model, takes, size, noise)
    for name, tensors in (
        ("pixel_values", [*images, *videos]),
        ("pixel_values_videos", videos),
        ("input_features", [noise(mels, 256), noise(mels, 200), *spectra, *waves]),
        ("input_values", [*waves, *spectra]),
        ("inputs", [noise(12, HIDDEN)]),
        ("past_values", [noise(64), noise(64, 7), noise(64, 1), noise(512)]),
    ):
        for x in tensors if name in takes else ():
            beside: Batch = {}
            if "image_sizes" in takes and name == "pixel_values":
                sizes = torch.tensor([[x.shape[-2], x.shape[-1]]] * size)
                yield {name: x, "image_sizes": sizes}
            for mask in {"input_features_mask", "feature_attention_mask"} & takes:
                if name == "input_features":
                    times = x.shape[-2] if x.shape[-1] == mels else x.shape[-1]
                    beside[mask] = torch.ones(size, times, dtype=torch.long)
            yield {name: x, **beside}
            if "pixel_attention_mask" in takes and x.ndim == 5:
                yield {name: x, "pixel_attention_mask": torch.ones(x.shape[:2], dtype=torch.bool)}


def _patches(
    model: nn.Module, takes: set[str], size: int, noise: Callable[..., Tensor]
) -> Iterator[Batch]:
    """Images as rows of patches, with their numbers of patches in time, height and width."""
    side = _first(model, "patch_size", 8)
    frames = _first(model, "temporal_patch_size", 1)
    channels = _first(model, "in_channels num_channels in_chans", 3)
    if "target_sizes" in takes:  # beside each other, in one row
        x = noise(64, channels, side, side).flatten(0, 1).permute(1, 2, 0, 3).flatten(2)
        yield {"pixel_values": x[None], "target_sizes": torch.tensor([[8, 8]] * size)}
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in takes), None)
    name = next((name for name in ("pixel_values", "hidden_states") if name in takes), None)
    if grid is None or name is None:
        return
    for numbers in dict.fromkeys((frames, 2, 1)):
        x = noise(64, channels * numbers * side * side).flatten(0, 1)
        for rows in (x, x.view(len(x), channels, *([numbers] * (numbers > 1)), side, side)):
            images = {name: rows, grid: torch.tensor([[1, 8, 8]] * size)}
            if "merge_sizes" in takes:
                images["merge_sizes"] = torch.tensor([2] * size)
            yield images


def _two_sides(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _with_places(model: nn.Module, takes: set[str], media: Batch, ids: Tensor) -> Batch:
    """Token ids with as many places for an image, a video or a sound as its features have rows."""
    kinds = {"pixel_values": "image", "pixel_values_videos": "video"}
    kind = next((kinds[name] for name in media if name in kinds), "audio")
    owners = (m for m in model.modules() if hasattr(m, f"get_{kind}_features"))
    features = getattr(next(owners, None), f"get_{kind}_features", None)
    token = _first(model, f"{kind}_token_id {kind}_token_index", None)
    if features is None or token is None:
        return {"input_ids": ids}
    try:
        with torch.no_grad():
            out = features(**media)
    except Exception:  # it takes more than this
        return {"input_ids": ids}
    out = getattr(out, "pooler_output", out)
    parts = [out] if isinstance(out, Tensor) else [p for p in out if isinstance(p, Tensor)]
    rows = sum(p.numel() // p.shape[-1] for p in parts) // len(ids)
    ids = torch.cat([ids[:, :4], torch.full((len(ids), rows), token), ids[:, 4:]], 1)
    kinds_ = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in takes else {}
    return {"input_ids": ids, **kinds_}


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
    configs = _configs(model) if hasattr(model, "config") else ()
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
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
    for number, (small, large) in enumerate(
        zip(_batches(model, 2), _batches(model, 4), strict=True)
    ):
        try:
            with torch.no_grad():
                model(**small)
                model(**large)
            return [large, small]
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            first = first or f"{number}: {sorted(small)}: {text}"
    raise NotMadeError(f"run: {first}")
