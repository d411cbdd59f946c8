"""The command line: ``python bench/quality/llm [options]``; see the package."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a folder: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import transformers

from lobs_native.version import versions
from quality.encoder import TEXT
from quality.llm.job import METHODS, OURS
from quality.llm.material import TARGETS, make_folder
from quality.llm.rivals import PRODUCT, RIVALS
from speed.paired import machine

BLOCKS, TOKENS, MEASURED = 30, 16_384, 128
USUAL = ("sparsegpt", "default", "wanda", "magnitude", "alps")  # without --only, in this order
FIRST = ("50%", "70%", "2:4", "60%")
HEAD = ("target", "method", "perplexity", "above dense, nats", "of SparseGPT's")
HEAD += ("less SparseGPT, nats", "CPU s", "MB")


def software(method: str, rivals: Path | None) -> dict[str, str]:
    """The versions that a case depends on."""
    found = {**versions(), "transformers": transformers.__version__}
    if method not in OURS:
        del found["lobs_native"]
    if method == PRODUCT:
        found["llmcompressor"] = importlib.metadata.version("llmcompressor")
    if method in RIVALS:
        assert rivals is not None
        folder = rivals / {"sparsegpt": "sparsegpt", "alps": "ALPS"}[method]
        words = ("git", "-C", str(folder), "rev-parse", "HEAD")
        found[method] = subprocess.run(
            words, check=True, capture_output=True, text=True
        ).stdout.strip()
    return found


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases in order, the original network first."""
    common = {
        "blocks": arguments.blocks,
        "tokens": arguments.tokens,
        "measured": arguments.measured,
    }
    yield {"method": "dense", "target": None, **common}
    chosen = arguments.only or USUAL
    for methods in (chosen[:2], chosen[2:]) if not arguments.only else (chosen,):
        for target in arguments.targets:
            for method in methods:
                if method not in RIVALS or arguments.rivals is not None:
                    yield {"method": method, "target": target, **common}


def run(case: Mapping[str, Any], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Its result, from a process with one thread."""
    words = [sys.executable, str(Path(__file__).with_name("job.py")), str(folder), json.dumps(case)]
    words += ["--text", str(arguments.text)]
    if arguments.rivals is not None:
        words += ["--rivals", str(arguments.rivals)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the table -----------------------------------------------------------------------------------


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean of the differences, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error


def line(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line of the markdown table."""

    def nats(method: str, target: str | None) -> Sequence[float] | None:
        case = {**row["case"], "method": method, "target": target}
        return next((r["nats"] for r in rows if r["case"] == case), None)

    case, own = row["case"], row["nats"]
    dense, other = nats("dense", None), nats("sparsegpt", case["target"])
    cells = [case["target"] or "", case["method"], f"{math.exp(statistics.fmean(own)):.2f}"]
    above = share = less = ""
    if case["target"] is not None and dense is not None:
        above = "{:.4f} ± {:.4f}".format(*paired(own, dense))
        if other is not None:
            share = f"{paired(own, dense)[0] / paired(other, dense)[0]:.2f}"
            less = "{:+.4f} ± {:.4f}".format(*paired(own, other))
    cells += [above, share, less, f"{row['cpu seconds']:.0f}"]
    cells.append("" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:.0f}")
    return "| " + " | ".join(cells) + " |"


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/quality/llm", description="A language model, pruned."
    )
    add = parser.add_argument
    add("--rivals", type=Path, help="folder with clones of sparsegpt and ALPS; without it: no such")
    add("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--targets", nargs="+", choices=TARGETS, default=FIRST, help="default: 50, 70, 60 %%, 2:4")
    add("--blocks", type=int, default=BLOCKS, help=f"default {BLOCKS}, all")
    add("--tokens", type=int, default=TOKENS, help=f"to calibrate on, default {TOKENS}")
    add("--measured", type=int, default=MEASURED, help=f"windows, default {MEASURED}")
    add("--text", type=Path, default=TEXT, help="whose halves are used")
    add("--folder", type=Path, help="where the model's folder is, or is to be kept")
    add("--out", type=Path, help="JSON file that keeps results")
    return parser.parse_args(words)


def main() -> None:
    """Run what is missing, and print the table as it goes."""
    arguments = arguments_of()
    rows: list[dict[str, Any]] = []
    if arguments.out and arguments.out.is_file():
        rows = json.loads(arguments.out.read_text())["rows"]
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    with tempfile.TemporaryDirectory(prefix="lobs-llm-") as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").is_file():
            make_folder(folder)
        for case in cases(arguments):
            about = software(case["method"], arguments.rivals)
            known = [r for r in rows if r["case"] == case and r["versions"] == about]
            if not known:
                here = {key: machine()[key] for key in ("cpu", "cores", "date", "load_at_start")}
                result = {"case": case, "versions": about, "machine": here}
                result |= run(case, folder, arguments)
                rows = [r for r in rows if r["case"] != case] + [result]
                known = [result]
                if arguments.out:
                    arguments.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(line(known[0], rows), flush=True)


if __name__ == "__main__":
    main()
