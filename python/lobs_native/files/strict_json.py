"""JSON from files that may be damaged or malicious, parsed in bounded time and memory.

Sealed JSON is an object whose last entry, ``"check"``, is the sha256 of the bytes before it, so
that a flipped bit is noticed before any value is trusted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lobs_native.errors import ArgumentError, CheckpointError

__all__ = [
    "LARGEST_INTEGER",
    "MOST_JSON",
    "MOST_MARKS",
    "count_marks",
    "parse_json",
    "plain",
    "seal",
    "shown",
    "unseal",
]

MOST_JSON = 16 << 20  # bytes
MOST_MARKS = 500_000  # brackets and separators; a parsed value takes up to about 200 bytes
LARGEST_INTEGER = (1 << 63) - 1
_DEEPEST = 32
_LONGEST_NUMBER = 64  # characters
_SEAL = re.compile(rb',"check":"([0-9a-f]{64})"\}')
_SEAL_BYTES = 76


def shown(value: Any) -> str:
    """``value`` as text for a message: at most 80 characters, without control characters."""
    text = ascii(value[:200]) if isinstance(value, (str, bytes)) else ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def parse_json(data: bytes, label: str, *, marks: int = MOST_MARKS) -> Any:
    """Parse JSON that may be malicious.

    Raises CheckpointError, which calls the data ``label``, for more than ``marks`` brackets and
    separators (before parsing), more than 32 levels, duplicate keys, NaN, infinities, integers
    beyond 64 bits, numbers of more than 64 characters, and text that is not UTF-8.
    """
    count = count_marks(data)
    if count > marks:
        raise CheckpointError(f"{label}: holds about {count} values; the limit is {marks}")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        if "\\u" in text:  # half of a surrogate pair is valid JSON, but not valid text
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{label}: is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{label}: is not valid JSON: {error}") from error
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise CheckpointError(f"{label}: is nested more than {_DEEPEST} deep")
    return value


def count_marks(data: bytes) -> int:
    """The number of brackets and separators in JSON: at least half the number of its values."""
    return len(data) - len(data.translate(None, b"{[:,"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        duplicate = next(a for a, b in itertools.pairwise(keys) if a == b)
        raise ValueError(f"{shown(duplicate)} occurs twice")
    return values


def _integer(text: str) -> int:
    value = int(text) if len(text) <= _LONGEST_NUMBER else LARGEST_INTEGER + 1
    if abs(value) > LARGEST_INTEGER:
        raise ValueError(f"the integer {shown(text)} is too large")
    return value


def _float(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large or too long")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def plain(value: Any, label: str) -> Any:
    """``value`` as it will be read back from JSON: tuples become lists, and keys text.

    Raises ArgumentError if it could not be read back.
    """
    try:
        return parse_json(json.dumps(value, allow_nan=False).encode(), label)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{label}: cannot be stored as JSON: {error}") from error
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error


def seal(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """An object as JSON with a last entry ``"check"``, the sha256 of the bytes before it."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(values, indent=indent, separators=separators, allow_nan=False)
    stem = text[:-1].rstrip().encode()
    return stem + b',"check":"' + hashlib.sha256(stem).hexdigest().encode() + b'"}'


def unseal(data: bytes, label: str, *, marks: int = MOST_MARKS) -> tuple[dict[str, Any], str]:
    """The object passed to :func:`seal`, and its check.

    Raises CheckpointError, before parsing anything if a bit has changed.
    """
    stem, match = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if match is None or hashlib.sha256(stem).hexdigest().encode() != match[1]:
        raise CheckpointError(
            f"{label}: was damaged or changed: its check does not match its content"
        )
    values = parse_json(data, label, marks=marks)
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: holds a {type(values).__name__}, not an object")
    return values, str(values.pop("check"))
