"""Where method "admm" loses against "exact": single made-up layers at the edges of what it is for.

    python bench/quality/limits.py [--only FAMILY ...] [--seeds N] [--threads N] [--out FILE]

A layer's inputs are ReLU of mixed normal variables whose variances fall as 1 / k; its weights are
normal. Families: "sparsity" (up to 99 %), "rows" (fewer calibration rows than columns, each with
half of its error on other data), "rank" (inputs that are copies, or of few dimensions, with little
damping), "small" (a few rows or columns), "pattern" (1xB blocks and N:M), "depthwise" (a grouped
convolution, through ``lobs.prune``) and "width" (the CPU seconds by rows and columns). The table
shows, over the seeds, the geometric mean and the largest of admm's error / exact's, ``tr(dW H
dW^T)`` without the damping, of H of the calibration rows and of 8,192 other rows; and the CPU
seconds of one call of each, the shortest of the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lobs_native as lobs

Results = dict[str, dict[str, float]]  # by method, what is below: error, other, seconds
METHODS = ("exact", "admm")
OTHER_ROWS = 8192
NO_ERROR = 1e-12  # relative: nothing but rounding is left, and a ratio says nothing


class Case(NamedTuple):
    """One line of the table: a layer's shape and data, and what is asked of it."""

    family: str
    name: str
    R: int
    C: int
    rows: int  # of calibration
    settings: dict[str, Any]
    rank: int | None = None  # dimensions that the inputs have; None: all
    convolution: bool = False


def cases() -> Iterator[Case]:
    for s in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
        yield Case("sparsity", f"{s:.0%}", 128, 256, 4096, {"sparsity": s})
    for rows in (16, 64, 128, 256, 512, 1024):
        yield Case("rows", f"{rows} rows", 128, 256, rows, {"sparsity": 0.7})
    yield Case("rows", "64 rows, 2:4", 128, 256, 64, {"pattern": "2:4"})
    for rank in (16, 64, 128):
        for damping in (0.01, 1e-5):
            how = {"sparsity": 0.7, "damping": damping}
            name = f"rank {rank}, damping {damping:g}"
            yield Case("rank", name, 128, 256, 4096, how, rank)
    for R, C in ((1, 4), (1, 9), (1, 64), (4, 16), (10, 84), (16, 27), (20, 25), (64, 8), (512, 4)):
        for s in (0.5, 0.8):
            yield Case("small", f"{R} x {C}, {s:.0%}", R, C, 4096, {"sparsity": s})
        if C % 4 == 0:
            yield Case("small", f"{R} x {C}, 2:4", R, C, 4096, {"pattern": "2:4"})
    for pattern in ("1x2", "1x4", "1x8", "1x16"):
        for s in (0.5, 0.7, 0.9):
            how = {"pattern": pattern, "sparsity": s}
            yield Case("pattern", f"{pattern}, {s:.0%}", 128, 256, 4096, how)
    for pattern in ("1:4", "3:4", "4:8", "2:16"):
        yield Case("pattern", pattern, 128, 256, 4096, {"pattern": pattern})
    for s in (0.5, 0.7):
        yield Case("sparsity", f"row, {s:.0%}", 128, 256, 4096, {"sparsity": s, "scope": "row"})
    for channels in (8, 64):
        for s in (0.3, 0.5, 0.7, 0.9):
            name = f"{channels} channels 3 x 3, {s:.0%}"
            yield Case("depthwise", name, channels, 9, 256, {"sparsity": s}, convolution=True)
    for C in (64, 128, 256, 512, 1024):
        for R in (1, 8, 64, 256):
            yield Case("width", f"{R} x {C}, 70%", R, C, 2 * C, {"sparsity": 0.7})
    for R in (8, 64):
        yield Case("width", f"{R} x 1024, 2:4", R, 1024, 2048, {"pattern": "2:4"})


