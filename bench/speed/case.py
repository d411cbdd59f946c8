"""A benchmark case: one problem, our method and its rivals, their inputs, and the check of answers.

``bench_<stem>.py`` and ``paired.py`` both run the cases that ``cases/<stem>.py`` builds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# What tells the time. On a machine that other programs use too, runs on one thread are better told
# by ``time.process_time``, which ``paired.py --processor-time`` sets.
now: Callable[[], float] = time.perf_counter


def _unchanged(*inputs: Any) -> Any:
    return inputs


def _identity(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Side:
    """One method of a comparison: ours or a rival's.

    Timed is ``run(*prepare(*inputs))`` without the preparation; ``run`` of ours also accepts
    ``backend=``. Where a run takes too long for a pair, ``seconds`` extrapolates its time and
    ``answer`` computes some rows of its answer. With both of them ``run`` may be missing.
    """

    label: str
    run: Callable[..., Any] | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None  # default: the case's
    result: Callable[[Any], Any] = _identity  # what the case judges, from what run returns
    error: Callable[[Any], float] | None = None  # default: the case's
    note: str = ""
    work: float | None = None  # default: the case's. Otherwise rates are compared, not times
    seconds: Callable[[], float] | None = None
    answer: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One problem with everything that is needed to time and to check each side."""

    name: str
    inputs: tuple[Any, ...]  # on the CPU
    work: float  # operations or bytes of one run, from the Cost line of the operation's contract
    unit: str  # of 1e9 operations or bytes per second: "GFLOP/s" or "GB/s"
    error: Callable[[Any], float]  # of an answer; infinite where no error can excuse it
    tolerance: float  # largest error of a correct answer
    ours: Side
    rivals: Mapping[str, Side] = field(default_factory=dict)  # by the name that benchmarks use
    prepare: Callable[..., tuple[Any, ...]] = _unchanged  # untimed: fresh copies of what run writes
    most_pairs: int | None = None  # for runs that take long

    def prepared(self, side: Side, inputs: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Fresh arguments of ``side.run``, from ``inputs`` (default: the case's)."""
        prepare = side.prepare or self.prepare
        return prepare(*(self.inputs if inputs is None else inputs))

    def seconds(self, side: Side) -> float:
        """Time one run without its preparation, or the extrapolation from a part of it."""
        if side.seconds is not None:
            return side.seconds()
        assert side.run is not None
        return clock(side.run, lambda: self.prepared(side))()

    def answer(self, side: Side) -> Any:
        """Compute what ``error_of`` judges."""
        if side.answer is not None:
            return side.answer()
        assert side.run is not None
        return side.result(side.run(*self.prepared(side)))

    def error_of(self, side: Side, answer: Any) -> float:
        """Judge an answer of this side."""
        return (side.error or self.error)(answer)

    def against(self, *rivals: str) -> Case:
        """Keep these rivals only."""
        return replace(self, rivals={name: self.rivals[name] for name in rivals})


def clock(
    run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple
) -> Callable[[], float]:
    """Seconds of ``run(*prepare())`` without the preparation."""

    def seconds() -> float:
        arguments = prepare()
        begun = now()
        run(*arguments)
        return now() - begun

    return seconds


def copy_first(first: Tensor, *others: Any) -> tuple[Any, ...]:
    """Prepare inputs of which ``run`` overwrites the first."""
    return (first.clone(), *others)


def relative_error(expected: Tensor) -> Callable[[Tensor], float]:
    """Distance from a float64 answer in the Frobenius norm, relative to that answer.

    ``expected`` may hold the first rows only: rows are independent, so a few of them check the
    rest.
    """

    def error(x: Tensor) -> float:
        first = x[: len(expected)].to(torch.float64)
        return float((first - expected).norm() / expected.norm())

    return error
