"""A run on several ranks, one of which is killed again and again: are layers lost, bits wrong, or
ranks left hanging?

    python bench/ranks/kills.py [--kills 50] [--out FILE]

Each start has two, three or four ranks and goes on with the run directory of the last one. A rank
chosen at random gets SIGKILL at a random moment after all have joined (until then it is torch that
waits). The others must end by themselves, with a RankError. When a run is complete, its network
must have the bits of one process; then the next begins.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.rundir.directory import RunDirectory
from ranks.group import joined, keep
from stress.forks import Forks, Process

LOST, HANGS = 75, 60.0  # exit code of a rank that lost another; seconds after which it hangs


def network() -> tuple[nn.Module, list[Tensor]]:
    """Ten layers and twelve batches."""
    torch.manual_seed(0)
    layers = [part for _ in range(10) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers), [torch.randn(64, 64) for _ in range(12)]


def child(folder: Path, rank: int, size: int, together: str) -> int:
    """One rank; the first writes the network at the end."""
    torch.set_num_threads(1)
    model, data = network()
    options: dict[str, Any] = {"sparsity": 0.5, "progress": False}
    if size == 0:
        lobs.prune(model, data, **options)
        save_file(model.state_dict(), folder / "right.safetensors")
        return 0
    try:
        group = joined(together, rank, size, HANGS)
    except RuntimeError:
        return LOST
    Path(f"{together}-{rank}").touch()
    try:
        lobs.prune(model, data, run_dir=folder / "run", group=group, **options)
    except lobs.RankError:
        return LOST
    if rank == 0:
        save_file(model.state_dict(), folder / "found.safetensors")
    return 0


def committed(folder: Path) -> int:
    """Layers in the run directory. CheckpointError if it is damaged."""
    if not (folder / "run" / "run.json").exists():
        return 0
    with RunDirectory.open(folder / "run", write=False) as run:
        assert run.check() == []
        return len(run.records)


def ended(processes: list[Process]) -> list[int | None]:
    """The exit codes; None for one that had to be ended."""
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(2 * HANGS))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(None)
    return codes


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, rank, size, together = sys.argv[2:]
        sys.exit(child(Path(folder), int(rank), int(size), together))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    names = (
        "kills",
        "starts",
        "runs completed",
        "layers kept",
        "layers lost",
        "wrong bits",
        "hangs",
    )
    counts = dict.fromkeys((*names, "other exit codes"), 0)
    with tempfile.TemporaryDirectory() as place, Forks() as forks:
        folder = Path(place)
        forks.run([__file__, "--child", place, "0", "0", "none"], check=True)
        right = load_file(folder / "right.safetensors")
        before, seconds = 0, 3.0
        while counts["kills"] < arguments.kills:
            size = draw.choice([2, 3, 4])
            together = str(folder / f"together{counts['starts']}")
            running = [
                forks.start(
                    [__file__, "--child", place, rank, size, together], stderr=subprocess.DEVNULL
                )
                for rank in range(size)
            ]
            counts["starts"] += 1
            while not all(Path(f"{together}-{rank}").exists() for rank in range(size)):
                time.sleep(0.01)
            begun = time.monotonic()
            victim, moment = draw.randrange(size), draw.uniform(0.0, 1.0) * seconds
            while time.monotonic() < begun + moment and running[victim].poll() is None:
                time.sleep(0.01)
            running[victim].kill()
            codes = ended(running)
            counts["kills"] += codes[victim] == -9
            counts["hangs"] += codes.count(None)
            known = {0, LOST, None, *([-9] if codes[victim] == -9 else [])}
            counts["other exit codes"] += sum(code not in known for code in codes)
            now = committed(folder)
            counts["layers kept"] += max(0, now - before)
            counts["layers lost"] += max(0, before - now)
            before = now
            if codes[0] == 0:
                seconds = time.monotonic() - begun
                found = load_file(folder / "found.safetensors")
                wrong = any(not torch.equal(found[k], x) for k, x in right.items())
                counts["wrong bits"] += wrong
                counts["runs completed"] += 1
                shutil.rmtree(folder / "run")
                (folder / "found.safetensors").unlink()
                before = 0
    print(json.dumps(counts, indent=1))
    if arguments.out:
        keep(arguments.out, "kills", counts)


if __name__ == "__main__":
    main()
