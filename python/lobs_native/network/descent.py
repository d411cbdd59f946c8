"""Tuning parameters by gradients towards an aim, with the zeros held.

Adam (Kingma & Ba 2015) takes its steps on most of the batches. The others are held back, and decide
what is kept: the values of the pass after which their error was least, or the old ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native.calibration.held_back import in_between
from lobs_native.calibration.sensitivity import requiring_gradients
from lobs_native.layers import overwrite
from lobs_native.rundir.underway import StoppedError, stop

__all__ = ["HELD_BACK", "Aim", "Course", "Tuned", "descend", "tuning_bytes"]

HELD_BACK = 10  # one batch of so many
_BETAS = (0.9, 0.95)
_TINY = 1e-12


class Aim(Protocol):
    """What parameters are tuned towards, on batches by their numbers."""

    @property
    def measure(self) -> str:
        """What :meth:`error` returns, in words."""

    def loss(self, number: int) -> Tensor:
        """The loss on a batch, with gradients."""

    def error(self, numbers: Iterable[int]) -> float:
        """The error on some batches, as it is reported."""


@dataclass(frozen=True)
class Course:
    """How long and how far to go. ``rate`` is that of a step at first, relative to the root mean
    square of the entries of a parameter that are not zero; it falls like a cosine."""

    passes: int
    rate: float
    seed: int
    progress: bool = False
    stoppable: bool = False  # whether a request to stop ends it: what is lost can be made again
    goes_on: Callable[[], object] = bool  # called at every step, for those who wait


@dataclass(frozen=True)
class Tuned:
    """What tuning changed: errors on a sample of the batches that it saw, as many as were held
    back, and on these."""

    name: str  # of the block, or "network"
    measure: str  # what the errors are
    error_before: float
    error_after: float
    held_back_before: float
    held_back_after: float
    kept: bool
    seconds: float


def tuning_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that tuning these takes besides a backward pass: the best values, gradients, masks and
    two moments; where parameters are narrower than float32, values in it; and one gradient of them
    more."""
    total = largest = 0
    for p in parameters:
        own, wide = p.dtype.itemsize, _wide(p).itemsize
        total += p.numel() * (2 * own + 2 * wide + 1 + (wide if own < wide else 0))
        largest = max(largest, p.numel() * wide)
    return total + largest


def descend(
    name: str,
    aim: Aim,
    batches: int,
    parameters: Mapping[str, nn.Parameter],
    pruned: Mapping[str, Tensor],
    course: Course,
) -> Tuned:
    """Tune ``parameters`` (by name) in place; zeros of those in ``pruned`` stay zeros.

    They are changed where that lowers the error on the batches held back, and have their old values
    otherwise. At least two batches are needed. Raises StoppedError if the course is stoppable and
    the run is to stop.
    """
    begun = time.perf_counter()
    held_back = in_between(batches // HELD_BACK or 1, batches)
    training = [n for n in range(batches) if n not in held_back]
    sample = [training[i] for i in sorted(in_between(len(held_back), len(training)))]
    with requiring_gradients(parameters.values(), True):
        before = aim.error(sample), aim.error(held_back)
        least, kept = before[1], False
        steps = _Steps(parameters, pruned, course, len(training))
        generator = torch.Generator().manual_seed(course.seed)
        off = None if course.progress else True
        with tqdm(
            total=course.passes * len(training), desc=f"tune {name}", leave=False, disable=off
        ) as bar:
            for _ in range(course.passes):
                for i in torch.randperm(len(training), generator=generator).tolist():
                    if course.stoppable and stop.is_set():
                        raise StoppedError
                    course.goes_on()
                    steps.step(aim.loss(training[i]))
                    bar.update()
                if (now := aim.error(held_back)) < least:
                    least, kept = now, True
                    steps.remember()
        steps.go_back()
        after = (aim.error(sample), least) if kept else before
    seconds = time.perf_counter() - begun
    return Tuned(name, aim.measure, before[0], after[0], before[1], after[1], kept, seconds)


class _Steps:
    """Steps of Adam for parameters in place, with values in float32 at least."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        pruned: Mapping[str, Tensor],
        course: Course,
        batches: int,
    ) -> None:
        self.parameters = list(parameters.values())
        self.kept = [p.detach() != 0 if name in pruned else None for name, p in parameters.items()]
        # Of a parameter that is wide enough, this is the parameter itself.
        self.masters = [p.detach().to(_wide(p)) for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        sizes = [_size(x) for x in self.masters]
        usual = max(sizes, default=0.0)  # for biases that are still zero
        self.rates = [course.rate * (size or usual) for size in sizes]
        # One for each, so that gradients are masked one at a time, in the same few bytes. Where it
        # runs in one kernel it takes a third of the time.
        self.each = [
            torch.optim.Adam([x], betas=_BETAS, eps=_TINY, **_fused(x)) for x in self.masters
        ]
        largest = max((x.numel() for x in self.masters), default=0)
        self.masked = {
            (device, dtype): torch.empty(largest, dtype=dtype, device=device)
            for device, dtype in {(x.device, x.dtype) for x in self.masters}
        }
        self.taken, self.total = 0, course.passes * batches

    def step(self, loss: Tensor) -> None:
        """One step against the gradient of ``loss``; none if that is not finite."""
        gradients: list[Tensor | None] = list(
            torch.autograd.grad(loss, self.parameters, allow_unused=True)
        )
        falling = (1 + math.cos(math.pi * self.taken / self.total)) / 2
        self.taken += 1
        if not all(g is None or _finite(g) for g in gradients):
            return
        for i, (x, adam) in enumerate(zip(self.masters, self.each, strict=True)):
            g, gradients[i] = gradients[i], None  # so that it is freed
            x.grad = self._masked(i, g)
            adam.param_groups[0]["lr"] = self.rates[i] * falling
            adam.step()
            x.grad = None
            if x.dtype != (p := self.parameters[i]).dtype:
                overwrite(p, x)

    def _masked(self, i: int, gradient: Tensor | None) -> Tensor:
        """The gradient of a parameter in the dtype of its steps, without that of its zeros. It is
        not masked in place: two parameters may have one gradient, and a function may keep it."""
        x, kept = self.masters[i], self.kept[i]
        if gradient is None:
            return torch.zeros_like(x)
        if kept is None:
            return gradient.to(x.dtype)
        out = self.masked[x.device, x.dtype][: x.numel()].view(x.shape)
        return torch.mul(gradient, kept, out=out)

    def remember(self) -> None:
        """The present values are the best so far."""
        for best, p in zip(self.best, self.parameters, strict=True):
            best.copy_(p.detach())

    def go_back(self) -> None:
        """Give the parameters the best values so far."""
        for p, best in zip(self.parameters, self.best, strict=True):
            overwrite(p, best)


def _fused(x: Tensor) -> dict[str, bool]:
    return {"fused": True} if x.device.type in ("cpu", "cuda") else {}


def _finite(x: Tensor) -> bool:
    """Whether all entries are finite, by their sum: ten times as fast as one by one."""
    return bool(x.sum(dtype=_wide(x)).isfinite())


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _size(x: Tensor) -> float:
    """The root mean square of the entries that are not zero; 0 if all are."""
    count = int((x != 0).sum())
    return float((x.double().square().sum() / count).sqrt()) if count else 0.0
