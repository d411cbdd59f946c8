"""Damaged runs: is every flipped bit and every cut detected, named, and repaired on request?

    python bench/stress/damage.py [--places 1000] [--out FILE]

LeNet-300-100 is pruned with a run directory and stopped after its second layer, with sums of the
third layer's inputs saved. Then each file of the run has one bit flipped, or is cut, at many
random places. An inspection must name the file, or refuse the run by name. A repair must leave a
run without problems. A few of the repaired runs are resumed, and must end with the bytes of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save
from torch import nn

import lobs_native as lobs
from lobs_native.errors import CheckpointError
from lobs_native.rundir import inspection, ledger
from lobs_native.rundir.directory import HEADER, LOCK, MANIFEST, RunDirectory
from lobs_native.rundir.underway import StoppedError, UnderWay, stop
from quality import lenet
from stress.crash import finish

RESUMED = 3  # repaired runs that are resumed, of each file and kind of damage


def prune(run: Path | None) -> nn.Module:
    """The pruned network, resumed if there is a run."""
    model = lenet.network()
    batches = lenet.mnist().part(0, lenet.CALIBRATION).batches()
    lobs.prune(model, batches, sparsity=0.9, inputs="pruned", run_dir=run, progress=False)
    return model


def unfinished(run: Path) -> None:
    """Start a run and stop it while it calibrates the third layer, with its sums saved."""

    class Stopping(UnderWay):
        def due(self, key: str, size: int) -> bool:
            if len(self.run.records) == 2:
                stop.set()
            return len(self.run.records) == 2

    ledger.UnderWay = Stopping  # type: ignore[misc]
    try:
        prune(run)
    except StoppedError:
        stop.clear()
    finally:
        ledger.UnderWay = UnderWay  # type: ignore[misc]


def damaged(data: bytes, how: str, generator: random.Random) -> bytes:
    """The content with one bit flipped, or with the end cut off."""
    place = generator.randrange(len(data))
    if how == "cut":
        return data[:place]
    changed = bytearray(data)
    changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def look(run: Path) -> list[str]:
    """The problems of a run, or why it is refused; empty if it is intact."""
    try:
        return [str(problem) for problem in inspection.inspect(run)["problems"]]
    except CheckpointError as error:
        return [str(error)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = damage(Path(folder), arguments.places)
    losses = ("not found", "not named", "not repaired", "other bytes than undisturbed")
    finish(counts, losses, arguments.out)


def damage(folder: Path, places: int) -> dict[str, Any]:
    """Damage each file in each way at ``places`` places."""
    generator, begun = random.Random(0), time.perf_counter()
    right = save(prune(None).state_dict())
    run = folder / "run"
    unfinished(run)
    files = [p.relative_to(run) for p in sorted(run.rglob("*")) if p.is_file() and p.name != LOCK]
    counts: dict[str, Any] = {
        "files": {str(file): (run / file).stat().st_size for file in files},
        "damaged": 0,
        "not found": 0,
        "not named": 0,
        "refused for good (run.json)": 0,
        "repaired": 0,
        "not repaired": 0,
        "gone on with": 0,
        "other bytes than undisturbed": 0,
    }
    for file in files:
        whole = (run / file).read_bytes()
        for how in ("flip", "cut"):
            for k in range(places):
                (run / file).write_bytes(damaged(whole, how, generator))
                check(run, str(file), counts, folder, right if k < RESUMED else None)
                (run / file).write_bytes(whole)
    counts["seconds"] = round(time.perf_counter() - begun, 1)
    return counts


def check(run: Path, file: str, counts: dict[str, Any], folder: Path, right: bytes | None) -> None:
    """Inspect one damaged run, repair a copy of it, and resume that if ``right`` is passed."""
    counts["damaged"] += 1
    problems = look(run)
    counts["not found"] += not problems
    # A manifest cut at the end of a line is valid: only the layers that it lacks show the damage.
    lacking = [line for line in problems if file == MANIFEST and "is not in the manifest" in line]
    counts["not named"] += not (lacking or any(file in line for line in problems))
    copy = folder / "copy"
    shutil.copytree(run, copy)
    try:
        RunDirectory.open(copy, write=True, repair=True).close()
    except CheckpointError as error:
        counts["refused for good (run.json)"] += file == HEADER and HEADER in str(error)
        counts["not repaired"] += file != HEADER
    else:
        counts["repaired"] += 1
        counts["not repaired"] += look(copy) != []
        if right is not None:
            counts["gone on with"] += 1
            counts["other bytes than undisturbed"] += save(prune(copy).state_dict()) != right
    shutil.rmtree(copy)


if __name__ == "__main__":
    main()
