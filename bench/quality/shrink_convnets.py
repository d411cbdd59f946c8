"""Two convolutional networks with half of their multiplications: errors and times, not retrained.

    apt-get install dataset-fashion-mnist
    python bench/quality/shrink_convnets.py [--images FOLDER] [--cache PREFIX] [--seeds N]
        [--threads N] [--pairs N] [--processor-time] [--only WORD ...] [--out FILE]

The networks of `convnets.py`, trained as there, calibrated on the same 2,000 images and measured on
the 10,000 test images. Half of the multiplications of the whole network go, by removing channels:

- ours: ``lobs.shrink`` with a budget for the whole network ("multiplications"), or with one share
  for all channels ("keep"), in multiples of 4; or with half of the measured time of its layers
  ("latency"), in multiples of 8;
- the rival: in every family of tied channels those with the least L1 norms of their filters (Li et
  al. 2017), one share for all, and batch normalisation estimated again.

Then the times of a batch in torch, and, where they are installed, in onnxruntime and OpenVINO: the
original's over the shrunk one's, by ``lobs.measure_speed``.

``--latency`` does something else: half of the time of the layers concerned goes ("latency"), by a
table of times. Then each layer of the shrunk network is timed on its inputs, with its weights, and
the sum is compared with the table's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.session import Session
from lobs_native.files.atomic import write_file
from lobs_native.network.shrinking.channels import channel_families
from lobs_native.network.shrinking.latency import LatencyTable, inputs_of, least_seconds
from lobs_native.network.shrinking.surgery import take_out
from lobs_native.network.shrinking.units import Family
from paper.data import FASHION
from paper.networks import percent_wrong
from quality.convnets import AT_ONCE, CALIBRATION, NETWORKS, fashion, trained
from quality.shrunk_speed import as_text, speed_ups

LEFT = 0.5  # of the multiplications
MULTIPLE = 4
OURS: dict[str, dict[str, Any]] = {
    "ours, budget": {},
    "ours, budget, pruned inputs": {"inputs": "pruned"},
    "ours, one share": {},
    "ours, latency": {"latency": LEFT, "multiple": 8},
}
TIMED = ("ours, budget", "ours, latency")


def multiplications(model: nn.Module, image: Tensor) -> float:
    """Of convolutions and linear layers, for one image."""
    total = 0.0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        positions = output[0, 0].numel() if output.ndim > 2 else 1
        total += module.weight.numel() * positions

    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in modules]
    with torch.no_grad():
        model(image[None])
    for handle in handles:
        handle.remove()
    return total


def families_of(model: nn.Module, batch: Tensor) -> list[Family]:
    """Its families of channels."""
    session = Session(model, [batch], None, None, 0, progress=False)
    with session.evaluating():
        return channel_families(model, session, batch, [])


def by_norms(model: nn.Module, share: float, batch: Tensor) -> None:
    """Keep the channels whose filters have the largest L1 norms."""
    for family in families_of(model, batch):
        norms = torch.zeros(family.units)
        for slot in family.slots:
            weight = model.get_parameter(slot.name) if "running" not in slot.name else None
            if weight is not None and weight.ndim > 1 and not slot.read:
                sizes = weight.detach().abs().movedim(slot.axis, 0).flatten(1).sum(1)
                known = slot.units >= 0
                norms.index_add_(0, slot.units[known], sizes[known])
        count = max(MULTIPLE, MULTIPLE * round(share * family.units / MULTIPLE))
        kept = norms.argsort(descending=True)[:count].sort().values
        take_out(model, family, kept, ExitStack())


def share_for(model: nn.Module, batch: Tensor) -> float:
    """The largest share of all channels with which the whole has ``LEFT`` of its multiplications at
    most."""
    whole, share = multiplications(model, batch[0]), 1.0
    while True:
        share -= 1 / 64
        small = copy.deepcopy(model)
        by_norms(small, share, batch)
        if multiplications(small, batch[0]) <= LEFT * whole:
            return share


def shrunk(choice: str, model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A copy with half of the multiplications."""
    small = copy.deepcopy(model)
    if choice == "L1 norms":
        by_norms(small, share_for(model, batches[0]), batches[0])
        if any(isinstance(m, nn.BatchNorm2d) for m in small.modules()):
            lobs.reestimate_batch_norm(small, batches)
        return small
    settings = {"multiple": MULTIPLE, "progress": False, **OURS[choice]}
    if "latency" in settings:
        lobs.shrink(small, batches, **settings)
        return small
    if choice == "ours, one share":
        lobs.shrink(small, batches, keep=share_for(model, batches[0]), **settings)
        return small
    whole = multiplications(model, batches[0][0])
    trial = copy.deepcopy(model)
    report = lobs.shrink(trial, batches[:1], keep=0.5, multiple=MULTIPLE, progress=False)
    fixed = whole - report.multiplications[0]  # of layers that cannot be shrunk
    share = (LEFT * whole - fixed) / report.multiplications[0]
    lobs.shrink(small, batches, multiplications=share, **settings)
    return small


