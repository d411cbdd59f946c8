"""How fast a pruned network is on this machine, against its dense counterpart."""

from __future__ import annotations

import copy
import datetime
import functools
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.calibration.hooks import attached
from lobs_native.errors import ArgumentError
from lobs_native.network.inference import engines
from lobs_native.network.inference.sparse_linear import share_of_zeros, sparse_linear
from lobs_native.ops import backends
from lobs_native.ops.sliced import DTYPES_OF_VALUES

__all__ = [
    "EngineSpeed",
    "LayerSpeed",
    "SpeedReport",
    "interleaved",
    "machine",
    "measure_speed",
    "processor",
    "summarized",
]

RESAMPLES = 1000
PAYS = 1.05  # what the whole interval must lie above
SIZABLE = 1 << 16  # weights of a layer worth a row of its own


@dataclass(frozen=True)
class EngineSpeed:
    """One engine: medians, and the dense time over the pruned time with its 95 % interval."""

    engine: str
    version: str
    dense_seconds: float
    pruned_seconds: float
    ratio: float  # within pairs; above 1, the pruned network is faster
    interval: tuple[float, float]
    difference: float  # largest between its output and torch's, relative to the largest output


@dataclass(frozen=True)
class LayerSpeed:
    """One linear layer in torch and as a ``SparseLinear``, for as many rows as the network has."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    rows: int
    dense_seconds: float
    pruned_seconds: float  # as a SparseLinear
    ratio: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class SpeedReport:
    """What :func:`measure_speed` found."""

    engines: tuple[EngineSpeed, ...]
    left: dict[str, str]  # engine -> why it was not measured
    layers: tuple[LayerSpeed, ...]  # the first of every shape that the batch reached
    sparsity: float  # of all linear layers together
    parameters: tuple[int, int]  # dense, pruned
    counterpart: str  # what the pruned network was compared with
    advice: str
    pairs: int
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)


def measure_speed(
    model: nn.Module,
    batch: Any,
    *,
    against: nn.Module | None = None,
    runtimes: Sequence[str] | None = None,
    pairs: int = 7,
) -> SpeedReport:
    """Time a pruned network against its dense counterpart, in the runtimes that are installed.

    Each ratio comes from pairs of runs back to back, in the order A, B, B, A, ..., so that a
    machine that changes its speed does not distort it. Times are those of the clock, on the threads
    that torch uses.

    Parameters
    ----------
    model : nn.Module
        The pruned network, on the CPU. Not modified, but evaluated in eval mode.
    batch : Tensor, tuple or dict of tensors
        What the network is called with: ``model(batch)``, ``model(*batch)`` or ``model(**batch)``.
    against : nn.Module, optional
        The dense network. Default: a copy of ``model`` with small random numbers in place of the
        zeros of its linear layers, which takes as long as the dense network did.
    runtimes : sequence of str, optional
        Some of "torch", "lobs.to_sparse", "torch.compile", "onnxruntime" and "openvino". Default:
        all that are installed. ``lobs.to_sparse`` is compared with dense torch; it replaces layers
        from half zeros on for up to 8 rows, and from 70 % on for more.
    pairs : int
        Pairs of runs per runtime.

    Returns
    -------
    SpeedReport

    Raises
    ------
    ArgumentError, DtypeError
        An argument does not fit. A runtime that fails is named in the report with its reason.
    """
    pairs = checks.positive_int(pairs, "pairs")
    for name in runtimes or ():
        checks.check_choice(name, "runtimes", tuple(engines.ENGINES))
        if why := engines.missing(name):
            raise ArgumentError(f"runtimes: {name} {why}")
    pruned = copy.deepcopy(model).eval()
    dense = copy.deepcopy(model if against is None else against).eval()
    if against is None:
        _fill_zeros(dense)
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for name, side in (("dense", dense), ("pruned", pruned)):
            subjects.append(engines.Subject(side, batch, Path(folder) / name))
            subjects[-1].folder.mkdir()
        measured, left = _engines(subjects, runtimes, pairs)
        layers = tuple(_layers(subjects[1], pairs))
    linear = {n: m for n, m in pruned.named_modules() if type(m) is nn.Linear}
    zeros = sum(int((m.weight == 0).sum()) for m in linear.values())
    total = sum(m.weight.numel() for m in linear.values())
    sparsity = zeros / total if total else 0.0
    return SpeedReport(
        engines=tuple(measured),
        left=left,
        layers=layers,
        sparsity=sparsity,
        parameters=(_size(dense), _size(pruned)),
        counterpart="itself with its zeros filled" if against is None else "the network given",
        advice=advice(measured, layers, sparsity),
        pairs=pairs,
        machine=machine(),
    )


def _engines(
    subjects: Sequence[engines.Subject], runtimes: Sequence[str] | None, pairs: int
) -> tuple[list[EngineSpeed], dict[str, str]]:
    """What was measured, and why the others were not."""
    dense, pruned = subjects
    measured: list[EngineSpeed] = []
    left: dict[str, str] = {}
    baseline = engines.ENGINES["torch"](dense)
    wanted = torch.as_tensor(engines.ENGINES["torch"](pruned)())
    for name, make in engines.ENGINES.items():
        if runtimes is not None and name not in runtimes:
            continue
        if why := engines.missing(name):
            left[name] = why
            continue
        try:
            fast = make(pruned)
            slow = baseline if name == "lobs.to_sparse" else make(dense)
            found = torch.as_tensor(fast())
            slow()
        except Exception as error:  # whatever another program's converter raises
            left[name] = engines.first_line(error)
            continue
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        summary = summarized(*interleaved(slow, fast, pairs))
        measured.append(EngineSpeed(name, engines.engine_version(name), *summary, difference))
    return measured, left


def advice(measured: Sequence[EngineSpeed], layers: Sequence[LayerSpeed], sparsity: float) -> str:
    """One sentence: whether the sparsity pays here, and what would."""
    rows = max((layer.rows for layer in layers), default=0)
    least = engines.least_sparsity(rows)
    paying = [row for row in measured if row.interval[0] > PAYS]
    if paying:
        best = min(paying, key=lambda row: row.pruned_seconds)
        how = f" (with sparsity={least})" if best.engine == "lobs.to_sparse" else ""
        return (
            f"It pays here: {best.engine}{how} runs the pruned network {best.ratio:.2f} times as "
            "fast as the dense one."
        )
    if not sparsity:
        return (
            "It does not pay here: no linear weight is zero. If the network is smaller instead, "
            "give the one before it (against=, --against)."
        )
    way = "lobs-native shrink makes a network smaller, and faster in every runtime"
    if sparsity < least:
        return (
            f"It does not pay here: {sparsity:.0%} of the linear weights are zero, and to_sparse "
            f"needs about 50 % for a few rows and 70 % for 100 ({rows} here); {way}."
        )
    return (
        f"It does not pay here in what was measured, with {rows} rows per layer: to_sparse is for "
        f"few rows, such as one token at a time; {way}."
    )


def _fill_zeros(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            noise = torch.randn(weight.shape, generator=generator) * 1e-3
            weight.copy_(torch.where(weight == 0, noise.to(weight.dtype), weight))


def interleaved(
    slow: engines.Run, fast: engines.Run, pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds of the clock of both, in the order A, B, B, A, ..."""
    seconds: tuple[list[float], list[float]] = ([], [])
    sides = ((slow, seconds[0]), (fast, seconds[1]))
    for pair in range(pairs):
        for run, into in sides if pair % 2 == 0 else reversed(sides):
            begun = time.perf_counter()
            run()
            into.append(time.perf_counter() - begun)
    return seconds


