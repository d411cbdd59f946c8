"""The authors' LeNet-300-100 on MNIST, pruned without retraining.

    python bench/quality/lenet.py [FOLDER]

FOLDER holds ``mnist/`` (the 10,000 test images, IDX, gzip) and ``lenet300-100/`` (the weights that
the paper's authors released). Calibrated on the first 5,000 images without labels; errors are those
on the last 5,000. One network: differences of a few tenths of a point mean nothing.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lobs_native as lobs

CALIBRATION = 5000
DEFAULT_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (10000, 784) float32 in [0, 1] and labels (10000,)."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / "mnist" / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / np.float32(255)
    labels = read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


def lenet(folder: Path) -> nn.Sequential:
    """The released network; its layers are called 0, 2 and 4."""
    steps: list[nn.Module] = []
    for i in (1, 2, 3):
        weight = torch.from_numpy(np.load(folder / "lenet300-100" / f"w_layer{i}.npy")).T
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(weight)
            bias = np.load(folder / "lenet300-100" / f"b_layer{i}.npy")
            layer.bias.copy_(torch.from_numpy(bias))
        steps += [layer, nn.ReLU()]
    return nn.Sequential(*steps[:-1])


def percent_wrong(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Test error in percent."""
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) != labels).float().mean())


def prune(model: nn.Module, images: Tensor, kept: Sequence[float], **settings: Any) -> lobs.Report:
    """Prune in place to the given shares of kept weights, calibrated on the first 5,000 images."""
    overrides = {name: {"sparsity": 1 - k} for name, k in zip("024", kept, strict=True)}
    batches = images[:CALIBRATION].split(500)
    return lobs.prune(model, batches, sparsity=0.5, overrides=overrides, progress=False, **settings)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    images, labels = mnist(folder)
    tested = images[CALIBRATION:], labels[CALIBRATION:]
    print(f"not pruned: {percent_wrong(lenet(folder), *tested):.2f} %")
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
        "exact, row": {"scope": "row"},
        "exact, layer": {"scope": "layer"},
        "exact, layer, damping 1e-5": {"scope": "layer", "damping": 1e-5},
        "exact, layer, exchange": {"scope": "layer", "refine": "exchange"},
        "exact, model": {"scope": "model"},
        "exact, model, damping 1e-5": {"scope": "model", "damping": 1e-5},
        "sweep, corrected": {"method": "sweep", "inputs": "corrected"},
        "exact, layer, corrected": {"inputs": "corrected"},
        "exact, model, corrected": {"scope": "model", "inputs": "corrected"},
    }
    for kept, inputs in (
        ((0.067, 0.20, 0.65), "dense"),
        ((0.07, 0.09, 0.26), "pruned"),
        ((0.04, 0.08, 0.25), "pruned"),
        ((0.02, 0.06, 0.20), "pruned"),
        ((0.01, 0.035, 0.15), "pruned"),
    ):
        shares = " / ".join(f"{100 * k:g}" for k in kept)
        for name, settings in ways.items():
            model = lenet(folder)
            report = prune(model, images, kept, **{"inputs": inputs, **settings})
            error = percent_wrong(model, *tested)
            print(f"| {shares} | {inputs} | {name} | {error:.2f} | {report.seconds:.1f} |")


if __name__ == "__main__":
    main()
