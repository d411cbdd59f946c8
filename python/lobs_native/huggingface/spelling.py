"""Weight files whose tensors have the names and dtypes that they had in the folder they come from.

A network runs in one dtype, and its class may call a tensor by another name than the files do.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lobs_native.errors import CheckpointError
from lobs_native.files import safefile
from lobs_native.files.shelf import Place

__all__ = ["places_of", "restore", "same_bits", "spelled"]

# What transformers reads under another name: (in old files, in the class).
_RENAMED = (
    (".gamma", ".weight"),
    (".beta", ".bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)


def spelled(name: str, known: Collection[str], prefix: str) -> str:
    """The name among ``known`` of the tensor that the class calls ``name``; itself if there is
    none. ``prefix`` is the name of the class's base model, which names may have or lack."""
    stems = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
    for stem in stems:
        if stem in known:
            return stem
        for old, new in _RENAMED:
            if stem.endswith(new) and (older := stem.removesuffix(new) + old) in known:
                return older
    return name


def places_of(model: nn.Module, folder: Path, files: Collection[str]) -> dict[str, Place]:
    """Parameter name -> where in ``files`` of ``folder`` a tensor of its shape and dtype is that
    may be the same; others are left out."""
    known = {
        name: (path, entry, begin)
        for path in (folder / file for file in files)
        for name, (entry, begin) in safefile.places(path).items()
    }
    prefix, found = getattr(model, "base_model_prefix", ""), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (spelling := spelled(name, known, prefix)) in known:
            path, entry, begin = known[spelling]
            if (entry.shape, safefile.TYPES.get(entry.dtype)) == (parameter.shape, parameter.dtype):
                found[name] = Place(path, begin)
    return found


@dataclass(frozen=True)
class _Stored:
    """A tensor as it goes into a file, and whether that took a rounding from another dtype."""

    value: Tensor
    rounded: bool = False


def restore(
    written: Path, index: str, folder: Path, files: Collection[str], prefix: str
) -> list[str]:
    """Give the tensors in the weight files of ``written`` the names and dtypes that they have in
    ``files`` of ``folder``. Those whose value has not changed get the old bytes.

    Returns
    -------
    list of str
        The tensors that have changed, in another dtype than that of their file.

    Raises
    ------
    CheckpointError
        A value is beyond the range of the dtype of its file.
    """
    paths = sorted(written.glob("*.safetensors"))
    headers = {path: safefile.read_header(path) for path in paths}
    with contextlib.ExitStack() as scope:
        old: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for name in files:
            file = scope.enter_context(safe_open(folder / name, "pt"))
            old.update(dict.fromkeys(file.keys(), file))
        new = {name for header in headers.values() for name in header}
        names = {n: s if (s := spelled(n, old, prefix)) not in new else n for n in new}
        rounded: list[str] = []
        for path, header in headers.items():
            with safe_open(path, "pt") as file:
                tensors = {names[name]: file.get_tensor(name) for name in header}
            stored = {n: _stored(n, value, old) for n, value in tensors.items()}
            rounded += [n for n, x in stored.items() if x.rounded]
            renamed = any(names[name] != name for name in header)
            if renamed or any(x.value is not tensors[n] for n, x in stored.items()):
                _replace(path, {n: x.value for n, x in stored.items()})
    if (written / index).is_file():
        _rewrite_index(written / index, names, paths)
    return sorted(rounded)


def _stored(name: str, value: Tensor, old: Mapping[str, Any]) -> _Stored:
    if name not in old:
        return _Stored(value)
    before: Tensor = old[name].get_tensor(name)
    if before.dtype == value.dtype:
        return _Stored(value)
    if same_bits(before.to(value.dtype), value):
        return _Stored(before)
    kept = value.to(before.dtype)
    if not bool(torch.isfinite(kept).all()):
        raise CheckpointError(
            f"MODEL: {name} has values beyond the range of {str(before.dtype)[6:]}, in which its "
            "file has it; convert the folder to a wider dtype first"
        )
    return _Stored(kept, rounded=True)


def _replace(path: Path, tensors: Mapping[str, Tensor]) -> None:
    fresh = path.with_suffix(".new")
    save_file({n: x.contiguous() for n, x in tensors.items()}, fresh, metadata={"format": "pt"})
    fresh.replace(path)


def _rewrite_index(path: Path, names: Mapping[str, str], paths: Collection[Path]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {names[n]: file for n, file in index["weight_map"].items()}
    entries = [entry for p in paths for entry in safefile.read_header(p).values()]
    index["metadata"]["total_size"] = sum(entry.end - entry.begin for entry in entries)
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape, dtype and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)
