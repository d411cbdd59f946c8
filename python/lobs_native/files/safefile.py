"""Reading files that may be damaged or made to do harm: safetensors and JSON, in bounded time and
memory.

The safetensors library refuses most of what is wrong with a file, but takes the last of two equal
keys, and a large header may cost it minutes and gigabytes. Here the length of a header is bounded
before it is read, and so is the number of values in any JSON before it is parsed. Tensors are read
into one buffer with plain reads, never mapped: a file that is cut meanwhile is an error and not a
signal.

Sealed JSON is an object whose last entry, ``"check"``, is the sha256 of the bytes before it, so
that a changed bit is noticed before anything is believed.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs

__all__ = [
    "NAME",
    "TYPES",
    "Entry",
    "Expected",
    "check_regular",
    "count_marks",
    "largest",
    "longest_header",
    "open_regular",
    "parse_header",
    "parse_json",
    "pieces",
    "plain",
    "read_header",
    "read_whole",
    "seal",
    "shown",
    "size",
    "tensors_of",
    "unseal",
]

NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")  # of a file that others may name
MOST_JSON = 16 << 20  # bytes
MOST_MARKS = 500_000  # of "{", "[", ":" and ",": a value costs up to about 200 bytes when parsed
DEEPEST = 32
_LARGEST = (1 << 63) - 1
_LONGEST_NUMBER = 64  # characters
_DIMENSIONS = 64
_METADATA = "__metadata__"
_SEAL = re.compile(rb',"check":"([0-9a-f]{64})"\}')
_SEAL_BYTES = 76

# By rising alignment, as safetensors orders the tensors in a file, falling; bits per element.
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

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of every tensor


@dataclass(frozen=True)
class Entry:
    """One tensor in the header of a safetensors file."""

    dtype: str  # as safetensors writes it: "F32", "BF16"
    shape: tuple[int, ...]
    begin: int  # first byte, from the end of the header
    end: int  # last byte, exclusive


def shown(value: Any) -> str:
    """``value`` for a message: at most 80 characters, none that a terminal would act on."""
    text = ascii(value[:200]) if isinstance(value, (str, bytes)) else ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


# ---- files ---------------------------------------------------------------------------------------


def open_regular(
    name: fs.Name, what: str, *, folder: int | None = None, follow: bool = False
) -> int:
    """Open a regular file for reading.

    Nothing else is opened for longer than it takes to see what it is, and without waiting for
    another end of a pipe. A symbolic link is refused, or with ``follow`` taken for what it leads
    to. Raises CheckpointError with ``what``, the name for messages.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = fs.open_file(name, flags, folder=folder)
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{what}: is no name of a file: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{what}: is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise CheckpointError(f"{what}: is a link; put the file itself there") from error
        raise CheckpointError(f"{what}: cannot be opened: {error.strerror}") from error
    try:
        check_regular(handle, what)
    except OSError as error:
        fs.close(handle)
        raise CheckpointError(f"{what}: cannot be looked at: {error.strerror}") from error
    except CheckpointError:
        fs.close(handle)
        raise
    return handle


def check_regular(handle: int, what: str) -> None:
    """Raise CheckpointError with ``what`` unless this is a regular file. Raises OSError too."""
    mode = fs.stat(handle).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise CheckpointError(f"{what}: is {kind} and no file; remove it")


def read_whole(
    name: fs.Name, what: str, *, most: int, folder: int | None = None, follow: bool = False
) -> bytes:
    """The content of a small regular file. Raises CheckpointError; beyond ``most`` bytes, before
    anything is read."""
    handle = open_regular(name, what, folder=folder, follow=follow)
    try:
        size = fs.stat(handle).st_size
        if size > most:
            raise CheckpointError(f"{what}: has {size} bytes; more than {most} are not read")
        return fs.read(handle, most)
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read: {error.strerror}") from error
    finally:
        fs.close(handle)


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(data: bytes, what: str, *, marks: int = MOST_MARKS) -> Any:
    """Parse JSON that may be hostile.

    Refused with a CheckpointError that begins with ``what``: more than ``marks`` separators and
    brackets (before parsing), a depth beyond 32, keys that occur twice, NaN, infinities, integers
    of more than 64 bits, numbers of more than 64 characters, and text that is not UTF-8.
    """
    found = count_marks(data)
    if found > marks:
        raise CheckpointError(f"{what}: holds about {found} values; more than {marks} are not read")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        if "\\u" in text:  # half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{what}: is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what}: is not the JSON it should be: {error}") from error
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise CheckpointError(f"{what}: is nested more than {DEEPEST} deep")
    return value


