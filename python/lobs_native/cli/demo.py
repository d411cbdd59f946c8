"""``lobs-native demo``: train a small network on real digits, prune it six ways, and compare.

The data are scikit-learn's handwritten digits (1797 images of 8 x 8, from the UCI repository). The
network has the shape of LeNet-300-100. Every method gets the same calibration: the training inputs
without their labels. Nothing is retrained after pruning.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lobs_native.cli import digits
from lobs_native.cli.demo_picture import png
from lobs_native.errors import CheckpointError, LobsError
from lobs_native.files.atomic import write_file
from lobs_native.network.pruner import prune
from lobs_native.report.charts import Curve
from lobs_native.report.html import demo_page
from lobs_native.report.report import Report

__all__ = ["Comparison", "Run", "check_extra", "check_folder", "compare", "save", "table"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SCOPES = {  # each method as published; the last two with the default of prune()
    "magnitude": "layer",
    "wanda": "row",
    "lobs": "layer",
    "sweep": "layer",
    "exact": "layer",
    "admm": "layer",
}
SHOWN_IN_FULL = ("exact", 0.8)
SEED = 0
EPOCHS = 30
LEGEND = (
    "before, after: test error. fc1 to fc3: error of the layer's output relative to that output, "
    "both squared. output: distance of the network's output from the original one. spectral, "
    "Frobenius: the bounds that theorem 3.2 gives for this distance with either norm."
)
_MISSING = 'the demo needs scikit-learn and matplotlib: pip install "lobs-native[demo]"'


@dataclass(frozen=True)
class Run:
    """One pruned copy of the network. Errors before and after are fractions of the test images."""

    method: str
    scope: str
    sparsity: float  # requested of every layer
    sparsity_reached: float
    error_before: float
    error_after: float
    relative_errors: dict[str, float]  # by layer, of its output on the calibration inputs
    measured: float | None  # distance of the network's output from the original one
    spectral: float | None  # bounds on it
    frobenius: float | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns."""

    runs: tuple[Run, ...]
    report: Report  # of the run that SHOWN_IN_FULL names
    facts: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        runs = [dataclasses.asdict(run) for run in self.runs]
        return {
            "format": 1,
            "facts": self.facts,
            "runs": runs,
            "report": self.report.to_dict(),
            "seconds": self.seconds,
        }


def compare(*, progress: bool = True) -> Comparison:
    """Train the network, and prune copies of it by every method at every sparsity.

    Parameters
    ----------
    progress : bool
        Show progress bars on standard error, if that is a terminal.

    Returns
    -------
    Comparison
        The same for the same versions and machine type, except for the seconds. All work is done
        on one thread, whatever torch is set to.

    Raises
    ------
    LobsError
        scikit-learn or matplotlib is missing. Raised before any work is done.
    """
    start = time.perf_counter()
    check_extra()
    data = digits.load(SEED)
    requested = [(method, sparsity) for sparsity in SPARSITIES for method in SCOPES]
    with _one_thread():
        model = digits.train(data, epochs=EPOCHS, seed=SEED, progress=progress)
        bar = tqdm(requested, "prune", disable=None if progress else True)
        done = [_run(model, data, method, sparsity) for method, sparsity in bar]
    runs = tuple(run for run, _ in done)
    shown = done[requested.index(SHOWN_IN_FULL)][1]
    return Comparison(runs, shown, _facts(data, runs[0]), time.perf_counter() - start)


def save(result: Comparison, out: str | os.PathLike[str]) -> list[Path]:
    """Write ``demo.json``, ``report.html`` and ``demo.png`` into the folder, each atomically.

    Returns their paths. Raises CheckpointError, which names the file that could not be written.
    """
    folder = Path(out)
    curves = _curves(result.runs)
    before = result.runs[0].error_before
    method, sparsity = SHOWN_IN_FULL
    page = demo_page(
        facts=result.facts,
        header=_header(result),
        rows=[_cells(run) for run in result.runs],
        legend=LEGEND,
        curves=curves,
        before=before,
        report=result.report,
        report_title=f"One run in full: {method} at sparsity {sparsity:g}",
    )
    return [
        write_file(
            folder / "demo.json", json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
        ),
        write_file(folder / "report.html", page),
        write_file(folder / "demo.png", png(curves, before)),
    ]


