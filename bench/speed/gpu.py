"""Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benches, one table.

    python bench/speed/gpu.py [--out FOLDER] [--rehearse]

Needs torch, numpy, safetensors, tqdm, pytest (pytest-benchmark, hypothesis), nvcc, cmake, ninja and
pybind11, no network, and under ten minutes. It builds the package for this machine's own
architecture into a temporary folder, so that nothing installed is touched. Every step has a time
limit. Its outcome is in the JSON file, which is written after each step. ``--rehearse`` takes the
same steps on the host with the emulated kernels at toy sizes: it checks this script and measures
nothing.

Times are those of CUDA events, after a warm-up, with both sides interleaved; medians. Answers are
checked in the same run. Bytes and flops are those of the contracts in ``csrc/``, compared with a
copy and two matrix products that are measured just before on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from speed.gpu_steps import LIMIT, ROOT, SCRIPT, build, sanitize, step

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def about(rehearse: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    circumstances = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or os.environ.get("LOBS_COMMIT", "unknown"),
        "device": "host, emulated: no measurement" if rehearse else torch.cuda.get_device_name(),
    }
    if not rehearse:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        circumstances["driver"] = driver.stdout.strip()
        circumstances["cuda"] = torch.version.cuda or ""
    return circumstances


def main() -> None:
    """Carry out the steps, and write the JSON after each."""
    parser = argparse.ArgumentParser(description="Build, test, sanitize and measure on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--rehearse", action="store_true", help="on the host, emulated, toy sizes")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bench", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exercise:
        from speed.gpu_exercise import exercise  # which needs the package that is built first
        from speed.gpu_place import Place

        exercise(Place(arguments.rehearse))
        return
    if arguments.bench:
        from speed.gpu_place import Place
        from speed.gpu_table import bench

        bench(Place(arguments.rehearse), arguments.bench)
        return
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure (--rehearse checks this script)")

    result: dict[str, Any] = {"about": about(arguments.rehearse)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / ("gpu-rehearsal.json" if arguments.rehearse else "gpu.json")

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = {k: v for k, v in value.items() if k != "text"}
        file.write_text(json.dumps(result, indent=1) + "\n")

    own = [sys.executable, str(SCRIPT)]
    with tempfile.TemporaryDirectory() as folder:
        env: dict[str, str] = {}
        if arguments.rehearse:
            own.append("--rehearse")
            sys.path.insert(0, str(ROOT / "tests"))
            from helpers.emulated import build as build_emulated

            cache = Path(os.environ.get("LOBS_EMULATED_CACHE") or folder)
            env = {"LOBS_EMULATED": str(build_emulated(cache))}
        else:
            outcome, site = build(Path(folder), env)
            keep("build", outcome)
            if outcome["exit"] != 0:
                raise SystemExit(1)
            env = {"PYTHONPATH": str(site)}
        keep("exercise", step("exercise", [*own, "--exercise"], LIMIT["exercise"], env))
        bench_file = Path(folder) / "bench.json"
        measured = step("bench", [*own, "--bench", str(bench_file)], LIMIT["bench"], env)
        if bench_file.is_file():
            measured["table"] = json.loads(bench_file.read_text())
        keep("bench", measured)
        if not arguments.rehearse:
            gpu = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
            keep("tests", step("tests", gpu, LIMIT["tests"], env))
            for tool in TOOLS:
                keep(tool, sanitize(tool, env))
    ends = {name: value.get("exit") for name, value in result.items() if name != "about"}
    print(json.dumps({**result["about"], "exits": ends}))
    print(f"written: {file.name}")
    if any(code != 0 for code in ends.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
