"""The report that ``prune`` returns, and how it is saved as JSON or as an HTML page."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobs_native.errors import ArgumentError
from lobs_native.files.atomic import write_file
from lobs_native.report.records import ReportRecord, plain
from lobs_native.report.review import review
from lobs_native.report.runtimes import runtimes_for

__all__ = ["Report"]

_DISTANCES = ("output_norm", "measured", "spectral", "frobenius")


@dataclass(frozen=True)
class Report(ReportRecord):
    """What :func:`lobs_native.prune` returns."""

    def to_dict(self) -> dict[str, Any]:
        """Everything except the masks as plain JSON values; an infinity becomes the string "inf".

        What the page adds is included: "checks", "runtimes", and in "error_bound", under
        "relative", its distances over the original output's norm.
        """
        values: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "masks"
        }
        bound = self.error_bound
        values["error_bound"] = dataclasses.asdict(bound) | {
            "relative": {k: bound.share(getattr(bound, k)) for k in _DISTANCES}
        }
        if (coverage := self.coverage) is not None:
            values["coverage"] = dataclasses.asdict(coverage) | {
                name: getattr(coverage, name) for name in ("total", "sparsity", "missed")
            }
        values["checks"] = review(self)
        values["runtimes"] = runtimes_for(self.layers, str(self.settings.get("pattern")))
        for name in ("layers", "skipped", "checks", "runtimes"):
            values[name] = [dataclasses.asdict(x) for x in values[name]]
        return {"format": 1, **plain(values)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report atomically, as JSON or HTML by the suffix of ``path``.

        Parameters
        ----------
        path : path-like
            Ends in ``.json`` or ``.html``. Missing folders are created; an existing file is
            replaced.

        Returns
        -------
        Path
            ``path``.

        Raises
        ------
        ArgumentError
            ``path`` has another suffix. Nothing is written.
        CheckpointError
            The file cannot be written. A file that was there is unchanged.
        """
        suffix = Path(path).suffix
        if suffix == ".json":
            return write_file(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        if suffix == ".html":
            from lobs_native.report.html import report_page  # here: most runs need no Jinja2

            return write_file(path, report_page(self))
        raise ArgumentError(f"path: {os.fspath(path)!r} must end in .json or .html")
