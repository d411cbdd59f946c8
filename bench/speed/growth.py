"""Growth of exact removal with the width of a layer: time per row, rate, exponent, memory.

    python bench/speed/growth.py [--out FOLDER] [--sizes C ...] [--threads N ...] [--repeats N]
    python bench/speed/growth.py --memory [--size N] [--out FOLDER]

The first form traces rows of C correlated inputs, half of each row removed, for each number of
threads. The time per row is that of a batch over its rows. Each batch is timed next to a float32
matrix product of torch on as many threads, in the order A, B, B, A, ... The share is the median
over the pairs of our useful flops per second, ``2 (C k^2 / 2 - k^3 / 3)`` per row, over the
product's. Exponents are slopes of the least-squares line through log(seconds per row) against
log(C). The published loop is timed on a sample of its removals at small sizes and extrapolated from
the largest of them with its own C^3. One row of every size is checked against float64 first. It
writes ``growth.json`` and, with matplotlib, ``growth.png``.

The second form prunes a whole layer of N x N from H in a process of its own. It reports the highest
resident memory beyond the bare import and the inputs (W float32, H float64), next to the size of
private inverses. At the default 4096 x 4096 it takes five to ten minutes and 2 GB. It writes
``growth-memory.json``.
"""

from __future__ import annotations

import os

# As in paired.py: threads that spin while they wait would slow down whatever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from speed import shapes
from speed.baselines import exact as baselines
from speed.cases.exact import useful_flops
from speed.paired import backends

SIZES = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
LARGE = 1024  # from here on the arithmetic outweighs the steps' overhead: a fit of its own
REPEATS = 5
FLOPS = 2e10  # useful ones of a batch, which sets its rows
PRODUCT = 2048
PUBLISHED_UP_TO, PUBLISHED_ROWS, PUBLISHED_SAMPLE = 1024, 32, 12
# Seconds per row of the first prototype of this algorithm, on another machine with two cores.
PROTOTYPE = {768: 1.0e-3, 1024: 2.2e-3, 2048: 15.7e-3, 4096: 149e-3}
FOLDER = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Layer:
    """Some rows of C inputs, and the inverse that they share."""

    W: Tensor  # (R, C) float32
    A: Tensor  # (C, C) float32

    @property
    def columns(self) -> int:
        return self.W.shape[1]

    @property
    def removed(self) -> int:
        return self.columns // 2


@dataclass
class Point:
    """The measurements at one size on one number of threads."""

    columns: int
    removed: int
    rows: int
    threads: int
    seconds: list[float] = field(default_factory=list)  # of batches
    product_seconds: list[float] = field(default_factory=list)  # of the product beside each
    published_seconds: list[float] = field(default_factory=list)  # per row; empty if not run

    @property
    def per_row(self) -> float:
        """Median seconds per row."""
        return statistics.median(self.seconds) / self.rows

    @property
    def published_per_row(self) -> float:
        return statistics.median(self.published_seconds)

    @property
    def rate(self) -> float:
        """Useful flops per second."""
        return useful_flops(1, self.columns, self.removed) / self.per_row

    @property
    def share(self) -> float:
        """Of the rate of the matrix product beside it."""
        work = useful_flops(self.rows, self.columns, self.removed)
        pairs = zip(self.seconds, self.product_seconds, strict=True)
        return statistics.median((work / a) / (2 * PRODUCT**3 / b) for a, b in pairs)


