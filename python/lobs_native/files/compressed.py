"""Tensors with many zeros in small files: which entries are there, one bit each, and these entries,
both deflated.

A file of safetensors with two uint8 tensors for each tensor, "NAME.bits" (the bits of the flattened
tensor, the first in the lowest bit) and "NAME.values" (the bytes of the entries that have a bit:
all first bytes, then all second ones, and so on, because the bytes that hold the exponents are
alike), and a tensor "layout", JSON {NAME: [dtype, shape]}. All are zlib streams (RFC 1950), whose
checksums reveal damage. An entry without a bit has only zero bits: a negative zero is kept.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError, DtypeError
from lobs_native.files import safefile
from lobs_native.files.atomic import write_file
from lobs_native.files.regular import read_whole
from lobs_native.files.strict_json import LARGEST_INTEGER, MOST_JSON, parse_json, shown

__all__ = ["load_compressed", "save_compressed"]

_LAYOUT = "layout"
_LEVEL = 6  # of zlib: 9 takes several times as long for less than 1 %
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in safefile.TYPES.values()}
_WHOLE = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}  # entries as integers


def save_compressed(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> int:
    """Write tensors with many zeros into a small file, from which every bit comes back.

    Parameters
    ----------
    tensors : {name: tensor}
        As ``model.state_dict()``; of any shape and of the dtypes of weight files, on any device;
        not modified. Tensors that share memory are each written whole. Negative zeros, which
        ``weight * mask`` leaves, count as kept values.
    path : path
        Replaced atomically. It is a file of safetensors, but its tensors are compressed: read it
        with :func:`load_compressed`.

    Returns
    -------
    int
        The size of the file in bytes.

    Raises
    ------
    DtypeError, ArgumentError
        ``tensors`` is not a mapping of names to such tensors; nothing has been written.
    CheckpointError
        The file could not be written.
    """
    if not isinstance(tensors, Mapping):
        raise DtypeError(f"tensors: expected {{name: tensor}}, got {type(tensors).__name__}")
    checked: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise DtypeError(f"tensors: a key is a {type(name).__name__}, expected a name")
        checked[name] = checks.tensor(value, f"tensors[{name!r}]", dtypes=safefile.TYPES.values())
    packed: dict[str, Tensor] = {}
    layout: dict[str, tuple[str, list[int]]] = {}
    for name, value in checked.items():
        entries = value.cpu().contiguous().reshape(-1)
        layout[name] = (str(entries.dtype).removeprefix("torch."), list(value.shape))
        whole = entries.view(torch.uint8).numpy().view(_WHOLE[entries.itemsize])
        there = whole != 0
        packed[f"{name}.bits"] = _deflated(np.packbits(there, bitorder="little"))
        kept = whole[there].view(np.uint8).reshape(-1, entries.itemsize)
        packed[f"{name}.values"] = _deflated(np.ascontiguousarray(kept.T))
    text = json.dumps(layout, ensure_ascii=False, separators=(",", ":"))
    packed[_LAYOUT] = _deflated(np.frombuffer(_encoded(text), np.uint8))
    content = b"".join(safefile.pieces(packed))
    write_file(path, content)
    return len(content)


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file of :func:`save_compressed`, on the CPU, bit for bit as they were.

    Raises
    ------
    CheckpointError
        The file cannot be read, is damaged, or is not such a file.
    """
    label = os.fspath(path)
    raw = read_whole(Path(path), label, most=LARGEST_INTEGER, follow=True)
    stored = safefile.tensors_of(torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8)), label)
    if _LAYOUT not in stored:
        raise CheckpointError(
            f"{label}: has no tensor 'layout', so save_compressed did not write it; "
            "the library of safetensors reads other files"
        )
    text = _inflated(stored.pop(_LAYOUT), None, f"{label}: its layout")
    layout = parse_json(text, f"{label}: its layout")
    if not isinstance(layout, dict):
        raise CheckpointError(f"{label}: its layout is not an object")
    expected = {f"{name}.{part}" for name in layout for part in ("bits", "values")}
    if odd := sorted(expected ^ set(stored)):
        raise CheckpointError(f"{label}: {shown(odd[0])} is only in the file or only in its layout")
    tensors = {}
    for name, entry in layout.items():
        where = f"{label}: {shown(name)}"
        dtype, shape = _dtype_and_shape(entry, where)
        bits, values = stored[f"{name}.bits"], stored[f"{name}.values"]
        tensors[name] = _tensor(dtype, shape, bits, values, where)
    return tensors


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"tensors: {shown(text)} has a name that is not text") from error


def _deflated(data: np.ndarray[Any, Any]) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data.data, _LEVEL)), dtype=torch.uint8)


def _inflated(stream: Tensor, size: int | None, label: str) -> bytes:
    """The ``size`` bytes of a stream, and never more in memory; None: as many as JSON may have."""
    most = MOST_JSON if size is None else size
    if stream.dtype != torch.uint8:
        raise CheckpointError(f"{label}: is {stream.dtype}, not uint8")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(stream.numpy().data, most + 1)
    except zlib.error as error:
        raise CheckpointError(f"{label}: is damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data or size not in (None, len(data)):
        raise CheckpointError(f"{label}: does not end after {most} bytes; it is damaged")
    return data


def _dtype_and_shape(entry: Any, label: str) -> tuple[torch.dtype, list[int]]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise CheckpointError(f"{label}: has no dtype and shape")
    dtype, shape = entry
    if not isinstance(dtype, str) or dtype not in _NAMES:
        raise CheckpointError(f"{label}: has the unknown dtype {shown(dtype)}")
    possible = safefile.whole_numbers(shape)
    if not possible or math.prod(max(n, 1) for n in shape) > LARGEST_INTEGER // 64:
        raise CheckpointError(f"{label}: has the impossible shape {shown(shape)}")
    return _NAMES[dtype], shape


def _tensor(
    dtype: torch.dtype, shape: list[int], bits: Tensor, values: Tensor, label: str
) -> Tensor:
    entries, size = math.prod(shape), dtype.itemsize
    packed = _inflated(bits, -(-entries // 8), f"{label}: its bits")
    if entries % 8 and packed[-1] >> entries % 8:
        raise CheckpointError(f"{label}: has bits beyond its {entries} entries; it is damaged")
    flags = np.unpackbits(np.frombuffer(packed, np.uint8), count=entries, bitorder="little")
    there = flags.view(np.bool_)
    kept = _inflated(values, int(there.sum()) * size, f"{label}: its values")
    rows = np.ascontiguousarray(np.frombuffer(kept, np.uint8).reshape(size, -1).T)
    whole = np.zeros(entries, _WHOLE[size])
    whole[there] = rows.reshape(-1).view(_WHOLE[size])
    if dtype == torch.bool and entries and int(whole.max()) > 1:
        raise CheckpointError(f"{label}: has a bool that is neither true nor false")
    return torch.from_numpy(whole.view(np.uint8)).view(dtype).reshape(shape)
