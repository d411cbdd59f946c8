"""How fast pruned networks are on this machine, against their dense counterpart."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.calibration.hooks import attached
from lobs_native.errors import ArgumentError, LobsError
from lobs_native.network.inference import engines
from lobs_native.network.inference.sparse_linear import share_of_zeros, sparse_linear
from lobs_native.network.inference.speed_report import (
    EngineSpeed,
    LayerSpeed,
    SpeedComparison,
    SpeedReport,
    advice,
    overall,
)
from lobs_native.network.inference.timing import interleaved, machine, summarized
from lobs_native.ops.sliced import DTYPES_OF_VALUES

__all__ = ["compare_speed", "measure_speed"]

_CLOCKS = {False: time.perf_counter, True: time.process_time}  # by processor_time
_Timed = Callable[[Sequence[engines.Run]], list[list[float]]]  # runs -> seconds of each, per round
SIZABLE = 1 << 16  # weights of a layer worth a row of its own


def measure_speed(
    model: nn.Module,
    batch: Any,
    *,
    against: nn.Module | None = None,
    runtimes: Sequence[str] | None = None,
    pairs: int = 7,
    processor_time: bool = False,
) -> SpeedReport:
    """Time a pruned network against its dense counterpart, in the runtimes that are installed.

    Each ratio comes from pairs of runs back to back, in the order A, B, B, A, ..., so that a
    machine that changes its speed does not distort it. Times are those of the clock, or with
    ``processor_time`` those of the processor, on the threads that torch uses.

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
    processor_time : bool
        Count the seconds that the processor spends on this process, so that programs beside it
        matter less. For one thread.

    Returns
    -------
    SpeedReport

    Raises
    ------
    ArgumentError, DtypeError
        An argument does not fit. A runtime that fails is named in the report with its reason.
    """
    counterpart, dense = "the network given", against
    if dense is None:
        counterpart, dense = "itself with its zeros filled", copy.deepcopy(model)
        _fill_zeros(dense)
    how: dict[str, Any] = {"runtimes": runtimes, "pairs": pairs, "processor_time": processor_time}
    (report,) = _measured({"": model}, batch, dense, counterpart, **how).values()
    return report


def compare_speed(
    networks: Mapping[str, nn.Module],
    batch: Any,
    *,
    against: nn.Module,
    runtimes: Sequence[str] | None = None,
    pairs: int = 7,
    processor_time: bool = False,
) -> SpeedComparison:
    """Time several networks made from the same dense one, pruned or smaller, against it.

    As :func:`measure_speed`, with all networks in each round: A, B, C, C, B, A, ...

    Parameters
    ----------
    networks : mapping of names to nn.Module
        On the CPU. Not modified.
    batch, runtimes, pairs, processor_time
        As for :func:`measure_speed`; ``pairs`` is the number of rounds.
    against : nn.Module
        The dense network.

    Returns
    -------
    SpeedComparison
        A report for each network, and a sentence that names the fastest.

    Raises
    ------
    ArgumentError, DtypeError
        As for :func:`measure_speed`.
    """
    if not networks:
        raise ArgumentError("networks: there is none to compare")
    how: dict[str, Any] = {"runtimes": runtimes, "pairs": pairs, "processor_time": processor_time}
    reports = _measured(networks, batch, against, "the network given", **how)
    return SpeedComparison(reports, overall(reports))


def _measured(
    networks: Mapping[str, nn.Module],
    batch: Any,
    against: nn.Module,
    counterpart: str,
    *,
    runtimes: Sequence[str] | None,
    pairs: int,
    processor_time: bool,
) -> dict[str, SpeedReport]:
    pairs = checks.positive_int(pairs, "pairs")
    if processor_time and torch.get_num_threads() != 1:
        raise ArgumentError(
            f"processor_time: torch uses {torch.get_num_threads()} threads, whose seconds would be "
            "added up; it is for one: torch.set_num_threads(1), --threads 1"
        )
    timed = functools.partial(interleaved, rounds=pairs, clock=_CLOCKS[processor_time])
    for name in runtimes or ():
        checks.check_choice(name, "runtimes", tuple(engines.ENGINES))
        if why := engines.missing(name):
            raise ArgumentError(f"runtimes: {name} {why}")
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for number, model in enumerate((against, *networks.values())):
            place = Path(folder) / str(number)
            place.mkdir()
            subjects.append(engines.Subject(copy.deepcopy(model).eval(), batch, place))
        dense, *others = subjects
        measured, left = _engines(dense, others, runtimes, timed)
        layers = [tuple(_layers(subject, timed)) for subject in others]
    about = machine() | {"seconds": "processor" if processor_time else "clock"}
    reports = {}
    for i, (name, subject) in enumerate(zip(networks, others, strict=True)):
        sparsity, sizes = _sparsity(subject.model), (_size(dense.model), _size(subject.model))
        said = advice(measured[i], layers[i], sparsity, smaller=sizes[1] < sizes[0])
        reports[name] = SpeedReport(
            engines=tuple(measured[i]),
            left=left[i],
            layers=layers[i],
            sparsity=sparsity,
            parameters=sizes,
            counterpart=counterpart,
            advice=said,
            pairs=pairs,
            machine=about,
        )
    return reports


def _engines(
    dense: engines.Subject,
    others: Sequence[engines.Subject],
    runtimes: Sequence[str] | None,
    timed: _Timed,
) -> tuple[list[list[EngineSpeed]], list[dict[str, str]]]:
    """For each of the others: what was measured, and why the other engines were not."""
    measured: list[list[EngineSpeed]] = [[] for _ in others]
    left: list[dict[str, str]] = [{} for _ in others]
    baseline = engines.ENGINES["torch"](dense)
    wanted = [torch.as_tensor(engines.ENGINES["torch"](other)()) for other in others]
    for name, make in engines.ENGINES.items():
        if runtimes is not None and name not in runtimes:
            continue
        try:
            if why := engines.missing(name):
                raise LobsError(why)
            slow = baseline if name == "lobs.to_sparse" else make(dense)
            slow()
        except Exception as error:  # whatever another program's converter raises
            for reasons in left:
                reasons[name] = engines.first_line(error)
            continue
        runs: dict[int, engines.Run] = {}
        differences = {}
        for i, other in enumerate(others):
            try:
                runs[i] = make(other)
                found = torch.as_tensor(runs[i]())
            except Exception as error:  # likewise
                runs.pop(i, None)
                left[i][name] = engines.first_line(error)
                continue
            differences[i] = float((found - wanted[i]).abs().max() / wanted[i].abs().max())
        seconds, *fast = timed([slow, *runs.values()])
        version = engines.engine_version(name)
        for i, own in zip(runs, fast, strict=True):
            row = EngineSpeed(name, version, *summarized(seconds, own), differences[i])
            measured[i].append(row)
    return measured, left


def _fill_zeros(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            noise = torch.randn(weight.shape, generator=generator) * 1e-3
            weight.copy_(torch.where(weight == 0, noise.to(weight.dtype), weight))


def _layers(subject: engines.Subject, timed: _Timed) -> list[LayerSpeed]:
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
            seconds = timed(sides)
        share, rows = share_of_zeros(module.weight), x.numel() // shape[1]
        found.append(LayerSpeed(names[module], shape, share, rows, *summarized(*seconds)))
    return found


def _sparsity(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
