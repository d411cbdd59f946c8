"""``lobs.prune`` under repeated kills: is every finished layer kept, and are the weights right?

    python bench/stress/crash_prune.py [--kills 20] [--network lenet] [--folder DIR] [--out FILE]

A child process prunes a network with a run directory, resuming where the last one stopped, and
prints a line after each committed layer. It is killed (SIGKILL) at a random moment. In the end the
weights must be those of an undisturbed run, bit for bit. "lenet" is the authors' LeNet-300-100 on
MNIST, as in ``bench/quality/lenet.py``; "chain" needs no data.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.network import pruning
from lobs_native.rundir import ledger
from quality import lenet
from stress.crash import acknowledged_are_there, finish
from stress.forks import Forks

RESULT = "pruned.safetensors"


def chain() -> tuple[nn.Module, Iterable[Tensor]]:
    """Ten small layers, for tests."""
    torch.manual_seed(0)
    layers = [part for _ in range(10) for part in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers), [torch.randn(64, 128) for _ in range(4)]


def released() -> tuple[nn.Module, Iterable[Tensor]]:
    """LeNet-300-100 and its calibration images."""
    return lenet.network(), lenet.mnist().part(0, lenet.CALIBRATION).batches()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Iterable[Tensor]]]] = {
    "chain": chain,
    "lenet": released,
}


# ---- the child -----------------------------------------------------------------------------------


class Acknowledging(ledger.Ledger):
    """Prints the name of each layer after its commit."""

    def keep(self, layer: Any, *rest: Any) -> None:
        super().keep(layer, *rest)
        print(layer.name, flush=True)


def child(network: str, folder: Path, kept: bool) -> None:
    """Prune, with a run directory if ``kept``, and write the weights."""
    torch.set_num_threads(1)
    pruning.Ledger = Acknowledging
    model, batches = NETWORKS[network]()
    print("begun", flush=True)
    run = folder / "run" if kept else None
    lobs.prune(
        model, batches, sparsity=0.8, scope="model", inputs="corrected", run_dir=run, progress=False
    )
    save_file(model.state_dict(), folder / RESULT)


CHILD = """
import sys
from pathlib import Path
from stress import crash_prune
network, folder, kept = sys.argv[1:]
crash_prune.child(network, Path(folder), bool(kept))
"""


def run_child(
    forks: Forks, network: str, folder: Path, *, kept: bool = True, seconds: float | None = None
) -> tuple[int, list[str], float]:
    """Start a child and kill it after so many seconds, unless it ends first.

    Returns its exit code, the layers it acknowledged, and its run time in seconds.
    """
    folder.mkdir(exist_ok=True)
    arguments = [network, str(folder), "kept" if kept else ""]
    process = forks.start(["-c", CHILD, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    if first != "begun\n":
        process.kill()
        raise SystemExit(f"a child printed {first!r} and ended with {process.wait()}")
    since = time.perf_counter()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    output, _ = process.communicate()
    # A kill may tear the last line.
    names = [line[:-1] for line in (output or "").splitlines(True) if line.endswith("\n")]
    return process.wait(), names, time.perf_counter() - since


# ---- kills ---------------------------------------------------------------------------------------


def kills(count: int, folder: Path, network: str, forks: Forks, *, seed: int = 0) -> dict[str, Any]:
    """Kill children at random moments until ``count`` have been killed, and count the losses.

    The last run is completed.
    """
    generator = random.Random(seed)
    counts = {
        "kills": 0,
        "runs completed": 0,
        "children with layers to go on from": 0,
        "layers acknowledged": 0,
        "layers lost": 0,
        "layers pruned twice": 0,
        "damaged files": 0,
        "other bytes than undisturbed": 0,
    }
    begun = time.perf_counter()
    code, _, whole = run_child(forks, network, folder / "undisturbed", kept=False)
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with {code}")
    right = (folder / "undisturbed" / RESULT).read_bytes()
    path, acknowledged = folder / "disturbed", list[str]()
    while counts["kills"] < count or path.exists():
        last = counts["kills"] >= count
        moment = None if last else generator.uniform(0, 0.8 * whole)
        code, names, _ = run_child(forks, network, path, seconds=moment)
        counts["children with layers to go on from"] += bool(acknowledged)
        counts["layers acknowledged"] += len(names)
        counts["layers pruned twice"] += len(set(names) & set(acknowledged))
        acknowledged += names
        lost, damaged = acknowledged_are_there(path / "run", acknowledged)
        counts["layers lost"] += lost
        counts["damaged files"] += damaged
        if code == -signal.SIGKILL:
            counts["kills"] += 1
        elif code == 0:
            counts["runs completed"] += 1
            counts["other bytes than undisturbed"] += (path / RESULT).read_bytes() != right
            shutil.rmtree(path)
            acknowledged.clear()
        else:
            raise SystemExit(f"a child ended with {code}")
    counts["seconds"] = round(time.perf_counter() - begun, 1)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--network", choices=NETWORKS, default="lenet")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Forks() as forks:
        forks.preload("stress.crash_prune")
        counts = kills(arguments.kills, Path(folder), arguments.network, forks)
    losses = ("layers lost", "damaged files", "other bytes than undisturbed")
    finish(counts, losses, arguments.out)


if __name__ == "__main__":
    main()
