"""What measurements of speed say: records, and a sentence for each network and for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lobs_native.network.inference import engines

__all__ = ["EngineSpeed", "LayerSpeed", "SpeedComparison", "SpeedReport", "advice", "overall"]

PAYS = 1.05  # what the whole interval must lie above


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


@dataclass(frozen=True)
class SpeedComparison:
    """What :func:`compare_speed` found."""

    networks: dict[str, SpeedReport]
    advice: str  # about all of them together

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)


def advice(
    measured: Sequence[EngineSpeed],
    layers: Sequence[LayerSpeed],
    sparsity: float,
    *,
    smaller: bool = False,
) -> str:
    """One sentence: whether the sparsity or the smaller size pays here, and what would."""
    rows = max((layer.rows for layer in layers), default=0)
    least = engines.least_sparsity(rows)
    paying = [row for row in measured if _pays(row)]
    if paying:
        best = min(paying, key=lambda row: row.pruned_seconds)
        how = f" (with sparsity={least})" if best.engine == "lobs.to_sparse" else ""
        return (
            f"It pays here: {best.engine}{how} runs {'the smaller' if smaller else 'the pruned'} "
            f"network {best.ratio:.2f} times as fast as the dense one."
        )
    if smaller:
        return "It does not pay here: the network is smaller, but no faster in what was measured."
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


def overall(reports: Mapping[str, SpeedReport]) -> str:
    """One sentence about several networks: the fastest, and how long the dense one takes."""
    rows = [(name, row) for name, report in reports.items() for row in report.engines]
    paying = [(name, row) for name, row in rows if _pays(row)]
    if not rows:
        return "Nothing could be measured."
    dense = min((row for _, row in rows), key=lambda row: row.dense_seconds)
    where = "torch" if dense.engine == "lobs.to_sparse" else dense.engine  # its counterpart
    takes = f"the dense network takes {dense.dense_seconds * 1e3:.3g} ms at best ({where})"
    if not paying:
        return f"None of them pays here; {takes}."
    name, best = min(paying, key=lambda pair: pair[1].pruned_seconds)
    if best.pruned_seconds >= dense.dense_seconds:
        return f"None of them is faster than the dense network where that is fastest: {takes}."
    return f"Fastest here: {name} in {best.engine}, {best.pruned_seconds * 1e3:.3g} ms; {takes}."


def _pays(row: EngineSpeed) -> bool:
    return row.interval[0] > PAYS
