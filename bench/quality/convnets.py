"""Two convolutional networks on Fashion-MNIST, pruned without retraining.

    apt-get install dataset-fashion-mnist
    python bench/quality/convnets.py [--images FOLDER] [--seeds N] [--cache PREFIX] [--out FILE]

FOLDER holds the four IDX files of Fashion-MNIST; the default is where Debian's package puts them.
The networks are trained on the 60,000 training images, unaugmented, with one cycle of the learning
rate, in a few minutes on two cores. They are read from ``PREFIX-<network>-<seed>.safetensors`` if
that exists, and written to it if not:

- LeNet-5 in Caffe's shape: 20 and 50 convolutions of 5x5, each pooled, then 500 outputs, ReLU, 10;
- a small residual network with batch normalisation: depthwise, strided, dilated, grouped and 1x1
  convolutions, without biases, and one linear layer.

Then every convolution and every linear layer, including the first and the last, is pruned to the
same sparsity (with scope "model": on average, each within bounds), calibrated on the first 2,000
training images without labels, and not retrained. "tuned": towards the network's own outputs for
these images, by their squared change, or by the Kullback-Leibler divergence ("by KL"; "at T = 2",
of the probabilities of halved logits); "twice": first with twice as many weights kept, then again,
towards what the network returned as pruned, or before ("to the original").

The tables show errors in percent on the 10,000 test images; the percentage of 5,000 training
images, none of them calibrated on, to which the pruned network gives another answer than the
network before, by which settings are chosen; and the seconds of the calls of ``prune``. For the
residual network also the errors after its batch normalisation was re-estimated on the same 2,000
images, and its seconds (not with --as-pruned). With several seeds, each trains a network of its
own, and a cell is the mean with the lowest and the highest in brackets. For one seed, differences
of a few tenths of a point mean nothing. --networks, --sparsities and --only leave out the others.

``bench/results/convnets.json`` comes from --seeds 3 --threads 1 with torch 2.13.
"""

from __future__ import annotations

import os

# As in paired.py: threads that spin while they wait cost more than they gain on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.files.atomic import write_file
from paper.data import FASHION, Images, idx_images, standardised

MEAN, STD = 0.2860, 0.3530  # of the training images' pixels
CALIBRATION, AT_ONCE, TRAINED_AT_ONCE = 2000, 100, 128
CHOOSING = slice(50_000, 55_000)  # training images by which settings are chosen
STEP = 50  # images in a batch where the network is tuned: each batch is a step
EPOCHS = {"lenet5": 4, "resnet": 5}
RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "inputs": "pruned"},
    "wanda, row": {"method": "wanda", "scope": "row", "inputs": "pruned"},
    "lobs": {"method": "lobs", "inputs": "pruned"},
    "sweep": {"method": "sweep", "inputs": "pruned"},
    "exact, row": {"method": "exact", "scope": "row", "inputs": "pruned"},
    "exact, layer": {"method": "exact", "scope": "layer", "inputs": "pruned"},
    "exact, model": {"method": "exact", "scope": "model", "inputs": "pruned"},
    "exact, layer, dense inputs": {"method": "exact", "scope": "layer", "inputs": "dense"},
    "sweep, corrected": {"method": "sweep", "inputs": "corrected"},
    "exact, layer, corrected": {"method": "exact", "scope": "layer", "inputs": "corrected"},
    "exact, model, corrected": {"method": "exact", "scope": "model", "inputs": "corrected"},
    "admm, layer, corrected": {"method": "admm", "inputs": "corrected"},
    "admm, model, corrected": {"method": "admm", "scope": "model", "inputs": "corrected"},
}
TUNED = {"tune": "network", "tune_passes": 30, "tune_rate": 0.016}
ONCE = "exact, model, corrected, tuned"
METHODS[ONCE] = {**METHODS["exact, model, corrected"], **TUNED}
METHODS[f"{ONCE} by KL"] = {**METHODS[ONCE], "classes": 10}
METHODS[f"{ONCE} by KL at T = 2"] = {
    **METHODS[f"{ONCE} by KL"],
    "forward": lambda model, batch: model(batch) / 2,
}
WAYS = (ONCE, f"{ONCE} by KL", f"{ONCE} by KL at T = 2")
# Method -> that of the first call, and whether the second one aims at the original network.
TWICE = {f"{ONCE} twice": (ONCE, False)}
TWICE |= {f"{way} twice to the original": (way, True) for way in WAYS}
METHODS |= {name: METHODS[first] for name, (first, _) in TWICE.items()}


# ---- data --------------------------------------------------------------------------------------


def fashion(folder: Path, which: str) -> Images:
    """The training ("train") or test ("t10k") images (N, 1, 28, 28), normalised."""
    try:
        return standardised(idx_images(folder, which), MEAN, STD)
    except ArgumentError as error:
        raise SystemExit(
            f"skipped: {error}; apt-get install dataset-fashion-mnist, or give the folder with "
            "Fashion-MNIST's four IDX files as --images"
        ) from error


# ---- networks ----------------------------------------------------------------------------------


