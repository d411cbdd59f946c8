"""Theorem 3.2 of the paper against real networks: is it ever violated, and how loose is it?

One hundred random chains (widths, depths, activations, sizes, inputs, methods and sparsities are
drawn) and the authors' LeNet-300-100. Each is pruned on the original network's inputs, as in the
theorem, and on the pruned network's, where the theorem holds with the norms of the original layers.
The bound is on the change of the output on the calibration inputs; the change on other inputs
stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lobs_native as lobs
from lobs_native.files.atomic import write_file
from paper import markdown as page
from paper.authors import Authors
from paper.networks import CALIBRATION
from paper.theorem.chains import ChainRun, chain_run, compared

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "theorem"
HELP = "Theorem 3.2 against measured errors: violations, and how loose it is"
STEM = "paper-theorem"
CHAINS, SHORT_CHAINS = 100, 20
INPUTS = ("dense", "pruned")
KEPT = (  # of fc1, fc2, fc3; the first is the paper's
    (0.067, 0.20, 0.65),
    (0.50, 0.50, 0.50),
    (0.20, 0.30, 0.70),
    (0.02, 0.06, 0.20),
)
METHODS = ("lobs", "exact", "magnitude")
_LAYERS = ("fc1", "fc2", "fc3")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this experiment; ``--seeds`` is the number of chains."""
    text = "folder with mnist/ and lenet300-100/; without it only the random chains are run"
    command.add_argument("--data", type=Path, metavar="DIR", help=text)


def run(options: argparse.Namespace) -> int:
    """Carry out the experiment and return the exit code: 1 if the theorem was violated."""
    count = options.seeds or (SHORT_CHAINS if options.short else CHAINS)
    chains = {inputs: [chain_run(seed, inputs) for seed in range(count)] for inputs in INPUTS}
    lenet = _lenet(Authors(options.data)) if options.data else []
    everything = [*itertools.chain(*chains.values()), *lenet]
    violated = [r for r in everything if r.violated]
    content = _page(chains, lenet, len(violated))
    numbers: dict[str, Any] = {
        "torch": str(torch.__version__),
        "lobs_native": lobs.__version__,
        "violated": len(violated),
        "runs": [dataclasses.asdict(r) for r in everything],
    }
    page.save(options.out, STEM, content, numbers)
    write_file(options.out / f"{STEM}.png", _picture(chains, lenet))
    print(content)
    return 1 if violated else 0


def _lenet(authors: Authors) -> list[ChainRun]:
    """The authors' network, in float64, calibrated on 5,000 images."""
    seen, other = authors.calibration[:CALIBRATION].double(), authors.tested.x.double()
    runs = []
    for kept, method, inputs in itertools.product(KEPT, METHODS, INPUTS):
        model = authors.network().double()
        with torch.no_grad():
            before = model(other)
        report = lobs.prune(
            model,
            list(seen.split(1000)),
            sparsity=0.5,
            method=method,
            inputs=inputs,
            overrides={n: {"sparsity": 1 - k} for n, k in zip(_LAYERS, kept, strict=True)},
            progress=False,
        )
        with torch.no_grad():
            elsewhere = float((model(other) - before).norm()) / math.sqrt(len(other))
        name = f"{' / '.join(f'{100 * k:g}' for k in kept)}"
        run = compared(name, report, inputs, elsewhere)
        runs.append(dataclasses.replace(run, widths=(784, 300, 100, 10)))
    return runs


# ---- page ----------------------------------------------------------------------------------------


def _page(chains: dict[str, list[ChainRun]], lenet: Sequence[ChainRun], violated: int) -> str:
    total = sum(map(len, chains.values())) + len(lenet)
    header = ["networks", "inputs", "violations", "measured / output", "spectral / measured"]
    header += ["Frobenius / measured", "Frobenius / spectral", "other inputs above the bound"]
    rows = [_summary(f"{len(runs)} random chains", runs) for runs in chains.values()]
    rows += [
        _summary(f"{depth} layers", [r for r in runs if len(r.widths) - 1 == depth])
        for runs in (chains["dense"],)
        for depth in sorted({len(r.widths) - 1 for r in runs})
    ]
    parts = [
        "# Theorem 3.2: how the bound compares with what happens\n",
        "Made by `python bench/paper theorem --data DIR`.\n",
        f"Violations in {total} pruned networks: **{violated}**.\n",
        "Medians, and the lowest and the highest in brackets; of the random chains in float64. "
        "measured: ||output - original||_F / sqrt(rows) on the calibration inputs, which the "
        "theorem is about; spectral and Frobenius: the bound with those norms of the later layers "
        "(the paper prints Frobenius). The last column counts networks whose output moved by more "
        "than the spectral bound on as many other inputs: the theorem promises nothing there.\n",
        page.table(header, rows),
        "The lines of one depth are those of the chains with inputs of the original network.\n",
        "![bound against measured error](paper-theorem.png)\n",
    ]
    if lenet:
        header = ["kept in fc1 / fc2 / fc3, %", "method", "inputs", "measured", "spectral"]
        header += ["Frobenius", "spectral / measured", "Frobenius / measured", "other inputs"]
        header += ["output"]
        parts += [
            "## LeNet-300-100 (the authors' weights), 5,000 images, damping 0.01\n",
            page.table(header, map(_lenet_row, lenet)),
        ]
    return "\n".join(parts)


def _summary(name: str, runs: Sequence[ChainRun]) -> list[str]:
    moved = [r for r in runs if r.measured > 0]

    def ratios(values: Sequence[float]) -> str:
        if not values:
            return "-"
        middle = statistics.median(values)
        return f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"

    return [
        name,
        runs[0].inputs,
        str(sum(r.violated for r in runs)),
        ratios([r.measured / r.output for r in moved]),
        ratios([r.spectral / r.measured for r in moved]),
        ratios([r.frobenius / r.measured for r in moved]),
        ratios([r.frobenius / r.spectral for r in moved]),
        str(sum(r.elsewhere > r.spectral for r in runs)),
    ]


def _lenet_row(run: ChainRun) -> list[str]:
    return [
        run.name,
        run.method,
        run.inputs,
        *(f"{x:.3g}" for x in (run.measured, run.spectral, run.frobenius)),
        f"{run.spectral / run.measured:.2f}",
        f"{run.frobenius / run.measured:.1f}",
        f"{run.elsewhere:.3g}",
        f"{run.output:.3g}",
    ]


def _picture(chains: dict[str, list[ChainRun]], lenet: Sequence[ChainRun]) -> bytes:
    """Bounds against measured errors, both relative to the output, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    random = [r for runs in chains.values() for r in runs if r.measured > 0]
    for runs, label, marks in (
        (random, "random chains", ("o", "x")),
        ([r for r in lenet if r.measured > 0], "LeNet-300-100", ("s", "+")),
    ):
        if not runs:
            continue
        across = [r.measured / r.output for r in runs]
        spectral, frobenius = ([getattr(r, n) / r.output for r in runs] for n in _BOUNDS)
        axes.plot(across, spectral, marks[0], markersize=4, alpha=0.7, label=f"{label}, spectral")
        axes.plot(across, frobenius, marks[1], markersize=4, alpha=0.7, label=f"{label}, Frobenius")
    ends = [f(r.measured / r.output for r in random) for f in (min, max)]
    axes.plot(ends, ends, "k-", linewidth=1, label="bound = measured")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured change of the output, relative to the output")
    axes.set_ylabel("bound of Theorem 3.2, the same")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


_BOUNDS = ("spectral", "frobenius")
