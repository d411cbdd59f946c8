"""``lobs-native demo``: train a small network on real digits, prune it five ways, and compare.

The data are scikit-learn's handwritten digits (1797 images of 8 x 8, from the UCI repository), the
network has the shape of LeNet-300-100, and every method gets the same calibration: the training
inputs, without their labels. Nothing is retrained after pruning.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import textwrap
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lobs_native.errors import CheckpointError, LobsError
from lobs_native.files.atomic import write_file
from lobs_native.network.pruner import prune
from lobs_native.report.charts import Curve
from lobs_native.report.html import demo_page
from lobs_native.report.report import Report

__all__ = ["Comparison", "Run", "check_extra", "check_folder", "compare", "save", "table"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SCOPES = {  # each method as it was published; "exact" as prune() has it by default
    "magnitude": "layer",
    "wanda": "row",
    "lobs": "layer",
    "sweep": "layer",
    "exact": "layer",
}
SHOWN_IN_FULL = ("exact", 0.8)
TEST_SAMPLES = 500
SEED = 0
EPOCHS = 30
LEGEND = (
    "before, after: test error. fc1 to fc3: error of the layer's output relative to that output, "
    "both squared. output: distance of the network's output from the original one, and the bounds "
    "that theorem 3.2 gives for it with spectral and with Frobenius norms."
)
_MISSING = 'the demo needs scikit-learn and matplotlib: pip install "lobs-native[demo]"'


@dataclass(frozen=True)
class Run:
    """One pruned copy of the network. Test errors are fractions of the test images."""

    method: str
    scope: str
    sparsity: float  # asked, of every layer
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


@dataclass(frozen=True)
class _Digits:
    train_x: Tensor  # (1297, 64) float32 in [0, 1]
    train_y: Tensor  # (1297,) int64
    test_x: Tensor  # (500, 64)
    test_y: Tensor  # (500,)


def compare(*, progress: bool = True) -> Comparison:
    """Train the network and prune copies of it by every method at every sparsity.

    Parameters
    ----------
    progress : bool
        Show progress bars on standard error, if that is a terminal.

    Returns
    -------
    Comparison
        The same for the same versions and machine type, except for the seconds: it works on one
        thread, whatever torch is set to.

    Raises
    ------
    LobsError
        scikit-learn or matplotlib is missing; found before any work is done.
    """
    begun = time.perf_counter()
    check_extra()
    digits = _load()
    asked = [(method, sparsity) for sparsity in SPARSITIES for method in SCOPES]
    with _one_thread():
        model = _train(digits, progress)
        bar = tqdm(asked, "prune", disable=None if progress else True)
        done = [_run(model, digits, method, sparsity) for method, sparsity in bar]
    runs = tuple(run for run, _ in done)
    shown = done[asked.index(SHOWN_IN_FULL)][1]
    return Comparison(runs, shown, _facts(digits, runs[0]), time.perf_counter() - begun)


def save(result: Comparison, out: str | os.PathLike[str]) -> list[Path]:
    """Write ``demo.json``, ``report.html`` and ``demo.png`` into the folder ``out``, each whole or
    not at all. Returns their paths; CheckpointError names the file that could not be written."""
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
        write_file(folder / "demo.png", _picture(curves, before)),
    ]


def table(result: Comparison) -> str:
    """The comparison as lines of text, columns aligned, and what they mean."""
    lines = [_header(result), *(_cells(run) for run in result.runs)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = []
    for k, line in enumerate(lines):
        if k % len(SCOPES) == 1:
            text.append("")  # a gap before every sparsity
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
    """Make the folder ``out``, or raise CheckpointError now rather than when all work is done."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"out: {os.fspath(out)!r} cannot be made a folder: {error}"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise CheckpointError(f"out: no permission to write into {os.fspath(out)!r}")