def inputs(case: Case, seed: int, rows: int) -> Tensor:
    """(rows, C) from the distribution of that seed; a different number of rows is other data."""
    shape = torch.Generator().manual_seed(seed)
    rank = case.rank or case.C
    mix = torch.randn(case.C, case.C, generator=shape, dtype=torch.float64)
    mix *= torch.arange(1, case.C + 1)[:, None] ** -0.5
    data = torch.Generator().manual_seed(1000 * seed + rows)
    z = torch.randn(rows, rank, generator=data, dtype=torch.float64)
    mixed = z @ mix[:rank]
    return mixed if case.rank else mixed.relu()  # ReLU would give it all dimensions again


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error(W: Tensor, pruned: Tensor, H: Tensor) -> float:
    """Relative, in float64."""
    W, change = W.double(), (pruned - W).double()
    return float(((change @ H) * change).sum() / ((W @ H) * W).sum())


def measure(case: Case, seed: int) -> Results:
    """Errors and CPU seconds of both methods on one layer."""
    W = torch.randn(case.R, case.C, generator=torch.Generator().manual_seed(seed + 500))
    H = second_moment(inputs(case, seed, case.rows))
    other = second_moment(inputs(case, seed, OTHER_ROWS))
    results: Results = {}
    for method in METHODS:
        begun = time.process_time()
        pruned = lobs.prune_weight(W, H, method=method, **case.settings).weight
        seconds = time.process_time() - begun
        results[method] = {
            "error": error(W, pruned, H), "other": error(W, pruned, other), "seconds": seconds,
        }  # fmt: skip
    return results


def measure_convolution(case: Case, seed: int) -> Results:
    """Likewise, of a depthwise convolution of smooth images; there is no other data."""
    torch.manual_seed(seed)
    images = nn.functional.avg_pool2d(
        torch.randn(case.rows, case.R, 18, 18), 5, 1
    )  # (N, R, 14, 14)
    results: Results = {}
    for method in METHODS:
        torch.manual_seed(seed + 500)
        model = nn.Sequential(nn.Conv2d(case.R, case.R, 3, groups=case.R))
        begun = time.process_time()
        report = lobs.prune(model, [images], method=method, progress=False, **case.settings)
        seconds = time.process_time() - begun
        e = report.layers[0].relative_error
        results[method] = {"error": e, "other": e, "seconds": seconds}
    return results


def summary(results: Sequence[Results]) -> dict[str, Any]:
    """Over the seeds."""

    def ratios(key: str) -> list[float]:
        pairs = [(r["admm"][key], r["exact"][key]) for r in results]
        return [a / e for a, e in pairs if e > NO_ERROR and a > NO_ERROR]

    own, other = ratios("error"), ratios("other")
    return {
        "exact": statistics.fmean(r["exact"]["error"] for r in results),
        "admm / exact": geometric_mean(own),
        "largest": max(own, default=None),
        "on other data": geometric_mean(other),
        "exact, CPU s": min(r["exact"]["seconds"] for r in results),
        "admm, CPU s": min(r["admm"]["seconds"] for r in results),
    }


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def table_line(case: Case, means: dict[str, Any]) -> str:
    cells = ["-" if x is None else f"{x:.4g}" for x in means.values()]
    return "| " + " | ".join([case.family, case.name, *cells]) + " |"


def main() -> None:
    """Print the table as it goes."""
    parser = argparse.ArgumentParser(description='Where "admm" loses against "exact".')
    families = list(dict.fromkeys(case.family for case in cases()))
    parser.add_argument("--only", nargs="+", choices=families, default=families)
    parser.add_argument("--seeds", type=int, default=3, help="layers for each line, default 3")
    parser.add_argument("--threads", type=int, help="default torch's")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for case in cases():
        if case.family not in arguments.only:
            continue
        seen = measure_convolution if case.convolution else measure
        means = summary([seen(case, seed) for seed in range(arguments.seeds)])
        if not rows:
            heads = ["family", "layer", *means]
            print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
        rows.append({"family": case.family, "layer": case.name, **means})
        print(table_line(case, means), flush=True)
    if arguments.out:
        about: dict[str, Any] = {"torch": str(torch.__version__), "lobs_native": lobs.__version__}
        about |= {"threads": torch.get_num_threads(), "seeds": arguments.seeds}
        arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
