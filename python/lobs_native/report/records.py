"""What reports are made of: one record per layer, the bound, what was skipped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lobs_native.errors import CheckpointError

__all__ = ["ErrorBound", "LayerReport", "Skipped", "plain"]


@dataclass(frozen=True)
class LayerReport:
    """One layer. Errors are ``tr(dW H dW^T)`` with the layer's own inputs, from the final weights
    in float64. With inputs "corrected" they are the mean squared distance from the original
    network's outputs (sums, where the notes say so), which what came before has a part in."""

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
    rows: float  # input rows (tokens, samples, patches) that H is the mean of; of all experts
    columns: int  # width of H, without the bias
    dead_columns: int
    backend: str
    status: str
    notes: tuple[str, ...]
    seconds_calibrating: float
    seconds_pruning: float
    inherited: float | None = None  # error before correction and pruning, with inputs "corrected"
    # Below, None is: not known to the method, or the run is older than the field.
    pattern: str | None = None
    dtype: str | None = None  # of the weight
    predicted: float | None = None  # sum of removal costs, with damping: see PrunedWeight
    energy: float | None = None  # what errors are relative to
    condition: float | None = None  # of the damped H, estimated from below; of the worst group
    curve_sparsity: tuple[float, ...] | None = None  # error against sparsity, as predicted, as far
    curve_error: tuple[float, ...] | None = None  # as the removals were traced
    # Highest while this layer was pruned (not calibrated), in bytes: of the process, above what it
    # had when the run began; and of the layer's CUDA device, all that torch had allocated there.
    peak_memory: int | None = None
    peak_memory_device: int | None = None


@dataclass(frozen=True)
class Skipped:
    """A layer that matched and was left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ErrorBound:
    """Theorem 3.2 for the whole network, beside what was measured on the calibration inputs.

    All three are ``||output - original output||_F / sqrt(rows)``. Where the theorem does not cover
    the network, the bounds are None and ``reason`` says why.
    """

    covered: bool
    reason: str
    frobenius: float | None = None  # as printed in the paper
    spectral: float | None = None  # the same proof with spectral norms: valid and tighter
    measured: float | None = None
    output_norm: float | None = None  # ||original output||_F / sqrt(rows)
    parts: dict[str, float] | None = None  # what each layer's error contributes to ``spectral``

    @property
    def relative(self) -> float | None:
        """The measured distance over the original output's norm."""
        return self.share(self.measured)

    def share(self, value: float | None) -> float | None:
        """``value`` over the original output's norm; None where one of them is not known."""
        return None if value is None or not self.output_norm else value / self.output_norm


def plain(value: Any) -> Any:
    """The same as JSON values; what has none becomes its ``repr``, an infinity "inf"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


_LARGEST = (1 << 63) - 1  # of counts and sizes in a report


def report_of_layer(info: Mapping[str, Any]) -> LayerReport:
    try:
        kinds = {field.name: field.type for field in dataclasses.fields(LayerReport)}
        values = {name: _value(str(kinds[name]), name, value) for name, value in info.items()}
        report = LayerReport(**values)
        if len(report.curve_sparsity or ()) != len(report.curve_error or ()):
            raise TypeError("curve_error and curve_sparsity are not of one length")
        return report
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"run_dir: the report of a layer cannot be read: {error}") from error


def _value(kind: str, name: str, value: Any) -> Any:
    """What :func:`plain` made a JSON value of. TypeError if it is not of this kind."""
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind.startswith("tuple[") and isinstance(value, list):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(inner, name, part) for part in value)
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is int and abs(value) > _LARGEST:
        raise TypeError(f"{name} is beyond 64 bits")
    if type(value).__name__ == kind or (kind == "float" and type(value) is int):
        return value
    raise TypeError(f"{name} is no {kind}")
