"""The authors' LeNet-300-100 on MNIST, pruned without retraining.

    python bench/quality/lenet.py [FOLDER] [--only WORD ...] [--sparsities S ...]

FOLDER holds ``mnist/`` (the 10,000 test images, IDX) and ``lenet300-100/`` (the weights that the
paper's authors released). Calibrated on the first 5,000 images without labels; errors are those on
the last 5,000. This is one network: differences of a few tenths of a point mean nothing. By default
the layers keep the shares of the paper, and less; ``--sparsities`` prunes all three to the same.
``--only exact admm`` leaves out the rows whose names begin otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from paper.data import Images, idx_images
from paper.networks import percent_wrong, released_network

CALIBRATION = 5000
STEP = 50  # images in a batch where the network is tuned: each batch is a step
DEFAULT_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
LAYERS = ("fc1", "fc2", "fc3")


def mnist(folder: Path = DEFAULT_FOLDER) -> Images:
    """The 10,000 test images, in [0, 1]."""
    return idx_images(folder / "mnist", "t10k")


def network(folder: Path = DEFAULT_FOLDER) -> nn.Sequential:
    """The released network."""
    return released_network(folder / "lenet300-100")


def prune(model: nn.Module, images: Images, kept: Sequence[float], **settings: Any) -> lobs.Report:
    """Prune in place to the given shares of kept weights, calibrated on the first 5,000 images."""
    overrides = {name: {"sparsity": 1 - k} for name, k in zip(LAYERS, kept, strict=True)}
    calibration = images.part(0, CALIBRATION)
    batches = calibration.batches(STEP) if "tune" in settings else calibration.batches()
    return lobs.prune(model, batches, sparsity=0.5, overrides=overrides, progress=False, **settings)


def settings_of(sparsities: Sequence[float] | None) -> list[tuple[tuple[float, ...], str]]:
    """The shares that fc1, fc2 and fc3 keep, and inputs, where a row does not say them."""
    if sparsities:
        return [((1 - s,) * len(LAYERS), "pruned") for s in sparsities]
    return [
        ((0.067, 0.20, 0.65), "dense"),
        ((0.07, 0.09, 0.26), "pruned"),
        ((0.04, 0.08, 0.25), "pruned"),
        ((0.02, 0.06, 0.20), "pruned"),
        ((0.01, 0.035, 0.15), "pruned"),
    ]


def main() -> None:
    """Print the table of errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help="folder with mnist/ and lenet300-100/ (default: shared/data beside the checkout)",
    )
    parser.add_argument("--only", nargs="+", default=("",), help="beginnings of rows' names")
    parser.add_argument("--sparsities", nargs="+", type=float, help="of every layer")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        images, dense = mnist(folder), network(folder)
    except ArgumentError as error:
        raise SystemExit(f"bench/quality/lenet.py: {error}") from error
    tested = images.part(CALIBRATION)
    print(f"not pruned: {percent_wrong(dense, tested):.2f} %")
    print("\n| kept in fc1 / fc2 / fc3 | inputs | method | error, % | seconds |")
    print("| --- | --- | --- | --- | --- |")
    ways: dict[str, dict[str, Any]] = {
        "magnitude": {"method": "magnitude"},
        "wanda, per row": {"method": "wanda", "scope": "row"},
        "lobs, damping 0.01": {"method": "lobs"},
        "lobs, damping 1e-5": {"method": "lobs", "damping": 1e-5},
        "lobs, damping 1e-5, biases pruned": {
            "method": "lobs",
            "damping": 1e-5,
            "prune_bias": True,
        },
        "sweep": {"method": "sweep"},
        "exact, row": {"method": "exact", "scope": "row"},
        "exact, layer": {"method": "exact", "scope": "layer"},
        "exact, layer, damping 1e-5": {"method": "exact", "scope": "layer", "damping": 1e-5},
        "exact, layer, exchange": {"method": "exact", "scope": "layer", "refine": "exchange"},
        "exact, model": {"method": "exact", "scope": "model"},
        "exact, model, damping 1e-5": {"method": "exact", "scope": "model", "damping": 1e-5},
        "admm, row": {"method": "admm", "scope": "row"},
        "admm, layer": {"method": "admm"},
        "admm, layer, damping 1e-5": {"method": "admm", "damping": 1e-5},
        "admm, model": {"method": "admm", "scope": "model"},
        "sweep, corrected": {"method": "sweep", "inputs": "corrected"},
        "exact, layer, corrected": {"method": "exact", "inputs": "corrected"},
        "exact, model, corrected": {"method": "exact", "scope": "model", "inputs": "corrected"},
        "admm, layer, corrected": {"method": "admm", "inputs": "corrected"},
        "admm, model, corrected": {"method": "admm", "scope": "model", "inputs": "corrected"},
    }
    rows, samples = {"sensitivity": "output"}, {"token_weights": "output"}
    for name in ("exact, layer", "exact, layer, corrected"):
        ways[f"weighted {name}, rows"] = {**ways[name], **rows}
        ways[f"weighted {name}, samples"] = {**ways[name], **samples, "sensitivity": None}
        ways[f"weighted {name}, rows and samples"] = {**ways[name], **samples}
    for name in ("exact, model", "exact, model, corrected"):
        ways[f"weighted {name}, rows and samples"] = {**ways[name], **samples}
    for name in ("exact, layer, corrected", "exact, model, corrected"):
        ways[f"tuned {name}"] = {**ways[name], "tune": "network", "tune_passes": 10}
    for kept, inputs in settings_of(arguments.sparsities):
        shares = " / ".join(f"{100 * k:g}" for k in kept)
        for name, settings in ways.items():
            if not name.startswith(tuple(arguments.only)):
                continue
            model = network(folder)
            report = prune(model, images, kept, **{"inputs": inputs, **settings})
            error = percent_wrong(model, tested)
            line = f"| {shares} | {inputs} | {name} | {error:.2f} | {report.seconds:.1f} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
