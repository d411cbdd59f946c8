"""The records of a report: pruned layers, layers left alone, and the bound of the whole network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lobs_native.errors import CheckpointError

__all__ = [
    "NEAR",
    "Coverage",
    "ErrorBound",
    "LayerReport",
    "ReportRecord",
    "Skipped",
    "coverage_of",
    "plain",
    "report_of_layer",
]


NEAR = 0.05  # of the least error: what is near enough


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Errors are ``tr(dW H dW^T)`` with the layer's own inputs, computed in float64 from the final
    weights. With inputs "corrected" they are mean squared distances from the outputs of the
    original network (sums, where the notes say so), to which the layers before contribute as well.
    """

    name: str
    kind: str  # "Linear", "Conv2d"; of the module that holds the weight
    shape: tuple[int, ...]  # of the weight tensor
    method: str
    scope: str
    asked: str  # "sparsity 0.5", "threshold 0.001"
    sparsity: float  # reached
    error: float
    relative_error: float  # error / tr(W H W^T)
    damping: float  # used; 0 where the method inverts nothing
    damping_asked: float
    optimality: float  # worst row's distance from the best weights for its mask, in rounding units
    swaps: int  # exchanges of a kept against a removed weight
    rows: float  # input rows (tokens, samples, patches) that H averages over; of all experts
    columns: int  # in_features: the order of H without the bias
    dead_columns: int
    backend: str
    status: str
    notes: tuple[str, ...]
    seconds_calibrating: float
    seconds_pruning: float
    inherited: float | None = None  # error before correction and pruning, with inputs "corrected"
    # Below, None means that the method does not know it, or that the run is older than the field.
    pattern: str | None = None
    dtype: str | None = None  # of the weight
    predicted: float | None = None  # sum of removal costs, with damping: see PrunedWeight
    energy: float | None = None  # tr(W H W^T): the denominator of relative_error
    condition: float | None = None  # of the damped H, estimated from below; of the worst group
    # How many rows of equal weight tell as much, where the output's sensitivity weights them.
    effective_rows: float | None = None
    # The relative error on rows that it was not pruned by, all of which count the same.
    held_back_error: float | None = None
    # The predicted error against the sparsity, as far as the removals were traced.
    curve_sparsity: tuple[float, ...] | None = None
    curve_error: tuple[float, ...] | None = None
    # Of every expert, if the layer holds experts that a router sends rows to.
    expert_rows: tuple[float, ...] | None = None
    expert_sparsity: tuple[float, ...] | None = None
    expert_error: tuple[float, ...] | None = None
    # Peaks in bytes while this layer was pruned, not calibrated: of the process, above its size
    # when the run began; and on the layer's CUDA device, everything that torch had allocated.
    peak_memory: int | None = None
    peak_memory_device: int | None = None

    @property
    def rows_enough(self) -> float | None:
        """The rows with which the error on other data would be within 5 % of the least that any
        number of rows reaches; None where nothing was held back, or rows count differently.

        Weights with d degrees of freedom for each output, fitted to n rows, make an error that is
        ``1 - d/n`` of the least on these rows, and ``1 + d/n`` of it on others (Akaike 1970). The
        ratio of the two gives d, whatever the damping and the choice of a mask make of it.
        """
        alike = self.effective_rows is None
        if self.held_back_error is None or not self.relative_error > 0 or not alike:
            return None
        ratio = max(1.0, self.held_back_error / self.relative_error)
        return self.rows * (ratio - 1) / (ratio + 1) / NEAR


@dataclass(frozen=True)
class Skipped:
    """Weights that were left alone, and the reason.

    ``on_purpose``: by a rule or because the caller said so. Otherwise they could not be pruned, or
    it is not understood how they are used.
    """

    name: str
    reason: str
    weights: int = 0
    on_purpose: bool = False


