"""Search for the defaults: the damping, and the number of calibration rows.

Every linear layer is calibrated on the original network's inputs, on 10 rows and more, and pruned
with a damping of 1e-6 to 1. Errors are those on held-out data: of each layer (with the second
moment of the held-out inputs) and of the network's output. The last tables show what each damping
costs compared with the best one for the same network, method and number of rows. The networks are
also pruned as a whole by "exact", with inputs "pruned" and "corrected".
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.solvers.hessian import Hessian
from paper import markdown as page
from paper.defaults.page import Row, Whole, defaults_page
from paper.defaults.subjects import Batch, Subject, encoder, lenet

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "defaults"
HELP = "how many calibration rows, and how much damping: errors on held-out data"
STEM = "paper-defaults"
METHODS = ("exact", "sweep", "lobs")
INPUTS = ("pruned", "corrected")  # for networks pruned as a whole
ROWS = (10, 30, 100, 300, 1000, 3000, 5000, 10_000, 30_000, 60_000)
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT = 0.01
SHORT_ROWS, SHORT_DAMPINGS = (100, 1000), (1e-4, 1e-2, 1.0)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this experiment, besides the common ones."""
    add = command.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with mnist/ and lenet300-100/")
    add("--encoder", type=Path, metavar="DIR", help="folder of a BERT-like encoder, with --text")
    add("--text", type=Path, metavar="FILE", help="running text to calibrate and measure on")
    text = "blocks of the encoder that are pruned (default: 2)"
    add("--blocks", type=int, nargs="+", default=[2], metavar="N", help=text)
    text = "share of the encoder's weights that is kept (default: %(default)s)"
    add("--kept", type=float, default=0.5, metavar="SHARE", help=text)
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all three")


def run(options: argparse.Namespace) -> int:
    """Carry out the experiment and return the exit code."""
    if not options.data and not options.encoder:
        raise ArgumentError("data, encoder: give at least one of them")
    if bool(options.encoder) != bool(options.text):
        raise ArgumentError("encoder, text: they go together")
    if not 0 < options.kept < 1:
        raise ArgumentError(f"kept: {options.kept:g}; it is a share between 0 and 1")
    subjects = []
    if options.data:
        subjects.append(lenet(options.data))
    if options.encoder:
        subjects.append(encoder(options.encoder, options.text, options.blocks, options.kept))
    rows: list[Row] = []
    whole: list[Whole] = []
    for subject in subjects:
        rows += _explore(subject, options)
        whole += _explore_whole(subject, options)
        descriptions = {s.name: s.description for s in subjects}
        threads = torch.get_num_threads()
        numbers: dict[str, Any] = {"torch": str(torch.__version__), "threads": threads}
        numbers |= {"lobs_native": lobs.__version__, "networks": descriptions}
        numbers["rows"] = [dataclasses.asdict(row) for row in rows]
        numbers["whole"] = [dataclasses.asdict(row) for row in whole]
        content = defaults_page(descriptions, rows, whole, DEFAULT)
        page.save(options.out, STEM, content, numbers)  # after each: they are long
    print(content)
    return 0


def _explore(subject: Subject, options: argparse.Namespace) -> list[Row]:
    """Try all settings on one network."""
    swept = _swept(subject, options)
    wanted = swept if options.short else ROWS
    counts = sorted({min(n, subject.largest) for n in (*wanted, *swept)})
    heldout = _moments(subject, subject.heldout)
    rows = []
    for count in counts:
        moments = _moments(subject, subject.batches(count))
        dampings = (SHORT_DAMPINGS if options.short else DAMPINGS) if count in swept else (DEFAULT,)
        for method, damping in itertools.product(options.method, dampings):
            row = _prune(subject, moments, heldout, method, damping)
            rows.append(row)
            print(
                f"{subject.name}, {row.rows:g} rows, {method}, damping {damping:g}: held-out layer "
                f"error {row.heldout:.4g}, output {row.network['output']:.4g}, {row.seconds:.1f} s",
                flush=True,
            )
    return rows


