"""The network as it was against the smaller one: memory, times, and the change of the output."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lobs_native.calibration.outputs import SAMPLE, Sample, measure_change, sample_outputs
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf
from lobs_native.network.inference.timing import interleaved, machine, summarized
from lobs_native.network.peak import Peak, give_back

__all__ = [
    "Outputs",
    "ShrinkTimes",
    "bytes_of",
    "in_eval_mode",
    "memory_of",
    "same_sizes",
    "times_of",
]


@dataclass(frozen=True)
class ShrinkTimes:
    """Seconds of the clock for a forward pass of the first batch here, in pairs of runs back to
    back, in the order A, B, B, A, ..."""

    seconds: tuple[float, float]  # medians, before and after
    ratio: float  # within pairs, the median; above 1, the smaller network is faster
    interval: tuple[float, float]  # 95 % of it, by resampling the pairs
    pairs: int
    machine: dict[str, Any]


class Outputs:
    """What the original network returns for a sample of the batches calibrated on, and of those
    held back: some 512 rows of output each."""

    def __init__(self, session: Session, limit: int, kept: contextlib.ExitStack) -> None:
        """Inside :meth:`Session.evaluating`, before anything is changed. ``limit``: bytes in
        memory, the rest on disk, until ``kept`` is closed."""
        self._samples: list[tuple[bool, Sample]] = []
        for held_back in (False, True) if session.held_back else (False,):
            shelf = kept.enter_context(Shelf(limit))
            sample = sample_outputs(session, shelf, SAMPLE, held_back=held_back)
            self._samples.append((held_back, sample))

    @property
    def calibrated(self) -> Sample:
        """That of the batches calibrated on."""
        return self._samples[0][1]

    def changes(self, session: Session) -> tuple[float | None, float | None]:
        """``||output - original|| / ||original||`` now, on both samples; None where there is none,
        or nothing to compare."""
        found: dict[bool, float] = {}
        for held_back, sample in self._samples:
            change = measure_change(session, sample=sample, held_back=held_back)
            if change is not None and change.size:
                found[held_back] = (change.difference / change.size) ** 0.5
        return found.get(False), found.get(True)


def bytes_of(model: nn.Module) -> int:
    """Of all parameters and buffers, each once."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def memory_of(session: Session, batch: Any) -> int | None:
    """The peak bytes that a forward pass of a batch takes above what is in use before it: of what
    torch allocates on the model's CUDA devices, or else of the process, as Linux counts it, to some
    pages. None where that is not known. After a first pass, and inside :meth:`Session.evaluating`.
    """
    devices = {p.device for p in session.model.parameters() if p.is_cuda}
    torch.manual_seed(session.seed)
    give_back()
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    with Peak().measuring() as peak:
        session.call(session.model, batch)
        process = peak.bytes()
    if devices:
        return sum(torch.cuda.max_memory_allocated(x) - held for x, held in before.items())
    return process


def same_sizes(model: nn.Module) -> nn.Module:
    """A copy that has the parameters and buffers of ``model`` itself, and keeps their sizes when
    the model gets others. ArgumentError if the model cannot be copied."""
    held = {id(x): x for x in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo=dict(held))
    except Exception as error:  # whatever a module's own attributes raise
        raise ArgumentError(f"model: it cannot be copied: {error}") from error


def times_of(before: nn.Module, session: Session, batch: Any, pairs: int) -> ShrinkTimes:
    """Of a network of the sizes that the session's had, and of that one, in eval mode."""
    devices = {p.device for p in session.model.parameters() if p.is_cuda}

    def run(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            session.call(model, batch)
            for device in devices:
                torch.cuda.synchronize(device)

        return forward

    with (
        torch.random.fork_rng(devices=[device.index for device in devices]),
        in_eval_mode(before),
        in_eval_mode(session.model),
        torch.inference_mode(),
    ):
        sides = run(before), run(session.model)
        for each in sides:
            each()  # what the first call alone does
        seconds = interleaved(sides, pairs)
    slow, fast, ratio, interval = summarized(*seconds)
    return ShrinkTimes((slow, fast), ratio, interval, pairs, machine())


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