def synthetic_layer(C: int) -> Layer:
    """Rows enough for FLOPS: 8 to 512, in multiples of 8 so that threads share them evenly."""
    rows = min(512, max(8, round(FLOPS / useful_flops(1, C, C // 2) / 8) * 8))
    shape = shapes.LayerShape(f"{C} inputs", rows, C)
    return Layer(shapes.weights(shape), shapes.inverse(shapes.second_moment(shape)).float())


def check(layer: Layer) -> float:
    """Distance of one row's cumulative costs from float64's; a large one ends the program."""
    W = layer.W[:1].contiguous()
    curve = ops.exact_trace(W, layer.A, limit=layer.removed).loss.double().cumsum(dim=1)
    wide = baselines.exact_torch(W.double(), layer.A.double(), layer.removed)
    expected = wide.loss.cumsum(dim=1)
    error = float((curve - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise SystemExit(f"C = {layer.columns}: wrong, error {error:.3g}")
    return error


def seconds_of(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def published_row(layer: Layer) -> float:
    """Seconds per row of the published loop, from a sample of its removals, all of one length."""
    W = shapes.weights(shapes.LayerShape("", PUBLISHED_ROWS, layer.columns))
    begun = time.perf_counter()
    batch = baselines.PublishedRows(W, layer.A)
    ready = time.perf_counter()
    batch.remove(PUBLISHED_SAMPLE)
    each = (time.perf_counter() - ready) / PUBLISHED_SAMPLE
    return (ready - begun + each * layer.removed) / PUBLISHED_ROWS


def measure(layers: Sequence[Layer], threads: int, repeats: int, *, published: bool) -> list[Point]:
    """Measure every size in turn, ``repeats`` times, each beside a matrix product."""
    torch.set_num_threads(threads)
    X = torch.randn(PRODUCT, PRODUCT, generator=torch.Generator().manual_seed(5))
    Z = torch.empty_like(X)
    points = [Point(x.columns, x.removed, len(x.W), threads) for x in layers]
    for repeat in range(-1, repeats):  # the first round warms up and is not kept
        for layer, point in zip(layers, points, strict=True):

            def trace(layer: Layer = layer) -> None:
                ops.exact_trace(layer.W, layer.A, limit=layer.removed)

            def product() -> None:
                torch.mm(X, X, out=Z)

            if repeat % 2:
                b, a = seconds_of(product), seconds_of(trace)
            else:
                a, b = seconds_of(trace), seconds_of(product)
            if repeat < 0:
                continue
            point.seconds.append(a)
            point.product_seconds.append(b)
            if published and layer.columns <= PUBLISHED_UP_TO:
                point.published_seconds.append(published_row(layer))
    return points


def exponent(points: Sequence[Point], least: int = 0) -> float | None:
    """Slope of log(seconds per row) against log(C) over C >= ``least``; None with one point."""
    chosen = [p for p in points if p.columns >= least]
    if len(chosen) < 2:
        return None
    x = np.log([p.columns for p in chosen])
    y = np.log([p.per_row for p in chosen])
    return float(np.polyfit(x, y, 1)[0])


def published_line(points: Sequence[Point]) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds per row of the published loop: measured, and extrapolated by C^3 from the last."""
    measured = {p.columns: p.published_per_row for p in points if p.published_seconds}
    if not measured:
        return {}, {}
    last = max(measured)
    beyond = [p.columns for p in points if p.columns >= last]
    return measured, {C: measured[last] * (C / last) ** 3 for C in beyond}


def plot(file: Path, by_threads: dict[int, list[Point]]) -> bool:
    """Time per row against C, log-log. False if matplotlib is absent."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    most = max(by_threads)
    measured, extrapolated = published_line(by_threads[most])
    if measured:
        label = f"published loop, {most} threads"
        axes.plot(measured.keys(), [1e3 * t for t in measured.values()], "s-C3", label=label)
    if len(extrapolated) > 1:
        label = "published loop, extrapolated by $C^3$"
        axes.plot(
            extrapolated.keys(), [1e3 * t for t in extrapolated.values()], "--C3", label=label
        )
    label = "first prototype, another machine, 2 threads"
    axes.plot(PROTOTYPE.keys(), [1e3 * t for t in PROTOTYPE.values()], "x:C7", label=label)
    for color, (threads, points) in enumerate(by_threads.items()):
        slope = exponent(points)
        label = f"lobs_native, {threads} thread{'s' if threads > 1 else ''}"
        label += f" ($C^{{{slope:.2f}}}$)" if slope is not None else ""
        x, y = [p.columns for p in points], [1e3 * p.per_row for p in points]
        axes.plot(x, y, "o-", color=f"C{color}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="C, inputs of the layer; half of them removed")
    axes.set_ylabel("milliseconds per row")
    ticks = [p.columns for p in next(iter(by_threads.values()))]
    axes.set_xticks(ticks, [str(C) for C in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def about() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "lobs_native": lobs.__version__,
        "backends": backends(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load": os.getloadavg(),
        "command": ["python", "bench/speed/growth.py", *sys.argv[1:]],
    }


def grow(arguments: argparse.Namespace) -> None:
    """Carry out the first form."""
    layers, errors = [], {}
    for C in arguments.sizes:
        layers.append(synthetic_layer(C))
        errors[C] = check(layers[-1])
    started = about()
    by_threads: dict[int, list[Point]] = {}
    heads = ("threads", "C", "removed", "rows", "ms per row", "useful GFLOP/s", "share of product")
    heads += ("published, ms per row", "ratio")
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for threads in sorted(arguments.threads):
        last = threads == max(arguments.threads)
        points = measure(layers, threads, arguments.repeats, published=last)
        by_threads[threads] = points
        for p in points:
            theirs = p.published_per_row if p.published_seconds else None
            cells = [threads, p.columns, p.removed, p.rows, f"{1e3 * p.per_row:.3f}"]
            cells += [f"{p.rate / 1e9:.1f}", f"{p.share:.3f}"]
            cells += ["", ""] if theirs is None else [f"{1e3 * theirs:.1f}"]
            cells += [] if theirs is None else [f"{theirs / p.per_row:.0f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print()
    fits: dict[str, dict[str, float | None]] = {}
    for threads, points in by_threads.items():
        fits[str(threads)] = {"all": exponent(points), f"from_{LARGE}": exponent(points, LARGE)}
        for name, slope in fits[str(threads)].items():
            if slope is not None:
                print(f"{threads} threads, exponent {name.replace('_', ' ')}: {slope:.2f}")
    result = {
        "about": {**started, "load_at_end": os.getloadavg()},
        "errors": errors,
        "exponents": fits,
        "points": [
            {**asdict(p), "seconds_per_row": p.per_row, "gflops": p.rate / 1e9, "share": p.share}
            for points in by_threads.values()
            for p in points
        ],
        "published_drawn_on": published_line(by_threads[max(by_threads)])[1],
        "prototype_another_machine": PROTOTYPE,
    }
    written = arguments.out / "growth.json"
    written.write_text(json.dumps(result, indent=1) + "\n")
    picture = arguments.out / "growth.png"
    print(f"\nwritten: {written}", end="")
    print(f", {picture}" if plot(picture, by_threads) else "; no plot: matplotlib is not installed")


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Highest resident memory of this process so far.

    Linux starts a child's ru_maxrss at its parent's, so /proc is asked first.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prune_and_report(folder: Path) -> None:
    """Be the child process: read the inputs, prune, print the peaks as JSON."""
    bare = peak_bytes()
    W, H = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("W", "H"))
    loaded = peak_bytes()
    begun = time.perf_counter()
    pruned = lobs.prune_weight(W, H, sparsity=0.5, method="exact")
    seconds = time.perf_counter() - begun
    report = {
        "bare_import_bytes": bare,
        "inputs_bytes": W.numel() * W.element_size() + H.numel() * H.element_size(),
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "sparsity": pruned.sparsity,
        "relative_error": pruned.relative_error,
        "notes": list(pruned.notes),
    }
    print(json.dumps(report))


def measure_memory(arguments: argparse.Namespace) -> None:
    """Carry out the second form."""
    N = arguments.size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = shapes.LayerShape(f"{N} x {N}", N, N)
        np.save(folder / "W.npy", shapes.weights(shape).numpy())
        np.save(folder / "H.npy", shapes.second_moment(shape).numpy())
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    added = report["peak_bytes"] - report["bare_import_bytes"] - report["inputs_bytes"]
    inverse = 4 * N * N
    print(f"{N} x {N}, half removed, {report['threads']} threads: {report['seconds']:.1f} s")
    print(f"bare import {report['bare_import_bytes'] / 1e6:,.0f} MB, inputs ", end="")
    print(f"{report['inputs_bytes'] / 1e6:,.0f} MB, peak {report['peak_bytes'] / 1e6:,.0f} MB")
    print(f"beyond import and inputs: {added / 1e6:,.0f} MB, {added / N / 1e6:.3f} MB per row")
    print(f"(the result, weights and mask, is {5 * N * N / 1e6:,.0f} MB of that)")
    print(f"private inverses in float32: {inverse / 1e6:,.0f} MB per row, ", end="")
    print(f"{32 * inverse / 1e6:,.0f} MB for the published batch of 32 rows, twice while updated")
    result = {"about": about(), "size": N, **report, "added_bytes": added, "inverse_bytes": inverse}
    written = arguments.out / "growth-memory.json"
    written.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {written}")


def main() -> None:
    parser = argparse.ArgumentParser(description="How exact removal grows with the layer's width.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="C")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), metavar="N")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--memory", action="store_true", help="peak memory of a whole layer")
    parser.add_argument("--size", type=int, default=4096, help="of that layer, both sides")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        prune_and_report(arguments.child)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.memory:
        measure_memory(arguments)
    else:
        grow(arguments)


if __name__ == "__main__":
    main()