def count_marks(data: bytes) -> int:
    """Brackets and separators in JSON: no fewer than half of the values in it."""
    return len(data) - len(data.translate(None, b"{[:,"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(a for a, b in itertools.pairwise(keys) if a == b)
        raise ValueError(f"{shown(twice)} occurs twice")
    return found


def _integer(text: str) -> int:
    value = int(text) if len(text) <= _LONGEST_NUMBER else _LARGEST + 1
    if abs(value) > _LARGEST:
        raise ValueError(f"the integer {shown(text)} is too large")
    return value


def _float(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large or too long")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def plain(value: Any, what: str) -> Any:
    """``value`` as it will be read again from JSON (tuples become lists, keys text). ArgumentError
    with ``what`` if it would not be."""
    try:
        return parse_json(json.dumps(value, allow_nan=False).encode(), what)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: cannot be kept as JSON: {error}") from error
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error


def seal(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """JSON of an object, plus ``"check"``: the sha256 of what stands before it."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(values, indent=indent, separators=separators, allow_nan=False)
    stem = text[:-1].rstrip().encode()
    return stem + b',"check":"' + hashlib.sha256(stem).hexdigest().encode() + b'"}'


def unseal(data: bytes, what: str, *, marks: int = MOST_MARKS) -> tuple[dict[str, Any], str]:
    """The object that :func:`seal` was given, and its check. Raises CheckpointError with ``what``,
    before anything is parsed if a bit has changed."""
    stem, found = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if found is None or hashlib.sha256(stem).hexdigest().encode() != found[1]:
        raise CheckpointError(
            f"{what}: was damaged or changed: its check is not that of its content"
        )
    values = parse_json(data, what, marks=marks)
    if not isinstance(values, dict):
        raise CheckpointError(f"{what}: holds a {type(values).__name__}, not an object")
    return values, str(values.pop("check"))


# ---- safetensors ---------------------------------------------------------------------------------


def longest_header(tensors: int | None = None) -> int:
    """The most bytes that the header of a file with so many tensors may have."""
    return MOST_JSON if tensors is None else min(MOST_JSON, (tensors << 10) + (64 << 10))


def largest(expected: Expected) -> int:
    """The most bytes that a file of these tensors may have."""
    data = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    return 8 + longest_header(len(expected)) + data


def read_header(path: Path, *, tensors: int | None = None) -> dict[str, Entry]:
    """The header of a safetensors file, in the order of its data, without its data.

    Symbolic links are followed: this is for folders that a user has named, where caches keep files
    under other names and link to them.

    Parameters
    ----------
    path : Path
    tensors : int, optional
        How many there should be at most; bounds the header more tightly.

    Raises
    ------
    CheckpointError
        It is no whole safetensors file, or its header is too long to be read.
    """
    what = str(path)
    handle = open_regular(path, what, follow=True)
    try:
        total = fs.stat(handle).st_size
        length = _header_length(fs.read(handle, 8), total, what, longest_header(tensors))
        return parse_header(fs.read(handle, length), total - 8 - length, what)
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read: {error.strerror}") from error
    finally:
        fs.close(handle)


def _header_length(first: bytes, total: int, what: str, most: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > total - 8:
        raise CheckpointError(f"{what}: is no whole safetensors file; it has {total} bytes")
    if length > most:
        raise CheckpointError(
            f"{what}: says that its header has {length} bytes; more than {most} are not read"
        )
    return length


def parse_header(header: bytes, data_bytes: int, what: str) -> dict[str, Entry]:
    """The tensors of a header, which must cover ``data_bytes`` without gap or overlap. Raises
    CheckpointError with ``what``."""
    found = parse_json(header, f"{what}: its header")
    if not isinstance(found, dict):
        raise CheckpointError(f"{what}: its header is no object")
    metadata = found.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{what}: its metadata is not text by name")
    entries = {name: _entry(value, f"{what}: {shown(name)}") for name, value in found.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = 0
    for name, entry in ordered.items():
        if entry.begin != place:
            raise CheckpointError(
                f"{what}: {shown(name)} begins at byte {entry.begin}, not at {place} where the one "
                "before it ends"
            )
        place = entry.end
    if place != data_bytes:
        raise CheckpointError(
            f"{what}: is no whole safetensors file; it has {data_bytes} bytes of tensors and its "
            f"header says {place}"
        )
    return ordered


def _entry(value: Any, what: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{what} has the unknown dtype {shown(dtype)}")
    if not _whole_numbers(shape) or len(shape) > _DIMENSIONS:
        raise CheckpointError(f"{what} has the impossible shape {shown(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has the impossible place {shown(offsets)}")
    begin, end = offsets
    if math.prod(max(n, 1) for n in shape) * _BITS[dtype] > _LARGEST:
        raise CheckpointError(f"{what} has the impossible shape {shown(shape)}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(
            f"{what} has {end - begin} bytes, which is not what {dtype} {shown(shape)} needs"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the safetensors file that :func:`pieces` makes."""
    return len(_header(_ordered(tensors))) + sum(t.numel() * t.itemsize for t in tensors.values())


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[fs.Buffer]:
    """The bytes of a safetensors file, piece by piece: those that the library would write.

    Only one tensor at a time is copied, and only if it does not lie in one piece on the CPU. Raises
    DtypeError, ShapeError or ArgumentError by name before the first piece.
    """
    ordered = _ordered(tensors)
    yield _header(ordered)
    for value in ordered.values():
        flat = value.cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in tensors:
        if not isinstance(name, str) or name == _METADATA or not _is_text(name):
            raise ArgumentError(f"tensors: {shown(name)} is no name for a tensor")
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
    entries, place = {}, 0
    for name, value in ordered.items():
        end = place + value.numel() * value.itemsize
        entries[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > longest_header(len(ordered)):
        raise ArgumentError("tensors: their names are too long to be read again; shorten them")
    return len(text).to_bytes(8, "little") + text


def tensors_of(raw: Tensor, what: str, expected: Expected | None = None) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, which they keep and do not copy.

    Parameters
    ----------
    raw : (bytes,) uint8, on the CPU
        The whole file.
    what : str
        Its name, for messages.
    expected : {name: (shape, dtype)}, optional
        Exactly what must be in it.

    Raises
    ------
    CheckpointError
        It is no whole safetensors file, or not what is expected.
    """
    memory = raw.numpy().data
    most = longest_header(None if expected is None else len(expected))
    length = _header_length(bytes(memory[:8]), len(memory), what, most)
    entries = parse_header(bytes(memory[8 : 8 + length]), len(memory) - 8 - length, what)
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise CheckpointError(
                f"{what}: {shown(name)} is {entry.dtype}, which is never kept here"
            )
    if expected is not None:
        _compare(entries, expected, what)
    data = raw[8 + length :]
    return {name: _tensor(data, entry, f"{what}: {shown(name)}") for name, entry in entries.items()}


def _compare(entries: Mapping[str, Entry], expected: Expected, what: str) -> None:
    if set(entries) != set(expected):
        missing, more = sorted(set(expected) - set(entries)), sorted(set(entries) - set(expected))
        parts = [f"lacks {shown(missing[0])}"] if missing else []
        parts += [f"has {shown(more[0])}, which is not expected"] if more else []
        raise CheckpointError(f"{what}: {' and '.join(parts)}")
    for name, (shape, dtype) in expected.items():
        entry = entries[name]
        if entry.shape != tuple(shape) or TYPES[entry.dtype] != dtype:
            raise CheckpointError(
                f"{what}: {shown(name)} is {entry.dtype} {shown(entry.shape)}, not "
                f"{_NAMES.get(dtype, dtype)} {shown(tuple(shape))} as expected"
            )


def _tensor(data: Tensor, entry: Entry, what: str) -> Tensor:
    dtype = TYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    own = data[entry.begin : entry.end]
    if own.data_ptr() % dtype.itemsize:
        raise CheckpointError(f"{what} is not aligned; write the file again")
    if dtype == torch.bool and int(own.max()) > 1:
        raise CheckpointError(f"{what} has a bool that is neither true nor false")
    return torch.frombuffer(own.numpy().data, dtype=dtype).reshape(entry.shape)
