"""How much faster a shrunk network is, in the runtimes that are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

import lobs_native as lobs


def speed_ups(
    before: nn.Module, after: nn.Module, batch: Any, pairs: int, *, processor_time: bool
) -> dict[str, list[float]]:
    """Runtime -> the median of the ratios of times, and its 95 % interval."""
    more = ("onnxruntime", "openvino") if importlib.util.find_spec("onnxscript") else ()
    speed = lobs.measure_speed(
        after,
        batch,
        against=before,
        runtimes=["torch", *(name for name in more if importlib.util.find_spec(name))],
        pairs=pairs,
        processor_time=processor_time,
    )
    return {row.engine: [row.ratio, *row.interval] for row in speed.engines}


def as_text(faster: dict[str, list[float]]) -> str:
    """A cell of a table."""
    return ", ".join(f"{name} {r:.2f} [{a:.2f}, {b:.2f}]" for name, (r, a, b) in faster.items())
