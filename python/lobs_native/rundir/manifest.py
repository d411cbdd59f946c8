"""The JSON of a run directory: parsing and checking its bytes, and making them. It opens no files.

Everything is sealed (:func:`lobs_native.files.strict_json.seal`), only the fields listed here are
allowed, and each has one type. What passes was written by this package, or by someone who could
just as well have written another run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import strict_json
from lobs_native.files.strict_json import shown

__all__ = [
    "FORMAT",
    "LONGEST_LINE",
    "ManifestRecord",
    "State",
    "check_kind",
    "check_name",
    "check_of_line",
    "differences",
    "header_bytes",
    "info_of",
    "layer_file",
    "line_bytes",
    "parse_header",
    "parse_line",
    "parse_state",
    "state_bytes",
    "state_file",
    "state_record",
]

FORMAT = 1
LONGEST_LINE = 1 << 20  # bytes
_LINE_MARKS = 20_000  # see strict_json.count_marks
_LONGEST_NAME = 1000
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HEX = re.compile(r"[0-9a-f]{64}")
_BOTH: dict[str, type] = {
    "kind": str,
    "name": str,
    "file": str,
    "bytes": int,
    "sha256": str,
    "info": dict,
    "prev": str,
}
_RECORD = {"seq": int, **_BOTH}
_STATE = {**_BOTH, "after": int}


@dataclass(frozen=True)
class ManifestRecord:
    """One committed line of the manifest."""

    seq: int  # 0, 1, 2, ...
    kind: str
    name: str  # unique within its kind
    file: str  # relative to the run directory
    size: int  # of the file, in bytes
    sha256: str
    info: dict[str, Any]  # plain JSON values


class State(NamedTuple):
    """The record of a state."""

    key: str
    file: str  # relative to the run directory
    size: int  # of the file, in bytes
    sha256: str
    info: dict[str, Any]
    after: int  # how many records were committed when it was saved
    prev: str  # the check of the last of them


# ---- names ---------------------------------------------------------------------------------------


def check_name(name: Any, argument: str) -> str:
    """Return ``name`` if a record or state may have it; otherwise raise ArgumentError, which calls
    it ``argument``."""
    if not _is_name(name):
        raise ArgumentError(
            f"{argument}: {shown(name)} is not a name; pass text of at most {_LONGEST_NAME} "
            "characters"
        )
    return str(name)


def check_kind(kind: Any) -> str:
    """Return ``kind`` if a record may have it; otherwise raise ArgumentError."""
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ArgumentError(f"kind: {shown(kind)}; use lower-case letters, digits, - and _")
    return kind


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and len(name) <= _LONGEST_NAME and name.encode() is not None
    except UnicodeEncodeError:
        return False


def layer_file(seq: int, name: str) -> str:
    """The file of a record, relative to the run directory. A hash stands for the name, which may
    contain any character, and whose case the file system may ignore."""
    return f"layers/{seq:05d}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"


def state_record(key: str) -> str:
    """The file of a state's record, relative to the run directory."""
    return f"state/{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def state_file(key: str, sha256: str) -> str:
    """The file of a state whose contents have this sha256, relative to the run directory."""
    return f"{state_record(key).removesuffix('.json')}-{sha256[:16]}.safetensors"


# ---- run.json ------------------------------------------------------------------------------------


def header_bytes(header: Any) -> tuple[bytes, dict[str, Any], str]:
    """The contents of run.json, the header as it will be read back, and its check. Raises
    ArgumentError if it could not be read back."""
    values = strict_json.plain(header, "header")
    if not isinstance(values, dict):
        raise ArgumentError(f"header: must be a dict, not a {type(header).__name__}")
    if own := {"format", "check"} & set(values):
        raise ArgumentError(f"header: {min(own)!r} is added automatically; leave it out")
    data = strict_json.seal({"format": FORMAT, **values}, indent=1) + b"\n"
    if len(data) > strict_json.MOST_JSON:
        raise ArgumentError(
            f"header: takes {len(data)} bytes in run.json; the limit is {strict_json.MOST_JSON}"
        )
    try:
        return data, *parse_header(data, "header")
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error


def parse_header(data: bytes, label: str) -> tuple[dict[str, Any], str]:
    """The header in run.json, and its check. Raises CheckpointError."""
    way_out = "; restore it from a copy, or begin a new run"
    try:
        values = strict_json.parse_json(data, label)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{way_out}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: holds a {type(values).__name__}, not an object{way_out}")
    version = values.get("format")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{label}: has format {shown(version)}, but this version of lobs_native reads format "
            f"{FORMAT}; use the version that wrote it, or begin a new run"
        )
    try:
        values, check = _unseal_file(data, label)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{way_out}") from error
    del values["format"]
    return values, check


