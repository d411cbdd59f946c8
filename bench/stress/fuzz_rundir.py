"""Run directories mutated at random: is every failure a LobsError, in bounded time and memory?

    python bench/stress/fuzz_rundir.py [--minutes 1] [--seed 0] [--out FILE]

A valid run receives one to four mutations: bits flipped, pieces cut, doubled, swapped between files
or overwritten with significant tokens; JSON values replaced, keys renamed, doubled, removed;
lengths and offsets of headers edited; files replaced by folders, links and pipes. In two of three
cases all hashes that cover the change are corrected, so that it passes them. Then the run is
opened, everything is loaded and checked, and it is repaired. The report counts the inputs and the
crashes (any exception but LobsError, or damage that remains after a repair), and has the longest
time and the largest growth of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lobs_native.errors import LobsError
from lobs_native.files import strict_json
from lobs_native.rundir.directory import RunDirectory

MANIFEST, HEADER = "manifest.jsonl", "run.json"
Files = dict[str, bytes]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1.5, -0.0, 1e308),
    *("", "x", "../x", "/", "\0", "\ud800", "é", "F32", "layers/00000-x.safetensors", "a" * 5000),
    *([], {}, [[]], {"": {}}, [0] * 1000, {"a": 1}),
]
TOKENS = [
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"\\ud800"),
    *(
        b"\xff",
        b"\0",
        b"\n",
        b'"',
        b"{}",
        b"[]",
        b",",
        b":",
        b"null",
        b'"check":"',
        b"\xef\xbb\xbf",
    ),
    *(bytes(8), b"\xff" * 8, b"__metadata__", b"BOOL", b"F64", b"C64"),
]
EXPECTED = {"weight": ((6, 4), torch.float32), "mask": ((6, 4), torch.bool)}


def valid(path: Path) -> None:
    """Write the run that all others are derived from."""
    with RunDirectory.create(
        path, {"config": {"sparsity": 0.5, "list": [1, 2.5, None, "x"]}}
    ) as run:
        for i in range(3):
            weight = torch.arange(24.0).reshape(6, 4) * i
            run.commit(
                f"layer.{i}", {"weight": weight, "mask": weight > 9}, {"error": i / 2, "n": []}
            )
        run.put_state(
            "sums", {"weight": torch.ones(6, 4), "mask": torch.ones(6, 4) > 0}, {"i": [1]}
        )


def files(path: Path) -> Files:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ---- mutations -----------------------------------------------------------------------------------


def flip(data: bytes, other: bytes, r: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 8])):
        if changed:
            changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def cut(data: bytes, other: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return r.choice([data[:a], data[:a] + data[b:], data[a:]])


def splice(data: bytes, other: bytes, r: random.Random) -> bytes:
    a, b = r.randrange(len(data) + 1), r.randrange(len(data) + 1)
    c, d = sorted(r.randrange(len(other) + 1) for _ in range(2))
    return data[:a] + other[c:d] + data[b:]


def double(data: bytes, other: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] * r.choice([1, 2, 50]) + data[b:]


def token(data: bytes, other: bytes, r: random.Random) -> bytes:
    a = r.randrange(len(data) + 1)
    inserted = r.choice(TOKENS)
    return data[:a] + inserted + data[a + r.choice([0, len(inserted)]) :]


def length(data: bytes, other: bytes, r: random.Random) -> bytes:
    """Change the length of the header, the first field of a safetensors file."""
    old = int.from_bytes(data[:8], "little")
    new = r.choice([0, 1, old - 1, old + 1, old + 8, len(data), len(data) - 8, 1 << 24, 1 << 62])
    return max(new, 0).to_bytes(8, "little") + data[8:]


RAW = [flip, cut, splice, double, token]


def change_value(value: Any, r: random.Random) -> Any:
    """``value`` with something inside it replaced, removed, added or renamed."""
    if isinstance(value, (dict, list)) and value and r.random() < 0.85:
        changed = value.copy()
        key = r.choice(list(changed)) if isinstance(changed, dict) else r.randrange(len(changed))
        match r.randrange(6):
            case 0:
                del changed[key]
            case 1 if isinstance(changed, dict):
                changed[r.choice(["", "x", "prev", "dtype", "__metadata__", "y" * 2000])] = (
                    changed.pop(key)
                )
            case 1:
                changed.insert(key, r.choice(VALUES))
            case _:
                changed[key] = change_value(changed[key], r)
        return changed
    if type(value) is int and r.random() < 0.5:
        return value + r.choice([-8, -1, 1, 4, 8, 1 << 32])
    return r.choice(VALUES)


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def change_json(data: bytes, r: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    text = dumps(change_value(value, r))
    if r.random() < 0.05 and text.startswith(b"{") and len(text) > 2:
        text = text[:-1] + b"," + text[1:]  # every key twice
    return text


def change_header(data: bytes, r: random.Random) -> bytes:
    n = int.from_bytes(data[:8], "little")
    text = change_json(data[8 : 8 + n], r)
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def mutate(run_files: Files, r: random.Random) -> None:
    name = r.choice([n for n in run_files if n != "LOCK"] + [MANIFEST, HEADER])
    data, other = run_files[name], run_files[r.choice(list(run_files))]
    if name.endswith(".safetensors"):
        if (how := r.choice([*RAW, length, None, None])) is None:
            run_files[name] = change_header(data, r)
        else:
            run_files[name] = how(data, other, r)
    elif r.random() < 0.5:
        run_files[name] = r.choice(RAW)(data, other, r)
    elif name == MANIFEST:
        lines = data.split(b"\n")
        i = r.randrange(len(lines))
        match r.randrange(5):
            case 0:
                r.shuffle(lines)
            case 1:
                lines.insert(i, r.choice(lines))
            case _:
                lines[i] = change_json(lines[i], r)
        run_files[name] = b"\n".join(lines)
    else:
        run_files[name] = change_json(data, r) + b"\n"


# ---- making hashes right again -------------------------------------------------------------------


def seal_again(data: bytes, **change: Any) -> bytes:
    """A sealed object with some fields set and a new seal; unchanged if it is not an object."""
    try:
        values = json.loads(data)
        values.pop("check", None)
        return strict_json.seal({**values, **change})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def heal(run_files: Files, r: random.Random) -> None:
    """Renew sizes, hashes, chain and seals, as an attacker would."""
    run_files[HEADER] = seal_again(run_files[HEADER]) + b"\n"
    prev = check_of(run_files[HEADER])
    lines = []
    for line in run_files[MANIFEST].split(b"\n"):
        if not line:
            continue
        lines.append(seal_again(line, **about(line, run_files), **({"prev": prev} if prev else {})))
        prev = check_of(lines[-1])
    run_files[MANIFEST] = b"\n".join(lines) + b"\n" * bool(lines)
    for name in [n for n in run_files if n.startswith("state/") and n.endswith(".json")]:
        # The name of its file goes by its content.
        change = about(run_files[name], run_files)
        if "sha256" in change and r.random() < 0.7:
            old = json.loads(run_files[name])["file"]
            new = f"{old[:22]}-{change['sha256'][:16]}.safetensors"
            run_files[new] = run_files.pop(old)
            change["file"] = new
        run_files[name] = seal_again(run_files[name], **change) + b"\n"


def about(line: bytes, run_files: Files) -> dict[str, Any]:
    try:
        file = json.loads(line)["file"]
        data = run_files[file]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check_of(data: bytes) -> str | None:
    try:
        return str(json.loads(data)["check"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# ---- trying --------------------------------------------------------------------------------------


def replace_by_a_thing(path: Path, r: random.Random) -> None:
    file = r.choice([p for p in path.rglob("*") if p.is_file()])
    file.unlink()
    make: Callable[[Path], object] = r.choice(
        [
            Path.mkdir,
            os.mkfifo,
            lambda p: p.symlink_to("x"),
            lambda p: p.symlink_to(path),
            Path.touch,
        ]
    )
    make(file)


def read(path: Path) -> str:
    """Do everything that a reader, a check and a repair do; return how far the reader came."""
    try:
        run = RunDirectory.open(path, write=False)
    except LobsError:
        return after_repair(path, "not opened")
    outcome = "all is right"
    with run:
        for record in run.records:
            for expected in (None, EXPECTED):
                try:
                    run.load(record, expected)
                except LobsError:
                    outcome = "a record is wrong"
        try:
            run.state("sums")
        except LobsError:
            outcome = "a state is wrong"
        for problem in run.check():
            str(problem)
            outcome = outcome if outcome != "all is right" else "something is left over"
        run.differences({"config": 1})
    return after_repair(path, outcome)


def after_repair(path: Path, outcome: str) -> str:
    try:
        run = RunDirectory.open(path, write=True, repair=True)
    except LobsError:
        return outcome
    with run:
        left = [p for p in run.check() if not (path / p.file).is_dir()]
        strange = [p for p in left if p.seq is not None]
        if strange:
            raise AssertionError(f"a repair has left {strange[0]}")
        if run.find("again") is None:
            run.commit("again", {"w": torch.ones(2)})
    return outcome


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    r = random.Random(seed)
    valid(folder / "valid")
    whole = files(folder / "valid")
    outcomes: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    longest, growth, tried = 0.0, 0, 0
    path = folder / "run"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run_files = dict(whole)
        for _ in range(r.choice([1, 1, 2, 4])):
            mutate(run_files, r)
        if r.random() < 2 / 3:
            heal(run_files, r)
        for name, data in run_files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        if r.random() < 0.02:
            replace_by_a_thing(path, r)
        before, begin = resident(), time.perf_counter()
        try:
            outcomes[read(path)] += 1
        except Exception:
            place = " ".join(traceback.format_exc().splitlines()[-3:])
            crashes[place] += 1
        longest = max(longest, time.perf_counter() - begin)
        growth = max(growth, resident() - before)
        tried += 1
        shutil.rmtree(path)
    return {
        "inputs": tried,
        "crashes": sum(crashes.values()),
        "longest seconds": round(longest, 3),
        "largest growth in MB": round(growth / 2**20, 1),
        "outcomes": dict(outcomes.most_common()),
        "kinds of crashes": dict(crashes.most_common(20)),
        "seed": seed,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path("/dev/shm")  # many small files: a disk would take most of the time
    where = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        counts = fuzz(60 * arguments.minutes, arguments.seed, Path(folder))
    for name, value in counts.items():
        print(f"{name:24}{value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=1) + "\n")
    if counts["crashes"]:
        raise SystemExit("the reader crashed")


if __name__ == "__main__":
    main()
