"""What happened to every layer: as objects, as JSON, and as one HTML page that needs nothing
else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError
from lobs_native.files import write_file
from lobs_native.review import review
from lobs_native.runtimes import runtimes

_DISTANCES = ("output_norm", "measured", "spectral", "frobenius")

__all__ = ["ErrorBound", "LayerReport", "Report", "Skipped", "plain"]


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


@dataclass(frozen=True)
class Report:
    """What :func:`lobs_native.prune` returns."""

    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    error_bound: ErrorBound
    sparsity: float  # zeros removed over weights in the pruned layers
    removed: int
    weights: int
    seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]
    masks: dict[str, Tensor] = field(
        repr=False, compare=False, default_factory=dict
    )  # True = kept; not saved
    missing: tuple[str, ...] = ()  # of an unfinished run: layers that are still to be pruned

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, as plain JSON values; an infinity becomes the string "inf".

        With what the page says about it: "checks", "runtimes", and in "error_bound" under
        "relative" its numbers over the original output's norm.
        """
        values: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "masks"
        }
        bound = self.error_bound
        values["error_bound"] = dataclasses.asdict(bound) | {
            "relative": {k: bound.share(getattr(bound, k)) for k in _DISTANCES}
        }
        values["checks"] = review(self)
        values["runtimes"] = runtimes(self.layers, str(self.settings.get("pattern")))
        for name in ("layers", "skipped", "checks", "runtimes"):
            values[name] = [dataclasses.asdict(x) for x in values[name]]
        return {"format": 1, **plain(values)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.json`` or ``.html``, atomically. Returns the path."""
        suffix = Path(path).suffix
        if suffix == ".json":
            return write_file(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        if suffix == ".html":
            from lobs_native.html import report_page

            return write_file(path, report_page(self))
        raise ArgumentError(f"path: {os.fspath(path)!r} must end in .json or .html")


def plain(value: Any) -> Any:
    """The same as JSON values; what has none becomes its ``repr``, an infinity "inf"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