def summarized(
    slow: Sequence[float], fast: Sequence[float]
) -> tuple[float, float, float, tuple[float, float]]:
    """Medians of both, the median ratio, and its 95 % interval by resampling the pairs."""
    ratios = torch.tensor([a / b for a, b in zip(slow, fast, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    middle = float(ratios.quantile(0.5))
    return statistics.median(slow), statistics.median(fast), middle, (low, high)


def _layers(subject: engines.Subject, pairs: int) -> list[LayerSpeed]:
    """The first layer of every shape that this batch reaches, on the rows that it gets."""
    names = {
        module: name
        for name, module in subject.model.named_modules()
        if type(module) is nn.Linear
        and module.weight.numel() >= SIZABLE
        and module.weight.dtype in DTYPES_OF_VALUES
        and bool((module.weight == 0).any())  # something for a sparse kernel to skip
    }
    firsts: dict[tuple[int, int], tuple[nn.Linear, Tensor]] = {}

    def keep(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        shape = (module.out_features, module.in_features)
        if shape not in firsts:
            firsts[shape] = (module, inputs[0].detach().clone())

    with attached([module.register_forward_pre_hook(keep) for module in names]):
        engines.ENGINES["torch"](subject)()
    found = []
    for shape, (module, x) in firsts.items():
        sparse = sparse_linear(module)
        with torch.inference_mode():
            module(x), sparse(x)
            sides = functools.partial(module, x), functools.partial(sparse, x)
            seconds = interleaved(*sides, pairs)
        share, rows = share_of_zeros(module.weight), x.numel() // shape[1]
        found.append(LayerSpeed(names[module], shape, share, rows, *summarized(*seconds)))
    return found


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        lines = ""
    match = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What times depend on: the processor, the threads, the platform, the date."""
    return {
        "processor": processor(),
        "level": next(detail for name, _, detail in backends() if name == "cpu"),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }
