"""Run directories under repeated kills: is everything acknowledged still there, bit for bit?

    python bench/stress/crash.py [--kills 200] [--folder DIR] [--out FILE]

A child process writes a run of small layers, resuming where the last one stopped, and prints a line
after each commit. It is killed (SIGKILL) at a random moment. The report says how many acknowledged
layers were lost, how many files were damaged, and whether each completed run has the bytes of an
undisturbed one. The import of torch takes far longer than a child's work, so they are forked.
"""

from __future__ import annotations

import argparse
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

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from lobs_native.errors import CheckpointError
from lobs_native.files import fs
from lobs_native.rundir.directory import LOCK, RunDirectory
from stress.forks import Forks

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


def child(task: dict[str, Any]) -> int:
    """Carry out one run in this process and return its exit code. Prints a line for each message,
    at once, so that a kill cannot tear it."""

    def say(text: str) -> None:
        os.write(1, (json.dumps(text) + "\n").encode())

    torch.set_num_threads(1)
    if "exit_at" in task:
        fs.call = ExitAt(task["exit_at"])
    if "largest_file" in task:
        size = task["largest_file"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        if "hold" in task:
            with RunDirectory.open(Path(task["path"]), write=True):
                say("held")
                time.sleep(task["hold"])
        else:
            work(Path(task["path"]), task.get("layers", LAYERS), say)
    except CheckpointError as error:
        say(f"error: {error}")
        return FAILED
    return 0


CHILD = (
    "import json, os, sys; from stress import crash; os._exit(crash.child(json.loads(sys.argv[1])))"
)


class Child:
    """A started child. ``messages`` holds what it had said when it was last waited for."""

    def __init__(self, forks: Forks, **task: Any) -> None:
        task["path"] = str(task["path"])
        self.process = forks.start(["-c", CHILD, json.dumps(task)], stdout=subprocess.PIPE)
        self.pid = self.process.pid
        self.messages: list[str] = []

    def hear(self) -> str:
        """Wait for its next message."""
        assert self.process.stdout is not None
        self.messages.append(json.loads(self.process.stdout.readline()))
        return self.messages[-1]

    def wait(self) -> int:
        """Wait for its end and return its exit code, -9 after SIGKILL."""
        output, _ = self.process.communicate()
        self.messages += map(json.loads, (output or "").splitlines())
        return self.process.wait()

    def kill_after(self, seconds: float) -> int:
        """Kill it after so many seconds, unless it ends first."""
        time.sleep(seconds)
        self.process.kill()
        return self.wait()


# ---- kills ---------------------------------------------------------------------------------------


def kills(
    count: int, folder: Path, forks: Forks, *, layers: int = LAYERS, seed: int = 0
) -> dict[str, Any]:
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
    for name in ("undisturbed", "timed"):  # the first one waits for the imports
        start = time.perf_counter()
        first = Child(forks, path=folder / name, layers=layers)
        if first.wait() != 0:
            raise SystemExit(f"an undisturbed run failed: {first.messages[-1:]}")
        whole = time.perf_counter() - start
    right = files(folder / "undisturbed")
    path, acknowledged = folder / "run", list[str]()
    while counts["kills"] < count:
        started = Child(forks, path=path, layers=layers)
        code = started.kill_after(generator.uniform(0, 0.6 * whole))
        counts["children"] += 1
        counts["acknowledged"] += len(started.messages)
        acknowledged += started.messages
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
            raise SystemExit(f"a child ended with {code}: {started.messages[-1:]}")
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Forks() as forks:
        counts = kills(arguments.kills, Path(folder), forks, layers=arguments.layers)
    finish(counts, ("lost", "damaged", "other bytes than undisturbed"), arguments.out)


if __name__ == "__main__":
    main()
