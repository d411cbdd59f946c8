"""The paper's small networks: pruned once and in two stages, with and without light retraining.

LeNet-300-100 with the weights that the authors released (--released, --mnist), and LeNet-300-100,
LeNet-5 and CIFAR-Net trained from seeds on the training images of a folder (--images: four IDX
files, as for MNIST and Fashion-MNIST). Parts without data are left out, and the page says so. The
page is small.md, the numbers small.json. Rows that small-rows.json holds already, from a run with
the same settings, are not computed again.

In full, on two kinds of images, it takes three hours of one core, most of them for LeNet-5. With
--short, without CIFAR-Net, it takes a quarter of an hour for each kind of images.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import lobs_native
from lobs_native.errors import ArgumentError
from lobs_native.files.atomic import write_file
from paper.data import FASHION, has_idx
from paper.markdown import save
from paper.networks import SHAPES, Case, released, trained
from paper.small import page as report_small
from paper.small import plots
from paper.small.budgets import HALVINGS, budgets_of
from paper.small.tables import LIGHTLY, LONGER, TAUGHT_WAY, Row, Rows, in_stages, once, taught
from paper.small.ways import ITERATED, WAYS

NAME = "small"
HELP = "LeNet-300-100, LeNet-5 and CIFAR-Net (tables 1, 3 and 4, figures 2 to 5)"

FEW_WAYS = ("magnitude", "L-OBS as printed", "L-OBS", "exact", "exact, model, corrected")


@dataclass(frozen=True)
class Extent:
    """How much is done."""

    seeds: int
    repetitions: int  # of a retraining, where there is one network only
    ways: tuple[str, ...]
    limits: dict[str, int]  # iterations of a retraining at most, by title
    shares: tuple[float, ...]  # of the curves
    longer: bool  # whether the released network is also taught for longer
    epochs: int | None = None  # of training; None: each network's own
    halvings: int = HALVINGS


SHORT_NETWORKS = ["lenet300", "lenet5"]
FULL = Extent(
    5, 5, tuple(WAYS), {"LeNet-300-100": 500, "LeNet-5": 200, "CIFAR-Net": 200},
    (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.067, 0.05, 0.04, 0.03, 0.02, 0.01), longer=True,
)  # fmt: skip
SHORT = Extent(
    1, 1, FEW_WAYS, {"LeNet-300-100": 300, "LeNet-5": 100, "CIFAR-Net": 100},
    (0.5, 0.2, 0.1, 0.067, 0.04, 0.02), longer=False, halvings=5,
)  # fmt: skip


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this experiment, besides the common ones."""
    add = command.add_argument
    text = "folder with the authors' w_layer1.npy to b_layer3.npy; needs --mnist"
    add("--released", type=Path, metavar="DIR", help=text)
    text = "folder with MNIST's t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz"
    add("--mnist", type=Path, metavar="DIR", help=text)
    text = "folder with the images to train on, train-* and t10k-* (default: %(default)s)"
    add("--images", type=Path, default=FASHION, metavar="DIR", help=text)
    text = "what to call them (default: %(default)s)"
    add("--images-name", default="Fashion-MNIST", metavar="NAME", help=text)
    text = "trained networks: may be repeated (default: all three; --short: all but cifarnet)"
    add("--network", action="append", choices=list(SHAPES), help=text)


def run(options: argparse.Namespace) -> int:
    """Carry out the experiment and return the exit code."""
    extent = SHORT if options.short else FULL
    begun = time.perf_counter()
    result = experiment(
        options.out,
        extent,
        seeds=options.seeds or extent.seeds,
        weights=options.released,
        mnist=options.mnist,
        images=options.images,
        data=options.images_name,
        kinds=options.network or (SHORT_NETWORKS if options.short else list(SHAPES)),
        cache=options.cache,
    )
    print(f"wrote {', '.join(str(p) for p in result)} in {time.perf_counter() - begun:.0f} s")
    return 0


def experiment(
    out: Path,
    extent: Extent,
    *,
    seeds: int,
    weights: Path | None,
    mnist: Path | None,
    images: Path,
    data: str,
    kinds: list[str],
    cache: str | None,
) -> list[Path]:
    """Carry out everything into the folder ``out`` and return the files written.

    Raises
    ------
    ArgumentError
        There is neither a released network with its images nor a folder to train on.
    """
    if (weights is None) != (mnist is None):
        raise ArgumentError("--released and --mnist belong together: weights, and images for them")
    missing = []
    if weights is None:
        missing.append("LeNet-300-100 with the authors' weights: --released and --mnist not given")
    if not has_idx(images, "train"):
        missing.append(f"trained networks: no training images in {images} (--images)")
        kinds = []
    left = [SHAPES[kind].title for kind in SHAPES if kind not in kinds]
    if kinds and left:
        missing.append(f"{' and '.join(left)}: not asked for (--network)")
    if weights is None and not kinds:
        raise ArgumentError("; ".join(missing))
    settings = {"extent": vars(extent), "data": data, "versions": _versions()}
    rows = Rows(out / "small-rows.json", settings)
    groups: list[list[Case]] = []
    if weights is not None and mnist is not None:
        groups.append([released(weights, mnist)])
    for kind in kinds:
        groups.append([trained(kind, images, data, s, cache, extent.epochs) for s in range(seeds)])
    begun = time.perf_counter()
    for group in groups:
        for case in group:
            _tables(case, extent, rows, alone=len(group) == 1)
    first = [group[0] for group in groups]
    pictures = plots.draw(first, extent.shares, rows)
    budgeted = [b for case in first for b in budgets_of(case, extent.halvings)]
    facts = {
        **_versions(),
        "Seconds": f"{time.perf_counter() - begun:.0f} besides training, rows made earlier not "
        "counted",
    }
    page, numbers = report_small.page(first, rows, pictures, budgeted, facts, missing)
    paths = [write_file(out / f"{p.stem}.svg", p.svg) for p in pictures]
    return [*paths, *save(out, NAME, page, numbers)]


def _tables(case: Case, extent: Extent, rows: Rows, *, alone: bool) -> None:
    """Compute all rows of one network that are missing."""
    limit = extent.limits[case.shape.title]
    repetitions = extent.repetitions if alone else 1
    for way in extent.ways:
        if ("once", case.name, way, case.seed) not in rows.rows:
            _told(rows, once(case, way, limit=limit, repetitions=repetitions))
        wanted = way in ITERATED and bool(case.shape.stages)
        if wanted and ("stages", case.name, way, case.seed) not in rows.rows:
            _told(rows, in_stages(case, way, limit=limit, repetitions=repetitions))

    if case.shape.stages:
        for how in (LIGHTLY, LONGER):
            wanted = how is LIGHTLY or (extent.longer and alone and len(case.splits) == 1)
            if wanted and (how.table, case.name, TAUGHT_WAY, case.seed) not in rows.rows:
                _told(rows, taught(case, how, repetitions=repetitions))


def _told(rows: Rows, row: Row) -> None:
    rows.add(row)
    print(
        f"{row.network}, seed {row.seed}, {row.table}, {row.way}: kept {100 * row.kept_all:.2f} %, "
        f"error {row.dense:.2f} -> {row.pruned:.2f} -> {row.retrained[0]:.2f} % after "
        f"{row.iterations[0]:.0f} iterations; {row.seconds:.1f} and {row.seconds_retraining:.1f} s",
        flush=True,
    )


def _versions() -> dict[str, str]:
    return {
        "lobs_native": lobs_native.__version__,
        "torch": str(torch.__version__),
        "Threads": str(torch.get_num_threads()),
    }
