"""Folders in the style of Hugging Face: read, calibrated on a text, and written again. For the
command line.

Nothing is downloaded, no code from a folder is run, and pickles are not opened.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.files import safefile
from lobs_native.files.atomic import writing
from lobs_native.layers import layers_for, layers_of

__all__ = [
    "Checkpoint",
    "check_zeros",
    "examine",
    "first_output",
    "load",
    "output_layer",
    "same_bits",
    "save",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLDEST = (4, 56)  # of transformers, see pyproject.toml
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
OWN = ("masks.safetensors", "report.json", "report.html")  # of an earlier run
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Endings of files with weights: those of the dense network, which must not go with the pruned one.
_WEIGHT_FILES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says it holds, without its weights being read."""

    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]  # with the weights
    dtypes: dict[str, str]  # tensor name -> dtype as safetensors writes it
    dtype: torch.dtype  # of most of the weights


# ---- reading -------------------------------------------------------------------------------------


def examine(folder: Path) -> Checkpoint:
    """Look at a folder's config and at the headers of its weight files.

    Raises
    ------
    ArgumentError
        The folder is no such checkpoint, or one of a kind that is refused: pickles, quantised
        weights, adapters. The message says what to do.
    CheckpointError
        A file is missing, cut, or not what it claims to be.
    """
    if not (folder / "config.json").is_file():
        raise ArgumentError(
            f"MODEL: {folder} has no config.json; name a folder with config.json and {WEIGHTS} "
            "(as save_pretrained writes it), or a function as module:function"
        )
    config = _json(folder / "config.json")
    if "quantization_config" in config:
        raise ArgumentError(
            f"MODEL: the weights in {folder} are quantised (config.json has a quantization_config);"
            " prune the floating-point checkpoint they were made from"
        )
    if (folder / "adapter_config.json").is_file():
        raise ArgumentError(
            f"MODEL: {folder} holds an adapter (adapter_config.json); merge it into its model "
            "first and save that"
        )
    dtypes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    files = _weight_files(folder)
    for name in files:
        try:
            entries = safefile.read_header(folder / name)
        except CheckpointError as error:
            raise CheckpointError(f"MODEL: {error}; copy or save it again") from error
        for key, entry in entries.items():
            dtypes[key] = entry.dtype
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    if strange := sorted(d for d in sizes if d.startswith("F8")):
        raise ArgumentError(
            f"MODEL: weights in {folder} are {', '.join(strange)}, which is quantised; prune the "
            "floating-point checkpoint they were made from"
        )
    floats = {d: n for d, n in sizes.items() if d in _FLOATS}
    if not floats:
        raise CheckpointError(f"MODEL: {folder} holds no floating-point weights")
    most = max(floats, key=lambda d: floats[d])
    return Checkpoint(folder, config, tuple(files), dtypes, _FLOATS[most])


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"MODEL: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"MODEL: {path} holds a {type(found).__name__}, not an object")
    return found