def _swept(subject: Subject, options: argparse.Namespace) -> list[int]:
    """The numbers of rows with which every damping is tried."""
    wanted = SHORT_ROWS if options.short else subject.swept
    return sorted({min(count, subject.largest) for count in wanted})


def _explore_whole(subject: Subject, options: argparse.Namespace) -> list[Whole]:
    """Prune the network as a whole with every damping."""
    counts = _swept(subject, options)
    dampings = SHORT_DAMPINGS if options.short else DAMPINGS
    results = []
    for count, inputs, damping in itertools.product(counts, INPUTS, dampings):
        model = subject.copy()
        report = lobs.prune(
            model,
            list(subject.batches(count)),
            sparsity=0.5,
            damping=damping,
            inputs=inputs,
            include=list(subject.kept),
            overrides={name: {"sparsity": 1 - kept} for name, kept in subject.kept.items()},
            forward=subject.forward,
            progress=False,
        )
        network = subject.measure(model)
        results.append(Whole(subject.name, count, inputs, damping, network, report.seconds))
        print(
            f"{subject.name}, {count} rows, exact, {inputs}, damping {damping:g}: output "
            f"{network['output']:.4g}, {report.seconds:.1f} s",
            flush=True,
        )
    return results


@dataclass(frozen=True)
class _Moment:
    matrix: Tensor  # (C + 1, C + 1)
    rows: float


@torch.no_grad()
def _moments(subject: Subject, batches: Any) -> dict[str, _Moment]:
    """Second moments of the inputs of every layer of the original network."""
    layers = subject.layers(subject.model)
    sums = {name: Hessian(layer.in_features, bias=True) for name, layer in layers.items()}
    handles = []
    for name, layer in layers.items():

        def see(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            sums[name].update(args[0])

        handles.append(layer.register_forward_pre_hook(see))
    try:
        for batch in batches:
            _run(subject, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _Moment(h.matrix(), h.rows) for name, h in sums.items()}


def _run(subject: Subject, batch: Batch) -> None:
    subject.forward(subject.model, batch)


@torch.no_grad()
def _prune(
    subject: Subject,
    moments: Mapping[str, _Moment],
    heldout: Mapping[str, _Moment],
    method: str,
    damping: float,
) -> Row:
    """Prune all layers, and measure their errors on the calibration and held-out data and the
    network's."""
    model = subject.copy()
    begun = time.perf_counter()
    seen: list[float] = []
    other: list[float] = []
    used: list[float] = []
    for name, layer in subject.layers(model).items():
        before = _with_bias(layer.weight, layer.bias)
        out = lobs.prune_weight(
            layer.weight.detach(),
            moments[name].matrix,
            sparsity=1 - subject.kept[name],
            method=method,
            bias=layer.bias.detach(),
            damping=damping,
        )
        assert out.bias is not None
        change = _with_bias(out.weight, out.bias) - before
        for errors, moment in ((seen, moments[name]), (other, heldout[name])):
            errors.append(_energy(change, moment.matrix) / _energy(before, moment.matrix))
        used.append(out.damping)
        layer.weight.copy_(out.weight)
        layer.bias.copy_(out.bias)
    seconds = time.perf_counter() - begun
    return Row(
        subject=subject.name,
        rows=max(moment.rows for moment in moments.values()),
        method=method,
        damping=damping,
        used=max(used),
        calibration=_mean(seen),
        heldout=_mean(other),
        layers=dict(zip(subject.kept, other, strict=True)),
        network=subject.measure(model),
        seconds=seconds,
    )


def _with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """(R, C + 1) float64."""
    return torch.cat([weight, bias[:, None]], 1).detach().double()


def _energy(weight: Tensor, H: Tensor) -> float:
    return float(((weight @ H) * weight).sum())


def _mean(errors: list[float]) -> float:
    """Geometric mean; zero errors count as the smallest number there is."""
    return math.exp(sum(math.log(max(e, 1e-300)) for e in errors) / len(errors))
