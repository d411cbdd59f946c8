"""Seconds of runs in turn, what they say together, and the machine that they depend on."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lobs_native.ops import backends

__all__ = ["interleaved", "machine", "processor", "summarized"]

RESAMPLES = 1000


def interleaved(
    runs: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """The seconds of each run in every round; rounds go forth and back in turn."""
    seconds: list[list[float]] = [[] for _ in runs]
    order = list(zip(runs, seconds, strict=True))
    for _ in range(rounds):
        for run, into in order:
            begun = clock()
            run()
            into.append(clock() - begun)
        order.reverse()
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