def _unseal_file(data: bytes, label: str) -> tuple[dict[str, Any], str]:
    """The object in a sealed file that ends with a line break, and its check."""
    if not data.endswith(b"\n"):
        raise CheckpointError(f"{label}: is damaged: its end is missing")
    return strict_json.unseal(data[:-1], label)


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """A line for each value that differs between two headers: its path, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            text = key if key.isprintable() else ascii(key)
            inner = f"{place}.{text}" if place else text
            if key not in new:
                yield f"{inner}: {_short(old[key])} in the run, not now"
            elif key not in old:
                yield f"{inner}: not in the run, {_short(new[key])} now"
            else:
                yield from differences(old[key], new[key], inner)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}: {len(old)} entries in the run, {len(new)} now"
            return
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{place}[{i}]")
    elif type(old) is not type(new) or old != new:
        yield f"{place}: {_short(old, new)} in the run, {_short(new, old)} now"


def _short(value: Any, other: Any = None) -> str:
    """At most 40 characters of a value as JSON, near the first difference from ``other``."""
    text, different = json.dumps(value), json.dumps(other)
    pairs = enumerate(zip(text, different, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(different)))
    start = max(0, common - 20) if common > 30 else 0
    shown_part = text[start : start + 40]
    return f"{'...' * (start > 0)}{shown_part}{'...' * (start + 40 < len(text))}"


# ---- manifest.jsonl ------------------------------------------------------------------------------


def info_of(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """``info`` as it will be read back. Raises ArgumentError."""
    values = strict_json.plain(dict(info) if isinstance(info, Mapping) else info, "info")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ArgumentError(f"info: must be a dict, not a {type(info).__name__}")
    return values


def line_bytes(record: ManifestRecord, prev: str) -> bytes:
    """The line of a record, with its line break. ``prev`` is the check of the line before it, or of
    run.json. Raises ArgumentError if its info makes the line too long."""
    return _sealed_line(
        {
            "seq": record.seq,
            "kind": record.kind,
            "name": record.name,
            "file": record.file,
            "bytes": record.size,
            "sha256": record.sha256,
            "info": record.info,
            "prev": prev,
        }
    )


def _sealed_line(values: Mapping[str, Any]) -> bytes:
    data = strict_json.seal(values)
    if len(data) > LONGEST_LINE:
        raise ArgumentError(
            f"info: makes a line of {len(data)} bytes; the limit is {LONGEST_LINE} bytes"
        )
    try:
        strict_json.unseal(data, "info", marks=_LINE_MARKS)
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error
    return data + b"\n"


def check_of_line(line: bytes) -> str:
    """The check in a line (with its line break) from :func:`line_bytes` or already parsed."""
    return line[-67:-3].decode()


def parse_line(data: bytes, label: str, seq: int, prev: str) -> ManifestRecord:
    """The record in line ``seq`` of a manifest, without its line break. Raises CheckpointError if
    it is not what :func:`line_bytes` makes."""
    v = _fields(data, label, _RECORD)
    if v["prev"] != prev:
        raise CheckpointError(f"{label}: does not follow {f'line {seq}' if seq else 'run.json'}")
    if v["seq"] != seq:
        raise CheckpointError(f"{label}: has the number {v['seq']}, not {seq}")
    if not _KIND.fullmatch(v["kind"]):
        raise CheckpointError(f"{label}: has the invalid kind {shown(v['kind'])}")
    _check_file(v, layer_file(seq, v["name"]), label)
    return ManifestRecord(seq, v["kind"], v["name"], v["file"], v["bytes"], v["sha256"], v["info"])


def _fields(data: bytes, label: str, types: Mapping[str, type]) -> dict[str, Any]:
    if len(data) > LONGEST_LINE:
        raise CheckpointError(f"{label}: has {len(data)} bytes; the limit is {LONGEST_LINE}")
    values, _ = strict_json.unseal(data, label, marks=_LINE_MARKS)
    if set(values) != set(types):
        raise CheckpointError(f"{label}: does not have exactly the fields {', '.join(types)}")
    for name, kind in types.items():
        if type(values[name]) is not kind:
            raise CheckpointError(
                f"{label}: {name} is {shown(values[name])}, not of type {kind.__name__}"
            )
    return values


def _check_file(values: Mapping[str, Any], file: str, label: str) -> None:
    if not _is_name(values["name"]):
        raise CheckpointError(f"{label}: has the invalid name {shown(values['name'])}")
    if values["file"] != file:
        raise CheckpointError(f"{label}: refers to the file {shown(values['file'])}, not {file}")
    if values["bytes"] < 0 or not _HEX.fullmatch(values["sha256"]):
        raise CheckpointError(f"{label}: has an invalid size or sha256")


# ---- state/*.json --------------------------------------------------------------------------------


def state_bytes(state: State) -> bytes:
    """The contents of a state's record. Raises ArgumentError as :func:`line_bytes` does."""
    return _sealed_line(
        {
            "kind": "state",
            "name": state.key,
            "file": state.file,
            "bytes": state.size,
            "sha256": state.sha256,
            "info": state.info,
            "after": state.after,
            "prev": state.prev,
        }
    )


def parse_state(data: bytes, label: str, record: str) -> State:
    """The state in the file ``record`` (relative to the run directory). Raises CheckpointError."""
    if not data.endswith(b"\n"):
        raise CheckpointError(f"{label}: is damaged: its end is missing")
    v = _fields(data[:-1], label, _STATE)
    if v["kind"] != "state" or v["after"] < 0 or not _HEX.fullmatch(v["prev"]):
        raise CheckpointError(f"{label}: is not the record of a state")
    _check_file(v, state_file(v["name"], v["sha256"]), label)
    if state_record(v["name"]) != record:
        raise CheckpointError(
            f"{label}: is the record of the state {shown(v['name'])}, which has another file"
        )
    return State(v["name"], v["file"], v["bytes"], v["sha256"], v["info"], v["after"], v["prev"])
