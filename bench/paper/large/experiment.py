"""AlexNet, VGG-16 and ResNet-50 pruned as in the paper and exactly: time and memory by stage.

With --weights (one network; a safetensors file with torchvision's names) and --images (a folder of
ImageNet's training images; labels are not needed) it prunes your network. With --tested (one folder
of images for each class) it measures the errors before and after. Without them, random weights and
generated images show that it runs, how long it takes and how much memory it needs; their errors
mean nothing.

Layers that do not fit into --memory are left out, and the page estimates what they would take. A
layer on which "exact" would take longer than --longest is pruned by the paper's method instead, and
a few of its rows are pruned exactly for the time and the error. Runs of other networks and methods
that are in the folder --out already are shown on the same page.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.network import bound, layerwise
from lobs_native.report.report import Report
from lobs_native.solvers import problem
from paper import markdown as page
from paper.large.images import FolderImages, GeneratedImages, ImageBatches
from paper.large.networks import NETWORKS, load_weights, random_weights
from paper.large.page import large_page
from paper.large.printed import kept_shares
from paper.large.rates import Rates, Work, measured_rates, wide_layer
from paper.large.runs import LayerRun, NetworkRun, Results
from paper.large.stages import Spent, Stages, memory

__all__ = ["HELP", "NAME", "LayerRun", "NetworkRun", "add_arguments", "run"]

NAME = "large"
HELP = "AlexNet, VGG-16 and ResNet-50: time and memory by stages, or your weights and images"
STEM = "paper-large"
METHODS = ("lobs", "exact")
IMAGES = {"alexnet": 1000, "vgg16": 32, "resnet50": 200}
SHORT_IMAGES = 8
TESTED = 200
BATCH = 8
SAMPLED = 8  # rows of a layer on which "exact" is measured where all would take too long


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this experiment, besides the common ones."""
    add = command.add_argument
    names = tuple(NETWORKS)
    add("--network", nargs="+", choices=names, default=list(names), help="default: all three")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    add("--weights", type=Path, metavar="FILE", help="safetensors, torchvision's names")
    add("--images", type=Path, metavar="DIR", help="images to calibrate on")
    add("--tested", type=Path, metavar="DIR", help="images to test on, a folder for each class")
    each = ", ".join(f"{network} {count}" for network, count in IMAGES.items())
    text = f"images to calibrate on (default: {each})"
    add("--count", type=int, metavar="N", help=text)
    add("--tests", type=int, default=TESTED, metavar="N", help="to test on (default: %(default)s)")
    add("--batch", type=int, default=BATCH, metavar="N", help="at once (default: %(default)s)")
    text = "share kept in every layer, 0 to 1 (default: the paper's, layer by layer)"
    add("--kept", type=float, metavar="SHARE", help=text)
    add("--damping", type=float, default=0.01, help="default: %(default)s")
    text = "gigabytes that pruning may take besides the network (default: half of what is free)"
    add("--memory", type=float, metavar="GB", help=text)
    text = "core seconds that 'exact' may take on one layer (default: %(default)s)"
    add("--longest", type=float, default=120.0, metavar="S", help=text)


def run(options: argparse.Namespace) -> int:
    """Carry out the experiment and return the exit code."""
    _check(options)
    memory = round(1e9 * options.memory) if options.memory else _free() // 2
    results = Results.read(options.out / f"{STEM}.json")
    rates = measured_rates(512 if options.short else 2048)
    facts = _facts(options, memory, rates)
    for network, method in itertools.product(options.network, options.method):
        print(f"{network}, {method} ...", flush=True)
        experiment = _Experiment(network, options, memory, rates)
        run = experiment.prune(method)
        count, too_large = experiment.count, experiment.too_large
        del experiment  # and its network
        results.add(run, [wide_layer(work, rates, memory, count) for work in too_large])
        content = large_page(facts, rates, results.runs, results.wide)
        numbers = {"about": facts, **results.to_dict()}
        page.save(options.out, STEM, content, numbers)  # after every run: they are long
    print(content)
    return 0


