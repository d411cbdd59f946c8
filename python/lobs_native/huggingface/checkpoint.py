"""Checkpoint folders in Hugging Face format, for the command line: examining, loading, saving.

Nothing is downloaded, no code from a folder is run, and pickles are not opened.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import regular, safefile, strict_json
from lobs_native.files.atomic import writing
from lobs_native.huggingface import gguf
from lobs_native.huggingface.library import one_line, quiet, some_of, transformers_library
from lobs_native.huggingface.spelling import restore, spelled
from lobs_native.huggingface.verification import check_zeros, compare, digests
from lobs_native.layers import layers_for

__all__ = [
    "Checkpoint",
    "change_config",
    "copy_others",
    "differing",
    "examine",
    "first_output",
    "load",
    "output_layer",
    "save",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
OWN = ("masks.safetensors", "report.json", "report.html")  # files of an earlier run
# Suffixes of weight files. Those of the dense network must not accompany the pruned one.
_WEIGHT_FILES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel"),
}


@dataclass(frozen=True)
class Checkpoint:
    """The description of a folder, without its weights."""

    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]  # the weight files
    dtypes: dict[str, str]  # tensor name -> dtype in the notation of safetensors
    dtype: torch.dtype  # the dtype of most weights
    gguf: Path | None = None  # the file that holds everything


# ---- reading -------------------------------------------------------------------------------------


def examine(folder: Path) -> Checkpoint:
    """Read a folder's config and the headers of its weight files; or a GGUF file, which has all.

    Raises
    ------
    ArgumentError
        The folder is not such a checkpoint, or is of a kind that is refused: pickles, quantised
        weights, adapters. The message says what to do instead.
    CheckpointError
        A file is missing, truncated, or not what it claims to be.
    """
    if folder.is_file():
        gguf.check(folder)
        return Checkpoint(folder.parent, {}, (folder.name,), {}, torch.float32, folder)
    if not (folder / "config.json").is_file():
        raise ArgumentError(
            f"MODEL: {folder} has no config.json; name a folder with config.json and {WEIGHTS}, as "
            "save_pretrained writes it, or a function as module:function"
        )
    config = _json(folder / "config.json")
    if "quantization_config" in config:
        raise ArgumentError(
            f"MODEL: the weights in {folder} are quantised (config.json has a quantization_config);"
            " prune the floating-point checkpoint from which they were made"
        )
    if (folder / "adapter_config.json").is_file():
        raise ArgumentError(
            f"MODEL: {folder} holds an adapter (adapter_config.json); merge it into its base model "
            "and save the result first"
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
    if quantised := sorted(d for d in sizes if d.startswith("F8")):
        raise ArgumentError(
            f"MODEL: weights in {folder} are {', '.join(quantised)}, which is quantised; prune the "
            "floating-point checkpoint from which they were made"
        )
    floats = {d: n for d, n in sizes.items() if d in _FLOATS}
    if not floats:
        raise CheckpointError(f"MODEL: {folder} holds no floating-point weights")
    most = max(floats, key=lambda d: floats[d])
    return Checkpoint(folder, config, tuple(files), dtypes, _FLOATS[most])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"MODEL: {path} cannot be read as JSON: {error}") from error
    return _object(values, path)


def _index(path: Path) -> dict[str, Any]:
    """Like :func:`_json`, but within the limits of strict_json, which suffice for one entry per
    tensor."""
    try:
        data = regular.read_whole(path, str(path), most=strict_json.MOST_JSON, follow=True)
        values = strict_json.parse_json(data, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"MODEL: {error}; copy or save it again") from error
    return _object(values, path)


def _object(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CheckpointError(f"MODEL: {path} holds a {type(values).__name__}, not an object")
    return values


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
            f"MODEL: {folder} has its weights in {pickles[0]}, a pickled file, which could run any "
            "code when opened, and is refused; if you trust it, save it as safetensors first: "
            "AutoModel.from_pretrained(folder).save_pretrained(other)"
        )
    raise ArgumentError(f"MODEL: {folder} has no {WEIGHTS} and no {INDEX}")


def load(checkpoint: Checkpoint) -> nn.Module:
    """The network of a folder, on the CPU, in the dtype of most of its weights; in float32 if
    others are beyond its range.

    Its class is the first of ``architectures`` in config.json that transformers has, or else the
    class that ``AutoModel`` chooses.

    Raises
    ------
    LobsError
        transformers is missing or too old.
    ArgumentError
        The network has an encoder that reads no text.
    CheckpointError
        transformers cannot load it, or weights are missing, which would be random.
    """
    if checkpoint.gguf is not None:
        return gguf.load(checkpoint.gguf)
    transformers = transformers_library()
    kind: Any = transformers.AutoModel
    for name in checkpoint.config.get("architectures") or []:
        architecture = getattr(transformers, str(name), None)
        if isinstance(architecture, type) and issubclass(
            architecture, transformers.PreTrainedModel
        ):
            kind = architecture
            break
    model, info = _from_pretrained(transformers, kind, checkpoint.folder, checkpoint.dtype)
    mixed = len({d for d in checkpoint.dtypes.values() if d in _FLOATS}) > 1
    if mixed and checkpoint.dtype == torch.float16 and not _finite(model):
        model, info = _from_pretrained(transformers, kind, checkpoint.folder, torch.float32)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"MODEL: {checkpoint.folder} lacks {len(missing)} weights of {type(model).__name__}, "
            f"which would be random: {some_of(missing)}; correct 'architectures' in config.json, "
            "or complete the checkpoint"
        )
    reads = getattr(model, "main_input_name", "input_ids")
    if getattr(model.config, "is_encoder_decoder", False) and reads != "input_ids":
        raise ArgumentError(
            f"MODEL: {type(model).__name__} has an encoder that reads {reads}, which a text file "
            "alone cannot run; pass a function as module:function that returns the model and "
            "batches"
        )
    return model


def _finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _from_pretrained(
    transformers: Any, kind: Any, folder: Path, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with quiet(transformers):
            return kind.from_pretrained(  # type: ignore[no-any-return]
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # a foreign configuration may make it raise anything
        raise CheckpointError(
            f"MODEL: transformers cannot load {folder}: {one_line(error)}"
        ) from error


def output_layer(model: nn.Module) -> str | None:
    """The name of the layer that computes the logits, which by convention is not pruned; None if
    there is none of a prunable type."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    return names[head] if head in names and layers_for(names[head], head) else None