def against_truth(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Shrink by a table, and time the layers that come out."""
    small = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        lobs.shrink(small, batches, latency=LEFT, latency_table=path, multiple=8, progress=False)
        table = LatencyTable.load(path)
    shapes = []
    for network in (model, small):
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        session = Session(network, batches, None, None, 0, progress=False)
        with session.evaluating():
            shapes.append(inputs_of(layers, session, batches[0]))
    sums = {"before": 0.0, "planned": 0.0, "measured": 0.0}
    for (layer, before), (other, after) in zip(*(x.items() for x in shapes), strict=True):
        if layer.weight.shape == other.weight.shape:
            continue
        x = torch.randn(after[0])
        sums["before"] += table.seconds(layer, before[0], layer.weight.shape)
        sums["planned"] += table.seconds(layer, before[0], other.weight.shape)
        sums["measured"] += least_seconds(lambda: other(x), x.device)  # noqa: B023
    return {**sums, "measured over planned": sums["measured"] / sums["planned"]}


def main() -> None:
    """Print the table as it grows, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency", action="store_true", help="a table of times against truth")
    parser.add_argument("--images", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--cache", help="prefix of files with trained weights")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each kind, default 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="of timed runs, default %(default)s")
    help_ = "seconds of the processor, not of the clock; with --threads 1"
    parser.add_argument("--processor-time", action="store_true", help=help_)
    help_ = "rows whose names have one of these words"
    parser.add_argument("--only", nargs="+", default=("",), help=help_)
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    training, tested = fashion(arguments.images, "train"), fashion(arguments.images, "t10k")
    batches = list(training.x[:CALIBRATION].split(AT_ONCE))
    if arguments.latency:
        for network in NETWORKS:
            model = trained(network, training, 0, arguments.cache)
            print(network, against_truth(model, batches[:5]), flush=True)
        return
    rows: list[dict[str, Any]] = []
    print("| network | choice | multiplications | error, % | CPU s | times faster |")
    print("| --- | --- | --- | --- | --- | --- |")
    for network in NETWORKS:
        for seed in range(arguments.seeds):
            model = trained(network, training, seed, arguments.cache)
            whole = multiplications(model, batches[0][0])
            for choice in ("dense", *OURS, "L1 norms"):
                if not any(word in f"{network}: {choice}" for word in arguments.only):
                    continue
                begun = time.process_time()
                small = model if choice == "dense" else shrunk(choice, model, batches)
                row: dict[str, Any] = {
                    "network": network,
                    "seed": seed,
                    "choice": choice,
                    "seconds": time.process_time() - begun,
                    "multiplications": multiplications(small, batches[0][0]) / whole,
                    "error": percent_wrong(small, tested),
                }
                if choice in TIMED:
                    pairs, on_processor = arguments.pairs, arguments.processor_time
                    row["faster"] = speed_ups(
                        model, small, batches[0], pairs, processor_time=on_processor
                    )
                rows.append(row)
                faster = as_text(row.get("faster", {}))
                print(
                    f"| {network} {seed} | {choice} | {row['multiplications']:.2f} | "
                    f"{row['error']:.2f} | {row['seconds']:.0f} | {faster} |",
                    flush=True,
                )
    if arguments.out:
        about = {"torch": torch.__version__, "lobs_native": lobs.__version__}
        about |= {"threads": arguments.threads, "rows": rows}
        write_file(arguments.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
