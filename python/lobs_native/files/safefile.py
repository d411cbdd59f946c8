"""safetensors files that may be damaged or malicious, read in bounded time and memory; and written
piece by piece.

The safetensors library refuses most damage, but it accepts duplicate keys (the last one counts),
and a large header may cost it minutes and gigabytes. Here the length of the header is bounded
before it is read, and the number of its values before it is parsed.

The library is not used for the rest either. It maps a file into memory, so that a file truncated
meanwhile ends the process with a signal, or it copies all bytes; and it writes to a path by itself.
Here a file is read into one buffer, to which the tensors refer, and written through the caller's
descriptor without copies, so that it can be synced and renamed. The bytes are those that the
library writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs
from lobs_native.files.regular import open_regular
from lobs_native.files.strict_json import LARGEST_INTEGER, MOST_JSON, parse_json, shown

__all__ = [
    "NAME",
    "TYPES",
    "Entry",
    "Expected",
    "largest",
    "longest_header",
    "parse_header",
    "pieces",
    "places",
    "read_header",
    "size",
    "tensors_of",
    "whole_numbers",
]

NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")  # a file name that an index may contain
_DIMENSIONS = 64
_METADATA = "__metadata__"

# Bits per element, in ascending order of alignment: safetensors stores tensors in descending order.
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_ORDER = {name: i for i, name in enumerate(_BITS)}
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of every tensor


@dataclass(frozen=True)
class Entry:
    """One tensor in the header of a safetensors file."""

    dtype: str  # in the notation of safetensors: "F32", "BF16"
    shape: tuple[int, ...]
    begin: int  # first byte, counted from the end of the header
    end: int  # last byte, exclusive


def longest_header(tensors: int | None = None) -> int:
    """The largest size in bytes of the header of a file with so many tensors."""
    return MOST_JSON if tensors is None else min(MOST_JSON, (tensors << 10) + (64 << 10))


def largest(expected: Expected) -> int:
    """The largest size in bytes of a file of these tensors."""
    data = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    return 8 + longest_header(len(expected)) + data


def read_header(path: Path, *, tensors: int | None = None) -> dict[str, Entry]:
    """The header of a safetensors file, in the order of its data, without the data.

    Symbolic links are followed: this is for folders that the user names, and caches store files
    under other names and link to them.

    Parameters
    ----------
    path : Path
    tensors : int, optional
        The largest number of tensors expected; it bounds the header more tightly.

    Raises
    ------
    CheckpointError
        The file is not a complete safetensors file, or its header is too long to be read.
    """
    return _header_and_length(path, tensors)[0]


def places(path: Path) -> dict[str, tuple[Entry, int]]:
    """Each tensor of a safetensors file with its first byte, counted from the beginning of the
    file. Raises CheckpointError as :func:`read_header` does."""
    header, length = _header_and_length(path, None)
    return {name: (entry, 8 + length + entry.begin) for name, entry in header.items()}


def _header_and_length(path: Path, tensors: int | None) -> tuple[dict[str, Entry], int]:
    label = str(path)
    handle = open_regular(path, label, follow=True)
    try:
        total = fs.stat(handle).st_size
        length = _header_length(fs.read(handle, 8), total, label, longest_header(tensors))
        return parse_header(fs.read(handle, length), total - 8 - length, label), length
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror}") from error
    finally:
        fs.close(handle)


def _header_length(first: bytes, total: int, label: str, most: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > total - 8:
        raise CheckpointError(f"{label}: is not a complete safetensors file; it has {total} bytes")
    if length > most:
        raise CheckpointError(f"{label}: claims a header of {length} bytes; the limit is {most}")
    return length


def parse_header(header: bytes, data_bytes: int, label: str) -> dict[str, Entry]:
    """The tensors of a header, which must cover ``data_bytes`` without gap or overlap. Raises
    CheckpointError, which calls the file ``label``."""
    values = parse_json(header, f"{label}: its header")
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: its header is not an object")
    metadata = values.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{label}: its metadata does not map names to text")
    entries = {name: _entry(value, f"{label}: {shown(name)}") for name, value in values.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise CheckpointError(
                f"{label}: {shown(name)} begins at byte {entry.begin}, but the tensor before it "
                f"ends at {position}"
            )
        position = entry.end
    if position != data_bytes:
        raise CheckpointError(
            f"{label}: is not a complete safetensors file; it has {data_bytes} bytes of tensors, "
            f"but its header claims {position}"
        )
    return ordered


def _entry(value: Any, label: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{label} has the unknown dtype {shown(dtype)}")
    if not whole_numbers(shape) or len(shape) > _DIMENSIONS:
        raise CheckpointError(f"{label} has the impossible shape {shown(shape)}")
    if not whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{label} has the impossible offsets {shown(offsets)}")
    begin, end = offsets
    if math.prod(max(n, 1) for n in shape) * _BITS[dtype] > LARGEST_INTEGER:
        raise CheckpointError(f"{label} has the impossible shape {shown(shape)}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(
            f"{label} has {end - begin} bytes, which does not fit {dtype} {shown(shape)}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def whole_numbers(value: Any) -> bool:
    """Whether a value of JSON is a list of sizes."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def size(tensors: Mapping[str, Tensor]) -> int:
    """The size in bytes of the file that :func:`pieces` yields."""
    return len(_header(_ordered(tensors))) + sum(t.numel() * t.itemsize for t in tensors.values())


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[fs.Buffer]:
    """The bytes of a safetensors file, piece by piece.

    One tensor at a time is copied, and only if it is not contiguous on the CPU. Raises DtypeError,
    ShapeError or ArgumentError before the first piece.
    """
    ordered = _ordered(tensors)
    yield _header(ordered)
    for value in ordered.values():
        flat = value.cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in tensors:
        if not isinstance(name, str) or name == _METADATA or not _is_text(name):
            raise ArgumentError(f"tensors: {shown(name)} cannot be the name of a tensor")
    checked = {
        name: checks.tensor(value, f"tensors[{name!r}]", dtypes=TYPES.values())
        for name, value in tensors.items()
    }
    return dict(sorted(checked.items(), key=lambda item: (-_ORDER[_NAMES[item[1].dtype]], item[0])))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _header(ordered: Mapping[str, Tensor]) -> bytes:
    entries, position = {}, 0
    for name, value in ordered.items():
        end = position + value.numel() * value.itemsize
        entries[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > longest_header(len(ordered)):
        raise ArgumentError("tensors: their names are too long to be read back; shorten them")
    return len(text).to_bytes(8, "little") + text


def tensors_of(raw: Tensor, label: str, expected: Expected | None = None) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, as views that keep those bytes in memory.

    Parameters
    ----------
    raw : (bytes,) uint8, on the CPU
        The whole file.
    label : str
        Its name, for messages.
    expected : {name: (shape, dtype)}, optional
        Exactly the tensors that must be in it.

    Raises
    ------
    CheckpointError
        The bytes are not a complete safetensors file, or its tensors are not those expected.
    """
    memory = raw.numpy().data
    most = longest_header(None if expected is None else len(expected))
    length = _header_length(bytes(memory[:8]), len(memory), label, most)
    entries = parse_header(bytes(memory[8 : 8 + length]), len(memory) - 8 - length, label)
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise CheckpointError(
                f"{label}: {shown(name)} is {entry.dtype}, which this package never writes"
            )
    if expected is not None:
        _check_expected(entries, expected, label)
    data = raw[8 + length :]
    return {
        name: _tensor(data, entry, f"{label}: {shown(name)}") for name, entry in entries.items()
    }


def _check_expected(entries: Mapping[str, Entry], expected: Expected, label: str) -> None:
    if set(entries) != set(expected):
        missing, extra = sorted(set(expected) - set(entries)), sorted(set(entries) - set(expected))
        parts = [f"lacks {shown(missing[0])}"] if missing else []
        parts += [f"has {shown(extra[0])}, which is not expected"] if extra else []
        raise CheckpointError(f"{label}: {' and '.join(parts)}")
    for name, (shape, dtype) in expected.items():
        entry = entries[name]
        if entry.shape != tuple(shape) or TYPES[entry.dtype] != dtype:
            raise CheckpointError(
                f"{label}: {shown(name)} is {entry.dtype} {shown(entry.shape)}, not "
                f"{_NAMES.get(dtype, dtype)} {shown(tuple(shape))} as expected"
            )


def _tensor(data: Tensor, entry: Entry, label: str) -> Tensor:
    dtype = TYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    own = data[entry.begin : entry.end]
    if own.data_ptr() % dtype.itemsize:
        raise CheckpointError(f"{label} is not aligned; write the file again")
    if dtype == torch.bool and int(own.max()) > 1:
        raise CheckpointError(f"{label} has a bool that is neither true nor false")
    return torch.frombuffer(own.numpy().data, dtype=dtype).reshape(entry.shape)
