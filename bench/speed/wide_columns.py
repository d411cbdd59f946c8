"""What it costs to choose and repair the inputs of a layer of a large language model.

    python bench/speed/wide_columns.py [--rows N] [--columns N] [--share S ...] [--exact N]
        [--threads N] [--out FILE]

A feed-forward layer's weight of 4096 x 11008, of which a share of the input columns goes, with
exact costs and exact repair for all rows; against the removal of as large a share of single
weights, by the exact kernel, from 8 of its rows. Both begin with the same inverse, whose seconds
are a row of their own. The repair is with the damping asked for; where samples are few, every
further damping that is tried takes as long again. CPU seconds of one run each: with one thread,
other programs disturb them least. The second moment is that of random inputs. Takes about 5 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.files.atomic import write_file
from lobs_native.solvers.inversion import invert
from lobs_native.solvers.kept_columns import regressed
from speed import shapes

SAMPLES = 4096  # of which the second moment is, a few at a time
AT_ONCE = 512


def second_moment(columns: int) -> Tensor:
    """(C, C) float64, of correlated inputs."""
    hessian = lobs.Hessian(columns)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 8, columns, generator=generator) / (columns // 8) ** 0.5
    for _ in range(SAMPLES // AT_ONCE):
        signal = torch.randn(AT_ONCE, columns // 8, generator=generator) @ mixing
        noise = torch.randn(AT_ONCE, columns, generator=generator)
        hessian.update(signal.add_(noise, alpha=0.5).relu_())
    return hessian.matrix()


class Stages:
    """CPU seconds of parts that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.process_time()

    def done(self, name: str) -> None:
        """The part since the last call was this."""
        now = time.process_time()
        self.seconds[name] = now - self._begun
        self._begun = now
        print(f"| {name} | {self.seconds[name]:.1f} |", flush=True)


def main() -> None:
    """Print the seconds of every stage, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    help_ = "of the columns, rising; default 0.25 0.5"
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5], help=help_)
    parser.add_argument("--exact", type=int, default=8, help="rows of single weights; default 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    R, C = arguments.rows, arguments.columns
    H = second_moment(C)
    W = shapes.weights(shapes.LayerShape("layer", R, C))
    print("| stage | CPU s |\n| --- | --- |")
    stages = Stages()
    inverse = invert(H, shapes.DAMPING, "H")
    A = inverse.A
    stages.done("inverse")
    # Larger shares go on from smaller ones, so that each takes what the rows before it took, too.
    trace = ops.columns_trace([ops.ColumnLayer(W.double(), A, torch.arange(C + 1))], 0)
    for share in arguments.share:
        trace.extend(round(share * C))
        stages.done(f"{share:.0%} of the columns chosen")
        removed = torch.zeros(C, dtype=torch.bool)
        removed[trace.order] = True
        shift = shapes.DAMPING * float(H.diagonal().mean())
        found = regressed(H, W[:, removed].double(), removed, shift, math.inf)
        assert found is not None
        stages.done(f"{share:.0%} of the columns repaired in all rows")
        del found
    del trace, H
    for share in arguments.share:
        w = W[: arguments.exact].clone()
        ops.exact_trace(w, A.float(), limit=round(share * C), update=True)
        stages.done(f"{share:.0%} of the weights of {len(w)} rows chosen and repaired, exact")
    if arguments.out:
        about: dict[str, Any] = {"torch": torch.__version__, "lobs_native": lobs.__version__}
        about |= {"threads": arguments.threads, "rows": R, "columns": C, "samples": SAMPLES}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        about |= {"peak bytes": peak, "seconds": stages.seconds}
        write_file(arguments.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