def _index(path: Path) -> dict[str, Any]:
    """As :func:`_json`, bounded: an index names one file per tensor and nothing else."""
    try:
        data = safefile.read_whole(path, str(path), most=safefile.MOST_JSON, follow=True)
        found = safefile.parse_json(data, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"MODEL: {error}; copy or save it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"MODEL: {path} holds a {type(found).__name__}, not an object")
    return found


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        listed = _index(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"MODEL: {folder / INDEX} has no weight_map")
        names = sorted({str(name) for name in listed.values()})
        for name in names:
            if not safefile.NAME.fullmatch(name) or not (folder / name).is_file():
                raise CheckpointError(
                    f"MODEL: {folder / INDEX} lists {name!r}, which is not in the folder; copy the "
                    "whole checkpoint"
                )
        return names
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ArgumentError(
            f"MODEL: {folder} has its weights in {pickles[0]}, one of the pickles, which can "
            "run any code when they are opened and are refused; where you trust it, save it as "
            "safetensors first: AutoModel.from_pretrained(folder).save_pretrained(other)"
        )
    raise ArgumentError(f"MODEL: {folder} has no {WEIGHTS} and no {INDEX}")


def load(checkpoint: Checkpoint) -> nn.Module:
    """The network of a folder, on the CPU, in the dtype in which most of it is stored.

    Its class is the first of ``architectures`` in config.json that transformers has, else what
    ``AutoModel`` makes of it.

    Raises
    ------
    LobsError
        transformers is missing or too old.
    ArgumentError
        An encoder-decoder, which a text alone does not run.
    CheckpointError
        transformers cannot load it, or the files lack weights, which would be random.
    """
    transformers = _transformers()
    kind: Any = transformers.AutoModel
    for name in checkpoint.config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            kind = found
            break
    model, info = _from_pretrained(transformers, kind, checkpoint.folder, checkpoint.dtype)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"MODEL: {checkpoint.folder} lacks {len(missing)} weights of {type(model).__name__}, "
            f"which would be random: {_some(missing)}; correct 'architectures' in config.json, or "
            "complete the checkpoint"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArgumentError(
            f"MODEL: {type(model).__name__} has an encoder and a decoder, which a text file alone "
            "does not run; give a function as module:function that returns the model and batches"
        )
    # A cache would grow with every batch for nothing; config.json is copied as it was.
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise LobsError(
            'a Hugging Face folder needs transformers: pip install "lobs-native[hf]"'
        ) from error
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise LobsError(
            f"transformers {transformers.__version__} is too old: pip install "
            f'"transformers>={OLDEST[0]}.{OLDEST[1]}"'
        )
    return transformers


def _from_pretrained(
    transformers: Any, kind: Any, folder: Path, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with _quiet(transformers):
            return kind.from_pretrained(  # type: ignore[no-any-return]
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a configuration of someone else's makes it raise
        raise CheckpointError(
            f"MODEL: transformers cannot load {folder}: {_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters is checked here."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def output_layer(model: nn.Module) -> str | None:
    """The name of the layer that makes logits, if it is of a prunable type: by convention it is
    left alone."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    return names[head] if head in names and layers_for(names[head], head) else None


def first_output(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run the model and give the logits or hidden states."""
    return model(**batch)[0]


# ---- writing -------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    checkpoint: Checkpoint,
    folder: Path,
    masks: Mapping[str, Tensor],
    *,
    shard_bytes: int,
) -> dict[str, Any]:
    """Write the network into ``folder``, read it again and compare.

    Parameters
    ----------
    model : nn.Module
        From :func:`load`, pruned.
    checkpoint : Checkpoint
        Everything in its folder that holds no weights (config, tokenizer, texts) is copied as it
        is; hidden files are not.
    folder : Path
        It exists and is empty.
    masks : {layer name: bool tensor}
        Where they are False, weights must be zero in the files.
    shard_bytes : int
        Weights that are larger are written into several files with an index.

    Returns
    -------
    dict
        What of the old folder is not in the new one, for the report.

    Raises
    ------
    CheckpointError
        It could not be written, or what is read again differs from the network in memory.
    """
    transformers = _transformers()
    with writing(folder), _quiet(transformers):
        left_out = _copy_others(checkpoint, folder)
        staging = folder / ".weights"  # save_pretrained writes a config too, in its own words
        model.save_pretrained(str(staging), max_shard_size=shard_bytes)  # type: ignore[operator]
        for path in [*staging.glob("model*.safetensors"), *staging.glob(INDEX)]:
            path.rename(folder / path.name)
        shutil.rmtree(staging)
    written = examine(folder)
    again, _ = _from_pretrained(transformers, type(model), folder, checkpoint.dtype)
    _compare(model, again, masks)
    return {
        "files left out": left_out,
        "tensors left out": sorted(set(checkpoint.dtypes) - set(written.dtypes)),
        "tensors converted": sorted(
            name for name, d in written.dtypes.items() if checkpoint.dtypes.get(name, d) != d
        ),
    }


def _copy_others(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy what holds no weights of the network itself; the names of the weights left out."""
    replaced = {*checkpoint.files, INDEX, *OWN}
    left_out = []
    for path in sorted(checkpoint.folder.rglob("*")):
        name = path.relative_to(checkpoint.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or str(name) in replaced:
            continue
        later_stage = len(name.parts) > 1 and path.suffix == ".safetensors"
        if path.suffix in _WEIGHT_FILES and not later_stage:
            left_out.append(str(name))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return left_out


def _compare(model: nn.Module, again: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse files that do not give the same network, bit by bit, with zeros where masks say so."""
    mine, theirs = model.state_dict(), again.state_dict()
    if list(mine) != list(theirs):
        strange = sorted(set(mine) ^ set(theirs)) or ["another order"]
        raise CheckpointError(f"MODEL: read again, the written weights differ: {_some(strange)}")
    for name, value in mine.items():
        if not same_bits(value.detach().cpu(), theirs[name].detach()):
            raise CheckpointError(f"MODEL: {name} is not what was written when it is read again")
    check_zeros(again, masks)


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse a network that is not zero where its masks say so."""
    layers = {layer.name: layer for layer in layers_of(model)}
    for name, mask in masks.items():
        weight = layers[name].stored(layers[name].weight_part)
        alive = int((weight[~mask.to(weight.device)] != 0).sum())
        if alive:
            raise CheckpointError(
                f"MODEL: layer {name!r} would be written with {alive} weights that were removed"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape, dtype and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)
