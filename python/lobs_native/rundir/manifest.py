"""The JSON in the folder of a run: bytes in, checked values out, and back. Opens no files.

Everything is sealed (:func:`lobs_native.safefile.seal`), exactly the fields listed here are
allowed, and each has its type: what passes was written by this package, or by someone who could as
well have written another run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import safefile
from lobs_native.files.safefile import shown

__all__ = [
    "FORMAT",
    "Record",
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
_LINE_MARKS = 20_000  # see safefile.MOST_MARKS
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
class Record:
    """One committed line of the manifest."""

    seq: int  # 0, 1, 2, ...
    kind: str
    name: str  # unique within its kind
    file: str  # below the folder of the run
    size: int  # of the file, in bytes
    sha256: str
    info: dict[str, Any]  # plain JSON values


class State(NamedTuple):
    """What is kept about a state."""

    key: str
    file: str  # below the folder of the run
    size: int
    sha256: str
    info: dict[str, Any]
    after: int  # records that were committed when it was put
    prev: str  # check of the last of them


# ---- names ---------------------------------------------------------------------------------------


def check_name(name: Any, argument: str) -> str:
    """``name`` if a record or state may have it; ArgumentError by ``argument`` otherwise."""
    if not _is_name(name):
        raise ArgumentError(
            f"{argument}: {shown(name)} is no name; give text of at most {_LONGEST_NAME} characters"
        )
    return str(name)


def check_kind(kind: Any) -> str:
    """``kind`` if a record may have it; ArgumentError otherwise."""
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ArgumentError(f"kind: {shown(kind)}; use lower-case letters, digits, - and _")
    return kind


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and len(name) <= _LONGEST_NAME and name.encode() is not None
    except UnicodeEncodeError:
        return False


def layer_file(seq: int, name: str) -> str:
    """The file of a record, below the folder of the run. It says nothing of the name, which may
    hold anything, and differs where names differ only in case."""
    return f"layers/{seq:05d}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"


def state_record(key: str) -> str:
    """The file of a state's record, below the folder of the run."""
    return f"state/{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def state_file(key: str, sha256: str) -> str:
    """The file of a state with this content."""
    return f"{state_record(key).removesuffix('.json')}-{sha256[:16]}.safetensors"


# ---- run.json ------------------------------------------------------------------------------------


def header_bytes(header: Any) -> tuple[bytes, dict[str, Any], str]:
    """The content of run.json, the header as it will be read again, and its check. ArgumentError if
    it could not be read again."""
    values = safefile.plain(header, "header")
    if not isinstance(values, dict):
        raise ArgumentError(f"header: must be a dict, not a {type(header).__name__}")
    if own := {"format", "check"} & set(values):
        raise ArgumentError(f"header: {min(own)!r} is written by the run itself; leave it out")
    data = safefile.seal({"format": FORMAT, **values}, indent=1) + b"\n"
    if len(data) > safefile.MOST_JSON:
        raise ArgumentError(
            f"header: makes a run.json of {len(data)} bytes; more than {safefile.MOST_JSON} would "
            "not be read again"
        )
    try:
        return data, *parse_header(data, "header")
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error


def parse_header(data: bytes, what: str) -> tuple[dict[str, Any], str]:
    """The header in run.json and its check. Raises CheckpointError with ``what``."""
    way_out = "; put a copy of it there, or begin a new run"
    try:
        values = safefile.parse_json(data, what)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{way_out}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what}: holds a {type(values).__name__}, not an object{way_out}")
    version = values.get("format")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{what}: has format {shown(version)}, but this version of lobs_native reads format "
            f"{FORMAT}; use the version that wrote it, or begin a new run"
        )
    try:
        values, check = _unseal_file(data, what)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{way_out}") from error
    del values["format"]
    return values, check


def _unseal_file(data: bytes, what: str) -> tuple[dict[str, Any], str]:
    """A sealed object with a line break after it."""
    if not data.endswith(b"\n"):
        raise CheckpointError(f"{what}: is damaged: its end is missing")
    return safefile.unseal(data[:-1], what)


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """One line for each value that differs between two headers: its place and both values."""
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
    """A value as JSON, at most 40 characters of it: from the place where ``other`` differs, if that
    is further on."""
    text, different = json.dumps(value), json.dumps(other)
    pairs = enumerate(zip(text, different, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(different)))
    start = max(0, common - 20) if common > 30 else 0
    shown_part = text[start : start + 40]
    return f"{'...' * (start > 0)}{shown_part}{'...' * (start + 40 < len(text))}"


