"""Inputs that networks of transformers take: text, images, videos, sounds, series, by the arguments
of their forward and the sizes in their configurations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HIDDEN", "IMAGE", "TOKENS", "Batch", "batches", "configs"]

HIDDEN, TOKENS, IMAGE = 32, 16, 32
Batch = dict[str, Any]


def configs(model: nn.Module) -> Iterator[Any]:
    """The configuration and those nested in it."""
    from transformers import PreTrainedConfig

    waiting: list[Any] = [model.config]
    while waiting:
        config = waiting.pop(0)
        yield config
        waiting += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]


def _first(model: nn.Module, names: str, default: Any) -> Any:
    """The first of these attributes that a configuration has."""
    for config in configs(model):
        for name in names.split():
            if isinstance(value := getattr(config, name, None), (int, list, tuple)):
                return value
    return default


def batches(model: nn.Module, size: int) -> Iterator[Batch]:
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
            if beside:
                yield {name: x}
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
    if "spatial_shapes" in takes:  # in rows that may be padded
        yield {
            "pixel_values": noise(16, channels * side * side),
            "spatial_shapes": torch.tensor([[4, 4]] * size),
            "pixel_attention_mask": torch.ones(size, 16, dtype=torch.long),
        }
    if "flattened_patches" in takes:  # behind the number of its row and column
        x = noise(16, 2 + _first(model, "patch_embed_hidden_size", channels * side * side))
        x[..., 0], x[..., 1] = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
        flat = {"flattened_patches": x}
        if "image_embeds_position_mask" in takes:
            places = torch.arange(TOKENS) < _first(model, "latent_query_num", 8)
            flat["image_embeds_position_mask"] = places.long().expand(size, TOKENS).contiguous()
        yield flat
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