def first_output(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run the model and return the logits or hidden states."""
    return model(**batch)[0]


# ---- writing -------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    checkpoint: Checkpoint,
    folder: Path,
    masks: Mapping[str, Tensor],
    *,
    shard_bytes: int,
    memory: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the network into ``folder``, then give it up, read it back and compare.

    Parameters
    ----------
    model : nn.Module
        The pruned network, from :func:`load`. It has no weights afterwards.
    checkpoint : Checkpoint
        Its other files (config, tokenizer, texts) are copied unchanged, except hidden ones.
    folder : Path
        An existing, empty folder.
    masks : {layer name: bool tensor}
        Weights must be zero in the files where the mask is False.
    shard_bytes : int
        Larger weights are divided into several files with an index.
    memory : int, optional
        Bytes that writing may take: files are at most half as large.
    config : mapping, optional
        What is different in config.json, nested as it is there.

    Returns
    -------
    dict
        For the report: the files and tensors of the old folder that are not in the new one, and
        the tensors that were pruned in another dtype than they are stored in.

    Raises
    ------
    CheckpointError
        It could not be written, or the network read back differs from the one in memory.
    """
    transformers = transformers_library()
    if memory is not None:
        shard_bytes = min(shard_bytes, max(1, memory // 2))
    prefix = getattr(model, "base_model_prefix", "")
    with writing(folder), quiet(transformers):
        if checkpoint.gguf is None:
            left_out = copy_others(checkpoint, folder)
            staging = folder / ".weights"  # save_pretrained also writes another config
            model.save_pretrained(str(staging), max_shard_size=shard_bytes)  # type: ignore[operator]
            rounded = restore(staging, INDEX, checkpoint.folder, checkpoint.files, prefix)
            for path in [*staging.glob("model*.safetensors"), *staging.glob(INDEX)]:
                path.rename(folder / path.name)
            shutil.rmtree(staging)
            change_config(folder, config or {})
        else:
            left_out, rounded = [checkpoint.gguf.name], []
            model.save_pretrained(str(folder), max_shard_size=shard_bytes)  # type: ignore[operator]
            gguf.tokenizer(checkpoint.gguf).save_pretrained(str(folder))
    written = examine(folder)
    dtype = next(model.parameters()).dtype
    names = {name: spelled(name, written.dtypes, prefix) for name in model.state_dict()}
    stored = {name: _FLOATS.get(written.dtypes.get(n, "")) for name, n in names.items()}
    expected = digests(model, stored)
    model.to("meta")  # reading back takes as much memory once more
    read_back, _ = _from_pretrained(transformers, type(model), folder, dtype)
    compare(expected, digests(read_back, {}))
    check_zeros(read_back, masks)
    return {
        "files left out": left_out,
        "tensors left out": sorted(set(checkpoint.dtypes) - set(written.dtypes)),
        "tensors pruned in another dtype": rounded,
    }


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``new`` that are not those of ``old``, nested."""
    found: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if inside := differing(before, value):
                found[key] = inside
        elif key not in old or before != value:
            found[key] = value
    return found


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of the config.json in ``folder``, nested as they are there."""
    if changes:
        path = folder / "config.json"
        text = json.dumps(_updated(_json(path), changes), indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def _updated(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with the values of ``new``, nested."""
    changed = dict(old)
    for key, value in new.items():
        inside = changed.get(key)
        if isinstance(inside, Mapping) and isinstance(value, Mapping):
            value = _updated(inside, value)
        changed[key] = value
    return changed


def copy_others(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy the files that do not hold weights of the network. Returns the weight files left out."""
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
