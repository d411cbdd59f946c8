"""The page of the large experiment: time, memory and errors, beside what the paper prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paper.large.printed import PAPER
from paper.large.rates import Rates, WideLayer
from paper.large.runs import LayerRun, NetworkRun
from paper.large.stages import Spent
from paper.markdown import table

__all__ = ["large_page"]

_PAPERS_IMAGES = 100_000
_NAMES = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50"}

_OWN = """\
## With your own weights and images

The networks have torchvision's names, so that its published weights load once they are a
safetensors file; pickles are not read here. To make one, where torchvision is installed:

    import torchvision, safetensors.torch
    model = torchvision.models.alexnet(weights="IMAGENET1K_V1")  # vgg16, resnet50
    safetensors.torch.save_file(model.state_dict(), "alexnet.safetensors")

(A .pth file that you have is read by torch with `weights_only=True`; what comes out is what
`save_file` takes.) Then, with ImageNet's images in one folder for each class
(`train/n01440764/...`; labels are not used for pruning):

    python bench/paper large --network alexnet --weights alexnet.safetensors \\
        --images train --count 2000 --tested val --tests 5000

which adds top-1 and top-5 errors before and after to the table. `--kept 0.5` keeps the same share
in every layer. A ResNet-50's batch normalisation is not re-estimated (`lobs.reestimate_batch_norm`
does that).
"""


def large_page(
    facts: Mapping[str, Any],
    rates: Rates,
    runs: Sequence[NetworkRun],
    wide: Mapping[str, Sequence[WideLayer]],
) -> str:
    """Everything that has been measured, as Markdown."""
    parts = [
        "# AlexNet, VGG-16 and ResNet-50\n",
        "Made by `python bench/paper large`.\n",
        _how(facts, rates),
        "## Time and memory by stages\n",
        _stages(runs),
        "## Beside the paper\n",
        _beside(runs, wide),
        "## What was too much for this machine\n",
        _too_much(runs, wide),
        "## Layer by layer\n",
        *(_layers(run) for run in runs),
        _OWN,
    ]
    return "\n".join(parts)


def _how(facts: Mapping[str, Any], rates: Rates) -> str:
    speed = ", ".join(
        f"{name} {value / 1e9:.0f}"
        for name, value in (
            ("second moments", rates.moment),
            ("inverse (float64)", rates.inverse),
            ("removals in the paper's order", rates.lobs),
            ("exact removals", rates.exact),
        )
    )
    backend = facts["backends"][0] if facts["backends"] else "reference"
    return (
        f"Weights: {facts['weights']}; images: {facts['images']}; damping {facts['damping']:g}; "
        f"every layer calibrated on the original network's activations, all positions of every "
        f"image, no labels, no retraining. {facts['threads']} threads ({backend}), torch "
        f"{facts['torch']}; pruning may take {facts['memory'] / 1e9:.1f} GB besides the network. "
        f"Useful arithmetic in GFLOP per second of a core, measured before the start on a layer "
        f"of 2,048 columns (smaller in a short run): {speed}.\n"
    )


def _stages(runs: Sequence[NetworkRun]) -> str:
    header = ["network", "method", "images", "kept, %", "calibration", "inverse", "pruning"]
    header += ["all", "peak, GB", "planned, GB", "output moved by"]
    header += ["top-1 / top-5 error before", "after"]

    def cell(run: NetworkRun, stage: str) -> str:
        spent = run.stages.get(stage, Spent())
        memory = (spent.peak - run.resident) / 1e9
        return f"{spent.seconds:.0f} s, {spent.core_seconds:.0f} core s, {memory:.2f} GB"

    rows = []
    for run in runs:
        peak = max(spent.peak for spent in run.stages.values()) - run.resident
        rows.append(
            [
                _NAMES[run.network],
                _method(run),
                f"{run.images:,}",
                f"{100 * (1 - run.sparsity):.1f}",
                *(cell(run, stage) for stage in ("calibration", "inverse", "pruning")),
                f"{run.seconds:.0f} s, {run.core_seconds:.0f} core s",
                f"{peak / 1e9:.2f}",
                f"{run.planned / 1e9:.2f}",
                f"{run.after['relative distance']:.3f}",
                *(_errors(errors) for errors in (run.before, run.after)),
            ]
        )
    return (
        table(header, rows)
        + "\ns: seconds that passed; core s: what all threads used together, which other programs "
        "on the machine hardly change. Memory is the most at any time in that stage, above what "
        "the program, the network and a forward pass had taken before. Besides the stages, all "
        "contains a look at the first batch and the comparison of the pruned network with the "
        "original one. output moved by: distance of the logits from the original ones, relative "
        "to those, on images that were not calibrated on.\n"
    )


def _method(run: NetworkRun) -> str:
    others = [layer.name for layer in run.layers if layer.method != run.method]
    label = run.method + (f" (lobs in {', '.join(others)})" if others else "")
    return label + (f"; without {', '.join(run.left_out)}" if run.left_out else "")


def _errors(errors: Mapping[str, float]) -> str:
    if "top-1 error" not in errors:
        return "-"
    return f"{errors['top-1 error']:.2f} / {errors['top-5 error']:.2f} %"


def _beside(runs: Sequence[NetworkRun], wide: Mapping[str, Sequence[WideLayer]]) -> str:
    header = ["network", "the paper", "in all, h of a CPU", "its images", "here: images", "patches"]
    header += ["time of a core", f"estimated for {_PAPERS_IMAGES:,} images"]
    rows = []
    for run in runs:
        if run.method != "lobs":
            continue
        paper = PAPER[run.network]
        spent = {k: run.stages.get(k, Spent()).core_seconds for k in ("calibration", "inverse")}
        more = {k: sum(w.seconds[k] for w in wide.get(run.network, ())) for k in spent}
        seconds = sum(spent.values()) + sum(more.values())
        scaled = (spent["calibration"] + more["calibration"]) * _PAPERS_IMAGES / run.images
        estimate = scaled + spent["inverse"] + more["inverse"]
        patches = sum(layer.patches for layer in run.layers)
        rows.append(
            [
                _NAMES[run.network],
                f"{paper.hours:g} h, {paper.machine}",
                f"{paper.hours * paper.processors:.0f}",
                paper.images,
                f"{run.images:,}",
                f"{patches:,.0f} in {len(run.layers)} layers",
                _time(seconds) + (" (in part an estimate, below)" if wide.get(run.network) else ""),
                _time(estimate),
            ]
        )
    printed = "".join(
        f"- {_NAMES[network]}: top-1 / top-5 error in percent {paper.errors}\n"
        if network != "resnet50"
        else f"- {_NAMES[network]}: {paper.errors}\n"
        for network, paper in PAPER.items()
    )
    return (
        "The paper gives hours for the inverse Hessians alone (calibration and inverse): those are "
        "compared, here as the time of one core, with every position of every image. CPUs are "
        "counted as printed, and theirs are of 2012 to 2016. Calibration grows with the number of "
        "images, the inverse does not.\n\n"
        + table(header, rows)
        + "\nErrors that the paper prints, for its own networks:\n\n"
        + printed
    )


def _too_much(runs: Sequence[NetworkRun], wide: Mapping[str, Sequence[WideLayer]]) -> str:
    rows = [_wide_row(network, layer) for network, layers in wide.items() for layer in layers]
    text = ""
    if rows:
        header = ["layer that does not fit", "size", "second moment", "calibration", "inverse"]
        header += ["lobs", "exact"]
        text += (
            table(header, rows)
            + "\nTime of one core for the images above; (m) measured on 64 rows and multiplied, "
            "the others estimated from the rates. The second moment and two more matrices of its "
            "size are needed at the same time.\n\n"
        )
    sampled = [(run, layer) for run in runs for layer in run.layers if layer.sampled]
    if sampled:
        header = [
            "layer too slow for exact",
            "rows",
            "exact on them, core s",
            "all rows, estimated, time of a core",
        ]
        header += ["error there: lobs", "exact"]
        text += table(header, (_sampled_row(run, layer) for run, layer in sampled))
        text += (
            "\nErrors are those on the rows that a layer was calibrated on. Where these are fewer "
            "than the weights that a row keeps, exact removal fits them all, and an error near "
            "zero says nothing of other images: more images are needed there.\n"
        )
    return text or "Nothing.\n"


def _wide_row(network: str, layer: WideLayer) -> list[str]:
    work = layer.work
    return [
        f"{_NAMES[network]} {work.name}",
        f"{work.rows:,} x {work.columns:,}",
        f"{work.moment_bytes / 1e9:.2f} GB",
        *(
            _time(layer.seconds[stage]) + (" (m)" if stage in layer.measured else "")
            for stage in ("calibration", "inverse", "lobs", "exact")
        ),
    ]


def _sampled_row(run: NetworkRun, layer: LayerRun) -> list[str]:
    some = layer.sampled
    return [
        f"{_NAMES[run.network]} {layer.name}, {layer.rows:,} x {layer.columns:,}",
        f"{some['rows']:.0f}",
        f"{some['seconds']:.1f}",
        _time(some["seconds"] * layer.rows / some["rows"]),
        f"{some['lobs']:.2g}",
        f"{some['exact']:.2g}",
    ]


def _layers(run: NetworkRun) -> str:
    header = ["layer", "size", "patches", "kept, %", "method", "inverse, core s", "pruning, core s"]
    header += ["relative error"]
    rows = [
        [
            layer.name,
            f"{layer.rows:,} x {layer.columns:,}",
            f"{layer.patches:,.0f}",
            f"{100 * layer.kept:g}",
            layer.method,
            f"{layer.inverse:.2f}",
            f"{layer.pruning:.2f}",
            f"{layer.error:.4f}",
        ]
        for layer in run.layers
    ]
    mean = math.exp(sum(map(math.log, _positive(run))) / max(1, len(list(_positive(run)))))
    return (
        f"### {_NAMES[run.network]}, {run.method}\n\n"
        + table(header, rows)
        + f"\nGeometric mean of the errors: {mean:.4f}.\n"
    )


def _positive(run: NetworkRun) -> Iterator[float]:
    return (layer.error for layer in run.layers if layer.error > 0)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