class _Experiment:
    """One network, its images, and which of its layers can be pruned here, and how."""

    def __init__(
        self, network: str, options: argparse.Namespace, memory: int, rates: Rates
    ) -> None:
        self.network, self.options, self.memory, self.rates = network, options, memory, rates
        self.model = NETWORKS[network]().eval()
        if options.weights:
            load_weights(self.model, options.weights)
        else:
            random_weights(self.model)
        self.count = options.count or (SHORT_IMAGES if options.short else IMAGES[network])
        self.images = _images(options.images, self.count, options.batch, seed=0)
        tests = min(options.tests, SHORT_IMAGES) if options.short else options.tests
        self.tested = _images(options.tested, tests, options.batch, seed=1 << 20)
        self.works = self._works()
        fits = {w.name: self._fits(w, "lobs") for w in self.works}
        self.too_large = [w for w in self.works if not fits[w.name]]
        self.pruned = [w for w in self.works if fits[w.name]]

    def prune(self, method: str) -> NetworkRun:
        """Prune by one method; ``lobs`` where exact would take too long or too much memory."""
        too_long: set[str] = set()
        too_wide: set[str] = set()
        if method == "exact":
            most = self.options.longest * self.rates.exact
            too_long = {w.name for w in self.pruned if w.exact > most}
            too_wide = {w.name for w in self.pruned if not self._fits(w, "exact")}
        used = {w.name: "lobs" if w.name in too_long | too_wide else method for w in self.pruned}
        overrides: dict[str, dict[str, Any]] = {
            w.name: {"sparsity": 1 - w.kept, "method": used[w.name]} for w in self.pruned
        }
        settings: dict[str, Any] = {
            "sparsity": 0.5,
            "method": method,
            "inputs": "dense",
            "damping": self.options.damping,
            "include": [w.name for w in self.pruned],
            "overrides": overrides,
            "memory": self.memory,
        }
        reference = self._outputs()
        before = _measured(reference, reference, self.tested.labels)
        watch = _Watch(too_long - too_wide)
        start, begun, cores = memory(), time.perf_counter(), time.process_time()
        with watch.watching():
            report = lobs.prune(self.model, self.images, **settings)
        seconds, cores = time.perf_counter() - begun, time.process_time() - cores
        return NetworkRun(
            network=self.network,
            method=method,
            images=self.count,
            sparsity=report.sparsity,
            stages=watch.totals(),
            seconds=seconds,
            core_seconds=cores,
            resident=start,
            planned=report.settings["plan"]["memory"],
            layers=self._layer_runs(report, watch),
            left_out=[w.name for w in self.too_large],
            before=before,
            after=_measured(self._outputs(), reference, self.tested.labels),
        )

    def _layer_runs(self, report: Report, watch: _Watch) -> list[LayerRun]:
        reported = {layer.name: layer for layer in report.layers}
        return [
            LayerRun(
                name=w.name,
                rows=w.rows,
                columns=w.columns,
                patches=reported[w.name].rows,
                kept=w.kept,
                method=reported[w.name].method,
                error=reported[w.name].relative_error,
                inverse=watch.seconds("inverse", w.name),
                pruning=watch.seconds("pruning", w.name),
                sampled=watch.sampled.get(w.name, {}),
            )
            for w in self.pruned
        ]

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        """(N, 1000) on the images to test on."""
        return torch.cat([self.model(batch) for batch in self.tested])

    @torch.no_grad()
    def _works(self) -> list[Work]:
        """The size of each layer, from a forward pass of one image."""
        patches: dict[str, int] = {}
        handles = []
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        }
        for name, module in layers.items():

            def seen(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                patches[name] = output[0].numel() // output.shape[1]

            handles.append(module.register_forward_hook(seen))
        self.model(torch.zeros(1, 3, 224, 224))
        for handle in handles:
            handle.remove()
        kept = kept_shares(self.network, list(layers), self.options.kept)
        return [
            Work(
                name=name,
                rows=module.weight.shape[0],
                columns=module.weight[0].numel() + (module.bias is not None),
                patches=patches[name],
                kept=kept[name],
            )
            for name, module in layers.items()
        ]

    def _fits(self, work: Work, method: str) -> bool:
        """Whether a plan for this layer alone is possible."""
        if 10 * work.moment_bytes < self.memory:
            return True
        first = next(iter(self.images))
        try:
            lobs.plan_prune(
                self.model,
                [first],
                sparsity=1 - work.kept,
                method=method,
                inputs="dense",
                include=[work.name],
                memory=self.memory,
            )
        except MemoryError as error:
            print(f"{self.network}: {error}", flush=True)
            return False
        return True


class _Watch:
    """Stages of one call of ``prune``, by layer.

    Where exact removal of a whole layer would take too long, a few rows are removed exactly.
    """

    def __init__(self, too_long: set[str]) -> None:
        self.stages = Stages()
        self.too_long = too_long
        self.sampled: dict[str, dict[str, float]] = {}
        self.layer = ""
        self.inverses: dict[int, Any] = {}  # of the present layer

    def watching(self) -> Any:
        """Watch the functions that do the work."""
        return self.stages.replacing(
            (layerwise, "calibrate", self._calibrate),
            (layerwise, "prune_layer", self._prune_layer),
            (layerwise, "prune_groups", self._prune_groups),
            (problem, "invert", self._invert),
            (problem, "factor", self._factor),
            (bound, "measure_change", self._measure_change),
        )

    def totals(self) -> dict[str, Spent]:
        """Spent by stage, all layers together."""
        sums: dict[str, Spent] = {}
        for name, spent in self.stages.spent.items():
            sum_ = sums.setdefault(name.split(":")[0], Spent())
            sum_.add(spent.seconds, spent.core_seconds, spent.peak)
        return sums

    def seconds(self, stage: str, layer: str) -> float:
        """Core seconds of one layer."""
        spent = self.stages.spent.get(f"{stage}:{layer}")
        return 0.0 if spent is None else spent.core_seconds

    def _calibrate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self.stages("calibration"):
            return original(*args, **kwargs)

    def _measure_change(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self.stages("check"):
            return original(*args, **kwargs)

    def _prune_layer(self, original: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        self.layer = job.layer.name
        return original(job, *args, **kwargs)

    def _invert(self, original: Any, *args: Any) -> Any:
        H = id(args[0])
        if H not in self.inverses:  # a layer that is sampled first has it already
            with self.stages(f"inverse:{self.layer}"):
                self.inverses[H] = original(*args)
                _ = self.inverses[H].A  # computed at the first access, which is here
        return self.inverses[H]

    def _factor(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self.stages(f"inverse:{self.layer}"):
            return original(*args, **kwargs)

    def _prune_groups(
        self, original: Any, W: Tensor, moments: Any, settings: Any, **kwargs: Any
    ) -> Any:
        if self.layer in self.too_long:
            self._sample(original, W, moments, settings, **kwargs)
        with self.stages(f"pruning:{self.layer}"):
            out = original(W, moments, settings, **kwargs)
        self.inverses.clear()
        return out

    def _sample(self, original: Any, W: Tensor, moments: Any, settings: Any, **kwargs: Any) -> None:
        rows = torch.linspace(0, W.shape[1] - 1, min(SAMPLED, W.shape[1])).long()
        bias = kwargs.pop("bias")
        some = {**kwargs, "bias": None if bias is None else bias[:, rows], "importance": None}
        errors = {}
        for method in METHODS:
            with self.stages(f"sample:{self.layer} {method}"):
                tried = dataclasses.replace(settings, method=method)
                out = original(W[:, rows], moments, tried, **some)
            errors[method] = out.relative_error
        spent = self.seconds("sample", f"{self.layer} exact")
        self.sampled[self.layer] = {"rows": len(rows), "seconds": spent, **errors}


# ---- images, and what a network makes of them ----------------------------------------------------


def _images(folder: Path | None, count: int, batch: int, seed: int) -> ImageBatches:
    if folder is None:
        return GeneratedImages(count, batch=batch, seed=seed)
    return FolderImages(folder, count, batch=batch, seed=seed)


def _measured(outputs: Tensor, reference: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Distance from the network before pruning, and errors in percent where labels are known."""
    change = float((outputs - reference).double().norm() / reference.double().norm())
    errors = {"relative distance": change}
    if labels is not None:
        best = outputs.topk(5).indices
        right = best == labels[:, None]
        errors["top-1 error"] = 100 * (1 - float(right[:, 0].double().mean()))
        errors["top-5 error"] = 100 * (1 - float(right.any(1).double().mean()))
    return errors


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that do not fit together, before any work."""
    if options.weights and len(options.network) != 1:
        raise ArgumentError(
            f"weights: they are of one network, but --network is {' '.join(options.network)}"
        )
    if options.weights and not options.weights.is_file():
        raise ArgumentError(f"weights: there is no file {options.weights}")
    if options.kept is not None and not 0 < options.kept <= 1:
        raise ArgumentError(f"kept: {options.kept:g}; it is a share above 0 and at most 1")
    for name in ("count", "tests", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"{name}: {value}; at least 1 is needed")
    if options.tested and not options.weights:
        raise ArgumentError("tested: errors of random weights mean nothing; give --weights too")


def _free() -> int:
    """Bytes of memory available to new programs; 8 GB where the system does not say."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return 1024 * int(match[1]) if match else 8 * 10**9


def _facts(options: argparse.Namespace, memory: int, rates: Rates) -> dict[str, Any]:
    return {
        "weights": "given by the user" if options.weights else "random",
        "images": "a folder of the user's" if options.images else "generated",
        "tested": options.tests if options.tested else None,
        "damping": options.damping,
        "batch": options.batch,
        "memory": memory,
        "longest": options.longest,
        "rates": dataclasses.asdict(rates),
        "torch": str(torch.__version__),
        "lobs_native": lobs.__version__,
        "threads": torch.get_num_threads(),
        "backends": [detail for name, _, detail in lobs.backends() if name == "cpu"],
        "machine": platform.machine(),
    }
