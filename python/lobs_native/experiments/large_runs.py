"""What :mod:`large` measures: one network under one method, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from lobs_native.experiments.stages import Spent

__all__ = ["LayerRun", "NetworkRun"]


@dataclass
class LayerRun:
    """One layer under one method."""

    name: str
    rows: int
    columns: int
    patches: float
    kept: float
    method: str
    error: float  # relative, on the calibration images
    inverse: float  # core seconds
    pruning: float
    sampled: dict[str, float] = field(default_factory=dict)  # "exact" on some rows only


@dataclass
class NetworkRun:
    """One network under one method."""

    network: str
    method: str
    images: int
    sparsity: float
    stages: dict[str, Spent]
    seconds: float  # that passed
    core_seconds: float  # of all threads
    resident: int  # bytes before pruning: program, network, and one forward pass
    planned: int  # bytes besides those, as planned before the start
    layers: list[LayerRun]
    left_out: list[str]
    before: dict[str, float]  # what the network does on the images to test on
    after: dict[str, float]
