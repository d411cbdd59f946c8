"""Run directories under repeated kills: is everything acknowledged still there, bit for bit?

    python bench/stress/crash.py [--kills 200] [--folder DIR] [--out FILE]

A child process writes a run of small layers, resuming where the last one stopped, and prints a line
after each commit. It is killed (SIGKILL) at a random moment. The report says how many acknowledged
layers were lost, how many files were damaged, and whether each completed run has the bytes of an
undisturbed one. Children are forked from one process that has imported torch, because the import
takes far longer than their work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lobs_native.errors import CheckpointError
from lobs_native.files import fs
from lobs_native.rundir.directory import LOCK, RunDirectory

LAYERS = 12
KILLED, FAILED = 137, 74  # exit codes: as by SIGKILL, and "input/output error" of sysexits.h


# ---- the run -------------------------------------------------------------------------------------


def tensors(i: int) -> dict[str, torch.Tensor]:
    """The content of layer ``i``, the same every time."""
    weight = torch.arange(64.0).reshape(8, 8) * (i + 1)
    return {"weight": weight, "mask": weight % 3 == 0}


def work(path: Path, layers: int = LAYERS, acknowledge: Callable[[str], None] = print) -> None:
    """Write a run, or resume it: before each layer a state in two steps, then the layer."""
    if (path / "run.json").exists():
        run = RunDirectory.open(path, write=True)
    else:
        run = RunDirectory.create(path, {"config": {"layers": layers}})
    with run:
        for i in range(layers):
            name = f"layer.{i}"
            if run.find(name) is None:
                for step in range(2):
                    run.put_state(f"sums.{i % 2}", {"h": torch.full((4, 4), i + step)}, {"i": i})
                run.commit(name, tensors(i), {"error": i / 4})
                acknowledge(name)
            run.drop_state(f"sums.{i % 2}")


def files(path: Path) -> dict[str, bytes]:
    """The content of a run, by name. The content of the lock has no meaning."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != LOCK
    }


def acknowledged_are_there(path: Path, names: list[str]) -> tuple[int, int]:
    """How many of the acknowledged layers are lost, and how many files are damaged."""
    if not (path / "run.json").exists():
        return len(names), 0
    with RunDirectory.open(path, write=False) as run:
        found = {record.name for record in run.records}
        damaged = sum(problem.seq is not None for problem in run.check())
        return len(set(names) - found), damaged


# ---- the child -----------------------------------------------------------------------------------


class ExitAt:
    """Replaces ``fs.call``: the process ends just before call ``k``."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, operation: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        self.k -= 1
        if self.k == 0:
            os._exit(KILLED)
        return function(*args, **kw)


def child(task: dict[str, Any], acknowledge: Callable[[str], None]) -> int:
    """Carry out one run in this process and return its exit code."""
    if "exit_at" in task:
        fs.call = ExitAt(task["exit_at"])
    if "largest_file" in task:
        size = task["largest_file"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        if "hold" in task:
            with RunDirectory.open(Path(task["path"]), write=True):
                acknowledge("held")
                time.sleep(task["hold"])
        else:
            work(Path(task["path"]), task.get("layers", LAYERS), acknowledge)
    except CheckpointError as error:
        acknowledge(f"error: {error}")
        return FAILED
    return 0


def serve() -> None:
    """Fork a child for each line of standard input; report its pid, output and exit code."""
    torch.set_num_threads(1)
    gc.freeze()  # or a collection in a child copies the heap, for most of the child's life
    for line in sys.stdin:
        number = os.fork()
        if number == 0:
            code = 1
            try:
                code = child(json.loads(line), lambda text: say("says", text))
            finally:
                os._exit(code)
        say("pid", number)
        _, status = os.waitpid(number, 0)
        say("end", os.waitstatus_to_exitcode(status))


def say(kind: str, value: Any) -> None:
    """Write one line at once, so that a kill cannot tear it."""
    os.write(1, (json.dumps([kind, value]) + "\n").encode())


class Server:
    """Handle of the forking process; a context manager."""

    def __enter__(self) -> Server:
        environment = {**os.environ, "PYTHONPATH": str(Path(fs.__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def start(self, **task: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**task, "path": str(task["path"])}) + "\n")
        self.process.stdin.flush()
        self.messages: list[str] = []
        self.pid = 0

    def next(self) -> tuple[str, Any]:
        assert self.process.stdout is not None
        kind, value = json.loads(self.process.stdout.readline())
        if kind == "says":
            self.messages.append(value)
        elif kind == "pid":
            self.pid = value
        return kind, value

    def wait(self) -> int:
        """Wait for the child's end and return its exit code, -9 after SIGKILL."""
        while True:
            kind, value = self.next()
            if kind == "end":
                return int(value)

    def run(self, **task: Any) -> int:
        self.start(**task)
        return self.wait()

    def kill_after(self, seconds: float, **task: Any) -> int:
        """Start a child and kill it after so many seconds, unless it ends first."""
        self.start(**task)
        while not self.pid:
            self.next()
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


# ---- kills ---------------------------------------------------------------------------------------


def kills(count: int, folder: Path, *, layers: int = LAYERS, seed: int = 0) -> dict[str, Any]:
    """Kill children at random moments until ``count`` have been killed, and count the losses.

    Each run is completed, by as many children as it takes.
    """
    generator = random.Random(seed)
    counts = {
        "kills": 0,
        "children": 0,
        "runs completed": 0,
        "acknowledged": 0,
        "lost": 0,
        "damaged": 0,
        "other bytes than undisturbed": 0,
        "temporary files to clean": 0,
    }
    begin = time.perf_counter()
    with Server() as server:
        for name in ("undisturbed", "timed"):  # the first one waits for the server's imports
            start = time.perf_counter()
            if server.run(path=folder / name, layers=layers) != 0:
                raise SystemExit(f"an undisturbed run failed: {server.messages[-1:]}")
            whole = time.perf_counter() - start
        right = files(folder / "undisturbed")
        path, acknowledged = folder / "run", list[str]()
        while counts["kills"] < count:
            code = server.kill_after(generator.uniform(0, 0.6 * whole), path=path, layers=layers)
            counts["children"] += 1
            counts["acknowledged"] += len(server.messages)
            acknowledged += server.messages
            lost, damaged = acknowledged_are_there(path, acknowledged)
            counts["lost"] += lost
            counts["damaged"] += damaged
            counts["temporary files to clean"] += len(list(path.rglob(".*.tmp")))
            if code == -signal.SIGKILL:
                counts["kills"] += 1
            elif code == 0:
                counts["runs completed"] += 1
                counts["other bytes than undisturbed"] += files(path) != right
                shutil.rmtree(path)
                acknowledged.clear()
            else:
                raise SystemExit(f"a child ended with {code}: {server.messages[-1:]}")
    counts["seconds"] = round(time.perf_counter() - begin, 1)
    return counts


def finish(counts: Mapping[str, Any], losses: Sequence[str], out: Path | None) -> None:
    """Print and write the counts, and end with an error if any of ``losses`` is not zero."""
    for name, value in counts.items():
        print(f"{name:40}{value}")
    if out:
        out.write_text(json.dumps(counts, indent=1) + "\n")
    if any(counts[name] for name in losses):
        raise SystemExit("something was lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        counts = kills(arguments.kills, Path(folder), layers=arguments.layers)
    finish(counts, ("lost", "damaged", "other bytes than undisturbed"), arguments.out)


if __name__ == "__main__":
    main()