def lenet5() -> nn.Sequential:
    """Caffe's LeNet: 430,500 weights in four layers."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """``relu(path(x) + shortcut(x))``."""

    def __init__(self, path: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.path, self.shortcut = path, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.shortcut(x)).relu()


def normed(inside: int, outside: int, size: int, **settings: int) -> nn.Sequential:
    """A convolution without bias, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, bias=False, **settings), nn.BatchNorm2d(outside)
    )


def separable(inside: int, middle: int, outside: int) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1."""
    return nn.Sequential(
        normed(inside, middle, 1), nn.ReLU(),
        normed(middle, middle, 3, padding=1, groups=middle), nn.ReLU(),
        normed(middle, outside, 1),
    )  # fmt: skip


def resnet() -> nn.Sequential:
    """A small residual network: 82,608 weights in 14 layers, 13 batch normalisations."""
    dilated = nn.Sequential(
        normed(32, 32, 3, padding=2, dilation=2), nn.ReLU(), normed(32, 32, 3, padding=1)
    )
    grouped = nn.Sequential(
        normed(32, 64, 3, stride=2, padding=1, groups=4), nn.ReLU(), normed(64, 64, 3, padding=1)
    )
    return nn.Sequential(
        normed(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        Residual(separable(16, 32, 32), normed(16, 32, 1)),
        Residual(dilated, nn.Identity()),
        Residual(grouped, normed(32, 64, 1, stride=2)),
        Residual(separable(64, 128, 64), nn.Identity()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"lenet5": lenet5, "resnet": resnet}


def train(network: str, images: Images, seed: int) -> nn.Sequential:
    """Train from scratch; the weights depend on the seed (and, in the last digits, on threads)."""
    torch.manual_seed(seed)
    model = NETWORKS[network]().train()
    steps = EPOCHS[network] * -(-len(images.x) // TRAINED_AT_ONCE)
    optimiser = torch.optim.SGD(
        model.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(EPOCHS[network]):
        for rows in torch.randperm(len(images.x)).split(TRAINED_AT_ONCE):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            optimiser.step()
            rate.step()
    return model.eval()


def trained(network: str, images: Images, seed: int, cache: str | None) -> nn.Sequential:
    """As :func:`train`, from a file if there is one."""
    path = None if cache is None else Path(f"{cache}-{network}-{seed}.safetensors")
    if path is not None and path.is_file():
        model = NETWORKS[network]()
        model.load_state_dict(load_file(path))
        print(f"{network}, seed {seed}: read from {path}", flush=True)
        return model.eval()
    begun = time.perf_counter()
    model = train(network, images, seed)
    print(f"{network}, seed {seed}: trained in {time.perf_counter() - begun:.0f} s", flush=True)
    if path is not None:
        save_file(model.state_dict(), path)
    return model


# ---- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def percent_wrong(model: nn.Module, images: Images) -> float:
    """Error in percent."""
    wrong = sum(
        int((model(x).argmax(1) != y).sum())
        for x, y in zip(images.x.split(AT_ONCE), images.y.split(AT_ONCE), strict=True)
    )
    return 100 * wrong / len(images.y)


@torch.no_grad()
def answered(model: nn.Module, x: Tensor) -> Images:
    """Images with what the model says they are as their labels."""
    return Images(x, torch.cat([model(part).argmax(1) for part in x.split(AT_ONCE)]))


@dataclass
class Row:
    """One network pruned in one way, a number for every seed."""

    network: str
    sparsity: float
    method: str
    error: list[float] = field(default_factory=list)
    reestimated: list[float] = field(default_factory=list)  # errors with new batch-norm statistics
    seconds: list[float] = field(default_factory=list)
    seconds_reestimating: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    damping: list[list[float]] = field(default_factory=list)  # of every layer
    cpu_seconds: list[float] = field(default_factory=list)
    differing: list[float] = field(default_factory=list)  # percent of the answers to CHOOSING

    def line(self) -> str:
        """As a line of the table."""
        cells = [
            f"{self.sparsity:.0%}", self.method, spread(self.error), spread(self.differing),
            spread(self.reestimated), spread(self.seconds, 1), spread(self.seconds_reestimating, 1),
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the lowest and the highest if there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def reestimate(model: nn.Module, batches: Sequence[Tensor], tested: Images, row: Row) -> None:
    """Re-estimate the batch normalisation, if there is any, and measure again."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return
    begun = time.perf_counter()
    lobs.reestimate_batch_norm(model, batches)
    row.seconds_reestimating.append(time.perf_counter() - begun)
    row.reestimated.append(percent_wrong(model, tested))


@dataclass(frozen=True)
class Pruned:
    """A network that was pruned, and what that took."""

    network: nn.Module
    report: lobs.Report
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, network: nn.Module, images: Tensor, method: str, **options: Any) -> Pruned:
        """A pruned copy of a network."""
        settings = {**METHODS[method], "progress": False, **options}
        batches = images.split(STEP if "tune" in METHODS[method] else AT_ONCE)
        begun = time.process_time()
        pruned = copy.deepcopy(network)
        report = lobs.prune(pruned, batches, **settings)
        return cls(pruned, report, report.seconds, time.process_time() - begun)