@dataclass(frozen=True)
class Coverage:
    """All weights of a network, its parameters of two or more dimensions, by what became of them;
    and how many were removed.

    A parameter that several layers share counts once.
    """

    pruned: int
    on_purpose: int  # left out by a rule or by the caller
    not_understood: int  # not pruned because that is impossible, or their use is not understood
    removed: int = 0

    @classmethod
    def of(cls, pruned: int, skipped: Iterable[Skipped], removed: int = 0) -> Coverage:
        """From the number of pruned weights, and all that were left alone."""
        some = list(skipped)
        left = sum(x.weights for x in some if x.on_purpose)
        return cls(pruned, left, sum(x.weights for x in some) - left, removed)

    @property
    def total(self) -> int:
        """All weights."""
        return self.pruned + self.on_purpose + self.not_understood

    @property
    def sparsity(self) -> float:
        """The removed weights over all weights of the network."""
        return self.removed / self.total if self.total else 0.0

    @property
    def missed(self) -> float:
        """The share of those not understood among the weights that were to be pruned."""
        prunable = self.pruned + self.not_understood
        return self.not_understood / prunable if prunable else 0.0


@dataclass(frozen=True)
class ErrorBound:
    """Theorem 3.2 for the whole network, and the distance measured on the calibration inputs.

    The two bounds and the measured distance are ``||output - original output||_F / sqrt(rows)``.
    Where the theorem does not cover the network, the bounds are None and ``reason`` says why.
    """

    covered: bool
    reason: str
    frobenius: float | None = None  # as printed in the paper
    spectral: float | None = None  # the same proof with spectral norms: valid and tighter
    measured: float | None = None
    output_norm: float | None = None  # ||original output||_F / sqrt(rows)
    parts: dict[str, float] | None = None  # what each layer's error contributes to ``spectral``
    rows: float | None = None  # of the output on which ``measured`` was measured
    batches: int | None = None  # those of the calibration data to which these rows belong
    held_back: float | None = None  # ``relative`` on the batches that nothing was calibrated on

    @property
    def relative(self) -> float | None:
        """The measured distance over the original output's norm."""
        return self.share(self.measured)

    def share(self, value: float | None) -> float | None:
        """``value`` over the original output's norm; None where either is unknown."""
        return None if value is None or not self.output_norm else value / self.output_norm


@dataclass(frozen=True)
class ReportRecord:
    """The fields of a report, for what reads one: the review, the page, the JSON."""

    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    error_bound: ErrorBound
    sparsity: float  # weights removed over all weights of the pruned layers
    removed: int
    weights: int
    seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]
    masks: dict[str, Tensor] = field(
        repr=False, compare=False, default_factory=dict
    )  # True = kept; not saved
    coverage: Coverage | None = None  # None: only the pruned layers are known
    missing: tuple[str, ...] = ()  # of an unfinished run: layers that are still to be pruned


def coverage_of(info: Any) -> tuple[tuple[Skipped, ...], int]:
    """What was left alone, and the number of weights to be pruned, as a run's header has them:
    ``{"pruned": int, "skipped": [the fields of Skipped]}``.

    Raises CheckpointError if it is something else.
    """
    try:
        kinds = {field.name: str(field.type) for field in dataclasses.fields(Skipped)}
        skipped = tuple(
            Skipped(**{name: _value(kinds[name], name, value) for name, value in entry.items()})
            for entry in info["skipped"]
        )
        pruned: int = _value("int", "pruned", info["pruned"])
        return skipped, pruned
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"run_dir: what was left alone cannot be read: {error}") from error


def plain(value: Any) -> Any:
    """``value`` as JSON values: an infinity becomes "inf", what JSON cannot hold its ``repr``."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


_LARGEST = (1 << 63) - 1  # of counts and sizes in a report


def report_of_layer(info: Mapping[str, Any]) -> LayerReport:
    """The record whose fields :func:`plain` turned into ``info``.

    Raises CheckpointError if a field is missing, unknown or of the wrong type.
    """
    try:
        kinds = {field.name: field.type for field in dataclasses.fields(LayerReport)}
        values = {name: _value(str(kinds[name]), name, value) for name, value in info.items()}
        report = LayerReport(**values)
        if len(report.curve_sparsity or ()) != len(report.curve_error or ()):
            raise TypeError("curve_error and curve_sparsity differ in length")
        return report
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"run_dir: the report of a layer cannot be read: {error}") from error


def _value(kind: str, name: str, value: Any) -> Any:
    """The inverse of :func:`plain` for a field of this type. TypeError if ``value`` has another."""
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind.startswith("tuple[") and isinstance(value, list):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(inner, name, part) for part in value)
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is int and abs(value) > _LARGEST:
        raise TypeError(f"{name} does not fit in 64 bits")
    if type(value).__name__ == kind or (kind == "float" and type(value) is int):
        return value
    raise TypeError(f"{name} is not of type {kind}")