def _load() -> _Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    parts = train_test_split(x / 16.0, y, test_size=TEST_SAMPLES, stratify=y, random_state=SEED)
    train_x, test_x = (torch.from_numpy(part).float() for part in parts[:2])
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return _Digits(train_x, train_y, test_x, test_y)


def _train(digits: _Digits, progress: bool) -> nn.Sequential:
    """The trained network, in evaluation mode. The caller's random state is left as it was.

    Trained in float64 and rounded once at the end, so that the order in which a processor adds
    hardly shows in the result.
    """
    x = digits.train_x.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layers: list[tuple[str, nn.Module]] = [
            ("fc1", nn.Linear(64, 300)),
            ("relu1", nn.ReLU()),
            ("fc2", nn.Linear(300, 100)),
            ("relu2", nn.ReLU()),
            ("fc3", nn.Linear(100, 10)),
        ]
        model = nn.Sequential(OrderedDict(layers)).double()
        optimizer = torch.optim.Adam(model.parameters())  # torch's defaults: nothing tuned
        for _ in tqdm(range(EPOCHS), "train", disable=None if progress else True):
            for batch in torch.split(torch.randperm(len(x)), 64):
                loss = functional.cross_entropy(model(x[batch]), digits.train_y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.float().eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The layers are so small that a second thread costs more than it brings: with another program
    on the same cores, training takes ten times as long on two threads as on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(model: nn.Sequential, digits: _Digits, method: str, sparsity: float) -> tuple[Run, Report]:
    pruned = copy.deepcopy(model)
    report = prune(
        pruned,
        [digits.train_x],
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
        error_before=_test_error(model, digits),
        error_after=_test_error(pruned, digits),
        relative_errors={layer.name: layer.relative_error for layer in report.layers},
        measured=report.error_bound.measured,
        spectral=report.error_bound.spectral,
        frobenius=report.error_bound.frobenius,
        seconds=report.seconds,
    )
    return run, report


def _test_error(model: nn.Sequential, digits: _Digits) -> float:
    with torch.no_grad():
        wrong = model(digits.test_x).argmax(1) != digits.test_y
    return int(wrong.sum()) / len(wrong)


# ---- what is shown -------------------------------------------------------------------------------


def _facts(digits: _Digits, run: Run) -> dict[str, str]:
    return {
        "Data": "handwritten digits of scikit-learn, 8 × 8 pixels in [0, 1]: "
        f"{len(digits.train_x)} to train on, {len(digits.test_x)} to test on",
        "Network": f"64-300-100-10, ReLU; trained for {EPOCHS} epochs, "
        f"test error {100 * run.error_before:.1f} %",
        "Pruning": "every layer to the same sparsity, on the training inputs without their labels; "
        "no retraining",
        "magnitude": "smallest weights of the layer first",
        "wanda": "smallest weight times input norm of each row first (Sun et al. 2024)",
        "lobs": "layer-wise optimal brain surgeon (Dong, Chen & Pan 2017): smallest increase of "
        "the layer's output error first, all ranked once, and the remaining weights make up for it",
        "sweep": "columns from left to right, the remaining weights make up for each (SparseGPT, "
        "Frantar & Alistarh 2023)",
        "exact": "optimal brain surgeon as it was meant (Hassibi & Stork 1993): after each removal "
        "every cost is computed anew",
        "Note": "one network and one seed, nothing tuned: from 80 % on another seed moves the "
        "errors by several points and may change the order of the methods",
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


def _picture(curves: Sequence[Curve], before: float) -> bytes:
    """The curves as PNG. A bare Figure draws with Agg: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve, style in zip(curves, ("o--", "s:", "D-.", "^--", "v-"), strict=True):
        across, down = zip(*curve.points, strict=True)
        axes.plot([100 * x for x in across], [100 * y for y in down], style, label=curve.name)
    axes.axhline(100 * before, color="0.5", linewidth=1, label="before pruning")
    axes.set_xlabel("sparsity of every layer (%)")
    axes.set_ylabel("test error (%)")
    axes.set_title("Pruned without retraining, handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