@dataclass
class Measuring:
    """How networks are pruned and measured; what one call made of a network is kept, since two
    calls begin with it."""

    training: Tensor
    tested: Images
    reestimated: bool
    made: dict[tuple[nn.Module, str, float], Pruned] = field(default_factory=dict)

    def once(self, model: nn.Module, method: str, sparsity: float) -> Pruned:
        """A network pruned in one call."""
        key = model, method, round(sparsity, 6)
        if key not in self.made:
            images = self.training[:CALIBRATION]
            self.made[key] = Pruned.of(model, images, method, sparsity=sparsity)
        return self.made[key]

    def twice(self, model: nn.Module, method: str, sparsity: float) -> Pruned:
        """In two calls, the first of which keeps twice as many weights; seconds are of both."""
        method, to_original = TWICE[method]
        images = self.training[:CALIBRATION]
        begun = self.once(model, method, 2 * sparsity - 1)
        options = {"sparsity": sparsity, "original": model if to_original else None}
        found = Pruned.of(begun.network, images, method, **options)
        seconds = found.seconds + begun.seconds, found.cpu_seconds + begun.cpu_seconds
        return Pruned(found.network, found.report, *seconds)

    def add(self, model: nn.Module, row: Row) -> None:
        """Prune a copy of a model in the way that ``row`` says, and add what came of it."""
        way = self.twice if row.method in TWICE and row.sparsity > 0.5 else self.once
        found = way(model, row.method, row.sparsity)
        row.cpu_seconds.append(found.cpu_seconds)
        row.seconds.append(found.seconds)
        row.reached.append(found.report.sparsity)
        row.damping.append([layer.damping for layer in found.report.layers])
        self.measure(model, found.network, row)

    def measure(self, model: nn.Module, pruned: nn.Module, row: Row) -> None:
        """Add what a network says that was made of a model."""
        row.error.append(percent_wrong(pruned, self.tested))
        row.differing.append(percent_wrong(pruned, answered(model, self.training[CHOOSING])))
        if self.reestimated:
            batches = self.training[:CALIBRATION].split(AT_ONCE)
            reestimate(copy.deepcopy(pruned), batches, self.tested, row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pruning convolutional networks.")
    parser.add_argument("--images", type=Path, default=FASHION, help="of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each kind, default 1")
    parser.add_argument("--cache", help="prefix of files with trained weights")
    parser.add_argument("--threads", type=int, help="default torch's")
    parser.add_argument("--as-pruned", action="store_true", help="re-estimate nothing")
    parser.add_argument("--out", type=Path, help="JSON; what it holds is not computed again")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: {arguments.seeds}; at least one network is needed")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    training, tested = fashion(arguments.images, "train"), fashion(arguments.images, "t10k")
    measuring = Measuring(training.x, tested, reestimated=not arguments.as_pruned)
    known: dict[tuple[str, float, str], Row] = {}
    if arguments.out and arguments.out.is_file():
        kept = [Row(**row) for row in json.loads(arguments.out.read_text())["rows"]]
        known = {(row.network, row.sparsity, row.method): row for row in kept}
    for network in arguments.networks:
        models = [trained(network, training, s, arguments.cache) for s in range(arguments.seeds)]
        dense = known.get((network, 0.0, "not pruned")) or Row(network, 0.0, "not pruned")
        for model in models[len(dense.error) :]:
            measuring.measure(model, model, dense)
        known[network, 0.0, dense.method] = dense
        print(f"\n{network}: errors in percent, not retrained\n")
        print("| sparsity | method | error | others | re-estimated | seconds | its seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        print(dense.line(), flush=True)
        for sparsity in arguments.sparsities:
            for method in arguments.only:
                rows = [Row(network, sparsity, method)]
                if method in TWICE and sparsity > 0.5:  # the first call's network is a row as well
                    rows.insert(0, Row(network, round(2 * sparsity - 1, 6), TWICE[method][0]))
                rows = [known.setdefault((network, x.sparsity, x.method), x) for x in rows]
                for number, model in enumerate(models):
                    for row in (x for x in rows if len(x.error) == number):
                        measuring.add(model, row)
                        save(arguments.out, arguments.seeds, known)  # it may be interrupted
                print(*(row.line() for row in rows), sep="\n", flush=True)
    save(arguments.out, arguments.seeds, known)


def save(out: Path | None, seeds: int, rows: dict[tuple[str, float, str], Row]) -> None:
    """Write the rows, if there is a file to write them to."""
    if out is None:
        return
    about = {
        "torch": str(torch.__version__),
        "lobs_native": lobs.__version__,
        "backends": [detail for name, _, detail in lobs.backends() if name == "cpu"],
        "threads": torch.get_num_threads(), "seeds": seeds, "calibration": CALIBRATION,
        "epochs": EPOCHS,
    }  # fmt: skip
    result = {"about": about, "rows": [asdict(row) for row in rows.values()]}
    write_file(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
