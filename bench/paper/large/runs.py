"""Measurements of the large experiment: one network under one method, by layer; and their file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lobs_native.errors import CheckpointError
from paper.large.rates import WideLayer, Work
from paper.large.stages import Spent

__all__ = ["LayerRun", "NetworkRun", "Results"]


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


@dataclass
class Results:
    """Runs, one per network and method, and layers that did not fit, by network."""

    runs: list[NetworkRun] = field(default_factory=list)
    wide: dict[str, Sequence[WideLayer]] = field(default_factory=dict)

    def add(self, run: NetworkRun, wide: Sequence[WideLayer]) -> None:
        """Add a run, replacing an earlier one of the same network and method."""
        same = [r for r in self.runs if (r.network, r.method) == (run.network, run.method)]
        if same:
            self.runs[self.runs.index(same[0])] = run
        else:
            self.runs.append(run)
        self.wide[run.network] = wide

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        wide = {name: [dataclasses.asdict(w) for w in layers] for name, layers in self.wide.items()}
        return {"runs": [dataclasses.asdict(r) for r in self.runs], "too large": wide}

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what an earlier command wrote; empty if there is no such file.

        Raises CheckpointError if the file is something else.
        """
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            runs = [_run(values) for values in content["runs"]]
            wide: dict[str, Sequence[WideLayer]] = {
                name: [_wide(layer) for layer in layers]
                for name, layers in content["too large"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not what this command writes ({error}); move it, or name another --out"
            ) from error
        return cls(runs, wide)


def _run(values: Mapping[str, Any]) -> NetworkRun:
    stages = {name: Spent(**spent) for name, spent in values["stages"].items()}
    layers = [LayerRun(**layer) for layer in values["layers"]]
    return NetworkRun(**{**values, "stages": stages, "layers": layers})


def _wide(values: Mapping[str, Any]) -> WideLayer:
    return WideLayer(Work(**values["work"]), values["seconds"], tuple(values["measured"]))