# ---- manifest.jsonl ------------------------------------------------------------------------------


def info_of(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """``info`` as it will be read again. Raises ArgumentError."""
    found = safefile.plain(dict(info) if isinstance(info, Mapping) else info, "info")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ArgumentError(f"info: must be a dict, not a {type(info).__name__}")
    return found


def line_bytes(record: Record, prev: str) -> bytes:
    """The line of a record, with its line break; ``prev`` is the check of what stands before it.
    ArgumentError if its info makes it too large to be read again."""
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
    data = safefile.seal(values)
    if len(data) > LONGEST_LINE:
        raise ArgumentError(
            f"info: makes a line of {len(data)} bytes, and more than {LONGEST_LINE} bytes would "
            "not be read again"
        )
    try:
        safefile.unseal(data, "info", marks=_LINE_MARKS)
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error
    return data + b"\n"


def check_of_line(line: bytes) -> str:
    """The check in a line (with its line break) that has been parsed or made here."""
    return line[-67:-3].decode()


def parse_line(data: bytes, what: str, seq: int, prev: str) -> Record:
    """The record in line ``seq`` of a manifest, without its line break. Raises CheckpointError with
    ``what`` if anything in it is not as :func:`line_bytes` would have made it."""
    v = _fields(data, what, _RECORD)
    if v["prev"] != prev:
        raise CheckpointError(f"{what}: does not follow {f'line {seq}' if seq else 'run.json'}")
    if v["seq"] != seq:
        raise CheckpointError(f"{what}: has the number {v['seq']}, not {seq}")
    if not _KIND.fullmatch(v["kind"]):
        raise CheckpointError(f"{what}: has the impossible kind {shown(v['kind'])}")
    _check_file(v, layer_file(seq, v["name"]), what)
    return Record(seq, v["kind"], v["name"], v["file"], v["bytes"], v["sha256"], v["info"])


def _fields(data: bytes, what: str, types: Mapping[str, type]) -> dict[str, Any]:
    if len(data) > LONGEST_LINE:
        raise CheckpointError(
            f"{what}: has {len(data)} bytes; more than {LONGEST_LINE} are not read"
        )
    values, _ = safefile.unseal(data, what, marks=_LINE_MARKS)
    if set(values) != set(types):
        raise CheckpointError(f"{what}: has not exactly the fields {', '.join(types)}")
    for name, kind in types.items():
        if type(values[name]) is not kind:
            raise CheckpointError(f"{what}: {name} is {shown(values[name])}, no {kind.__name__}")
    return values


def _check_file(values: Mapping[str, Any], file: str, what: str) -> None:
    if not _is_name(values["name"]):
        raise CheckpointError(f"{what}: has the impossible name {shown(values['name'])}")
    if values["file"] != file:
        raise CheckpointError(f"{what}: names the file {shown(values['file'])}, not {file}")
    if values["bytes"] < 0 or not _HEX.fullmatch(values["sha256"]):
        raise CheckpointError(f"{what}: has an impossible size or sha256")


# ---- state/*.json --------------------------------------------------------------------------------


def state_bytes(state: State) -> bytes:
    """The content of a state's record. ArgumentError as for :func:`line_bytes`."""
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


def parse_state(data: bytes, what: str, record: str) -> State:
    """The state that the file ``record`` (below the folder of the run) is about. Raises
    CheckpointError with ``what``."""
    if not data.endswith(b"\n"):
        raise CheckpointError(f"{what}: is damaged: its end is missing")
    v = _fields(data[:-1], what, _STATE)
    if v["kind"] != "state" or v["after"] < 0 or not _HEX.fullmatch(v["prev"]):
        raise CheckpointError(f"{what}: is not about a state")
    _check_file(v, state_file(v["name"], v["sha256"]), what)
    if state_record(v["name"]) != record:
        raise CheckpointError(
            f"{what}: is about the state {shown(v['name'])}, which has another file"
        )
    return State(v["name"], v["file"], v["bytes"], v["sha256"], v["info"], v["after"], v["prev"])
