"""What happened to every layer: as objects, as JSON, and as one HTML page that needs nothing
else."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lobs_native.errors import ArgumentError
from lobs_native.files.atomic import write_file
from lobs_native.report.records import ErrorBound, LayerReport, Skipped, plain
from lobs_native.report.review import review
from lobs_native.report.runtimes import runtimes

_DISTANCES = ("output_norm", "measured", "spectral", "frobenius")

__all__ = ["Report"]


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
            from lobs_native.report.html import report_page

            return write_file(path, report_page(self))
        raise ArgumentError(f"path: {os.fspath(path)!r} must end in .json or .html")
