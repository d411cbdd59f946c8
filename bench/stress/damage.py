"""A real run, damaged: is every flipped bit and every cut found, named, and repaired on request?

    python bench/stress/damage.py [--places 1000] [--out FILE]

LeNet-300-100 is pruned with a run directory and stopped after its second layer, with sums of the
third one's inputs kept. Then each file of the run has one bit flipped, and in turn is cut, at so
many random places. Looking at the run must name the file or refuse it by name; repairing must leave
a run without problems; and a few of the repaired runs are gone on with, to the bytes of a run that
nobody disturbed.
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
from lobs_native.rundir import ledger
from lobs_native.rundir.directory import HEADER, LOCK, MANIFEST, RunDirectory
from lobs_native.rundir.underway import StoppedError, UnderWay, stop
from quality import lenet
from stress.crash import finish

GONE_ON_WITH = 3  # repaired runs of each file and kind of damage


def prune(run: Path | None) -> nn.Module:
    """The network, pruned; from where a run is."""
    model = lenet.network()
    batches = lenet.mnist().part(0, lenet.CALIBRATION).batches()
    lobs.prune(model, batches, sparsity=0.9, run_dir=run, progress=False)
    return model


def unfinished(run: Path) -> None:
    """Begin a run and stop it while it calibrates the third layer, with its sums kept."""

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
    """With one bit flipped, or the end cut off."""
    place = generator.randrange(len(data))
    if how == "cut":
        return data[:place]
    changed = bytearray(data)
    changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def look(run: Path) -> list[str]:
    """What is wrong with a run, or why it is refused; nothing if it is whole."""
    try:
        return [str(problem) for problem in ledger.inspect(run)["problems"]]
    except CheckpointError as error:
        return [str(error)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = damage(Path(folder), arguments.places)
    losses = ("not found", "not named", "not repaired", "other bytes than undisturbed")
    finish(found, losses, arguments.out)


def damage(folder: Path, places: int) -> dict[str, Any]:
    """Each file, each kind of damage, at so many places."""
    generator, begun = random.Random(0), time.perf_counter()
    right = save(prune(None).state_dict())
    run = folder / "run"
    unfinished(run)
    files = [p.relative_to(run) for p in sorted(run.rglob("*")) if p.is_file() and p.name != LOCK]
    found: dict[str, Any] = {
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
                check(run, str(file), found, folder, right if k < GONE_ON_WITH else None)
                (run / file).write_bytes(whole)
    found["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def check(run: Path, file: str, found: dict[str, Any], folder: Path, right: bytes | None) -> None:
    """One damaged run: looked at, repaired in a copy, and gone on with if ``right`` is given."""
    found["damaged"] += 1
    said = look(run)
    found["not found"] += not said
    # A manifest that ends early at a line's end is a right one: the layers that it lacks tell.
    lacking = [line for line in said if file == MANIFEST and "is not in the manifest" in line]
    found["not named"] += not (lacking or any(file in line for line in said))
    copy = folder / "copy"
    shutil.copytree(run, copy)
    try:
        RunDirectory.open(copy, write=True, repair=True).close()
    except CheckpointError as error:
        found["refused for good (run.json)"] += file == HEADER and HEADER in str(error)
        found["not repaired"] += file != HEADER
    else:
        found["repaired"] += 1
        found["not repaired"] += look(copy) != []
        if right is not None:
            found["gone on with"] += 1
            found["other bytes than undisturbed"] += save(prune(copy).state_dict()) != right
    shutil.rmtree(copy)


if __name__ == "__main__":
    main()
