"""Kill a run in the middle, resume it, and compare it with a run that was never interrupted.

    python examples/resume.py

Takes some seconds. The run is killed once two of its six layers are in its run directory.
"""

import itertools
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import lobs_native as lobs


def pruned(run_dir: Path) -> tuple[nn.Module, lobs.Report]:
    """The same network, pruned with the same data, whenever it is called."""
    torch.manual_seed(0)
    sizes = (64, 320, 320, 320, 320, 320, 10)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    batches = [torch.rand(300, 64) for _ in range(4)]
    return model, lobs.prune(model, batches, sparsity=0.7, run_dir=run_dir, progress=False)


def layers_in(run_dir: Path) -> int:
    manifest = run_dir / "manifest.jsonl"  # a line for each finished layer
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        child = subprocess.Popen([sys.executable, __file__, str(folder)])
        while layers_in(folder) < 2 and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        print(
            f"killed: the run ended with code {child.wait()}, {layers_in(folder)} layers are kept"
        )

        resumed, report = pruned(folder)  # the same call again
        there = report.settings["resumed layers"]
        print(
            f"resumed: {there} of {len(report.layers)} layers were there, the rest was pruned now"
        )

        straight, _ = pruned(Path(scratch) / "another")
        pairs = zip(resumed.parameters(), straight.parameters(), strict=True)
        print(f"the same bits as an uninterrupted run: {all(torch.equal(*pair) for pair in pairs)}")


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else pruned(Path(sys.argv[1]))