def table(result: Comparison) -> str:
    """The comparison as lines of text with aligned columns, and a legend."""
    lines = [_header(result), *(_cells(run) for run in result.runs)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = []
    for k, line in enumerate(lines):
        if k % len(SCOPES) == 1:
            text.append("")  # a gap before each sparsity
        cells = (c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        text.append("  ".join([line[0].ljust(widths[0]), *cells]))
    return "\n".join([*text, "", *textwrap.wrap(LEGEND, sum(widths) + 2 * len(widths) - 2)])


# ---- the work ------------------------------------------------------------------------------------


def check_extra() -> None:
    """Raise LobsError, with the command to run, if scikit-learn or matplotlib does not import."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets
        import sklearn.model_selection  # noqa: F401
    except ImportError as error:
        raise LobsError(f"{_MISSING} ({error})") from error


def check_folder(out: str | os.PathLike[str]) -> None:
    """Create the folder ``out``, or raise CheckpointError now rather than after all the work."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"out: cannot create the folder {os.fspath(out)!r}: {error}"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise CheckpointError(f"out: no permission to write into {os.fspath(out)!r}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Work on one thread. The layers are so small that a second one costs more than it gains: with
    another program on the same cores, training takes ten times as long on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    model: nn.Sequential, data: digits.Digits, method: str, sparsity: float
) -> tuple[Run, Report]:
    pruned = copy.deepcopy(model)
    report = prune(
        pruned,
        [data.train_x],
        sparsity=sparsity,
        method=method,
        scope=SCOPES[method],
        inputs="dense",  # the paper's choice, and what its theorem is about
        progress=False,
        seed=SEED,
    )
    run = Run(
        method=method,
        scope=SCOPES[method],
        sparsity=sparsity,
        sparsity_reached=report.sparsity,
        error_before=digits.test_error(model, data),
        error_after=digits.test_error(pruned, data),
        relative_errors={layer.name: layer.relative_error for layer in report.layers},
        measured=report.error_bound.measured,
        spectral=report.error_bound.spectral,
        frobenius=report.error_bound.frobenius,
        seconds=report.seconds,
    )
    return run, report


# ---- what is shown -------------------------------------------------------------------------------


def _facts(data: digits.Digits, run: Run) -> dict[str, str]:
    return {
        "Data": "handwritten digits of scikit-learn, 8 × 8 pixels in [0, 1]: "
        f"{len(data.train_x)} to train on, {len(data.test_x)} to test on",
        "Network": f"64-300-100-10, ReLU; trained for {EPOCHS} epochs, "
        f"test error {100 * run.error_before:.1f} %",
        "Pruning": "every layer to the same sparsity, calibrated on the training inputs without "
        "their labels; no retraining",
        "magnitude": "removes the smallest weights of the layer",
        "wanda": "removes the smallest products of weight and input norm in each row (Sun et al. "
        "2024)",
        "lobs": "layer-wise optimal brain surgeon (Dong, Chen & Pan 2017): removes the weights "
        "that increase the layer's output error least, all ranked once; the remaining weights "
        "compensate",
        "sweep": "prunes the columns from left to right; the remaining weights compensate after "
        "each (SparseGPT, Frantar & Alistarh 2023)",
        "exact": "optimal brain surgeon in its original form (Hassibi & Stork 1993): every cost is "
        "recomputed after each removal",
        "admm": "alternates between the best weights near a sparse matrix and the sparse matrix "
        "nearest to them (Boza 2024; ALPS, Meng et al. 2024), measured by the costs of exact",
        "Note": "one network and one seed, nothing tuned; at 80 % sparsity and above, another seed "
        "moves the errors by several points and may change the order of the methods",
    }


def _header(result: Comparison) -> list[str]:
    layers = [f"{name} rel." for name in result.runs[0].relative_errors]
    return [
        "method",
        "sparsity",
        "before %",
        "after %",
        *layers,
        "output",
        "spectral",
        "Frobenius",
        "seconds",
    ]


def _cells(run: Run) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:#.3g}".rstrip(".")

    return [
        run.method,
        f"{run.sparsity:.2f}",
        f"{100 * run.error_before:.1f}",
        f"{100 * run.error_after:.1f}",
        *(f"{error:.4f}" for error in run.relative_errors.values()),
        number(run.measured),
        number(run.spectral),
        number(run.frobenius),
        f"{run.seconds:.2f}",
    ]


def _curves(runs: Sequence[Run]) -> list[Curve]:
    return [
        Curve(method, tuple((r.sparsity, r.error_after) for r in runs if r.method == method))
        for method in SCOPES
    ]
