"""The runs behind tables 1, 3 and 4: prune once or in two stages, then retrain lightly."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lobs_native.files.atomic import write_file
from lobs_native.report.records import plain
from paper.networks import Case, Split, percent_wrong
from paper.small.retrain import retrain, varied
from paper.small.ways import Pruned, prune_by

BETWEEN = 200  # iterations between the two stages, at most
FEW = 10_000  # training images, below which they are varied


@dataclass(frozen=True)
class Taught:
    """A recipe beyond the paper: many stages with a teacher.

    From the shares of the paper's first stage to those of its second in equal ratios. After each
    stage the network learns the outputs of the original network, where those are right.
    """

    table: str
    stages: int
    between: int  # iterations after a stage, at most
    last: int  # after the last one
    rate: float  # Adam's
    temperature: float
    vary: bool  # the images, also where there are many


# No more iterations in total than the paper's iterative method, and a twentieth of what it prints
# for magnitude.
LIGHTLY = Taught("taught", 8, 60, 220, 2e-2, 8.0, vary=False)
LONGER = Taught("taught, longer", 16, 300, 3000, 1e-2, 4.0, vary=True)
TAUGHT_WAY, TAUGHT_AT_ONCE = "exact, model, corrected", 512


@dataclass
class Row:
    """One network pruned in one way.

    Errors are in percent, over all splits. Lists have one entry per repetition of the retraining.
    """

    table: str  # "once", "stages", or of a Taught
    network: str
    way: str
    seed: int
    dense: float
    kept: dict[str, float]  # of every layer; of the first split
    kept_all: float
    pruned: float
    seconds: float
    retrained: list[float] = field(default_factory=list)
    iterations: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)  # share of the splits
    seconds_retraining: float = 0.0
    first_stage: float | None = None  # error after the first stage and its retraining
    curve: list[list[float]] = field(default_factory=list)  # of the first repetition and split
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What distinguishes it from other rows."""
        return (self.table, self.network, self.way, self.seed)


class Rows:
    """Rows in a file: those that it holds already are not computed again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, plain(settings)
        self.rows: dict[tuple[str, str, str, int], Row] = {}
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] == self._settings:
                rows = [Row(**row) for row in saved["rows"]]
                self.rows = {row.key: row for row in rows}

    def add(self, row: Row) -> None:
        """Keep a row, and write all rows."""
        self.rows[row.key] = row
        rows = [dataclasses.asdict(r) for r in self.rows.values()]
        content = json.dumps(plain({"settings": self._settings, "rows": rows}), indent=1)
        write_file(self._path, content + "\n")

    def of(self, table: str, network: str, way: str) -> list[Row]:
        """All seeds of a cell."""
        return [r for (t, n, w, _), r in self.rows.items() if (t, n, w) == (table, network, way)]


def once(case: Case, way: str, *, limit: int, repetitions: int) -> Row:
    """Table 1: every layer pruned once, then retrained until the dense error is reached."""
    pruned = [
        prune_by(way, case.model, case.shape.once, s.calibration, case.seed) for s in case.splits
    ]
    row = _row("once", case, way, pruned)
    for k in range(repetitions):
        _retrain(row, case, pruned, limit, case.seed + k)
    return row


def in_stages(case: Case, way: str, *, limit: int, repetitions: int) -> Row:
    """Tables 3 and 4: pruned, retrained for at most 200 iterations, pruned further, retrained."""
    first, second = case.shape.stages
    pruned, between, spent = [], 0.0, 0.0
    for split in case.splits:
        stage = prune_by(way, case.model, first, split.calibration, case.seed)
        done = retrain(
            stage.model, stage.masks, split.training, split.validation,
            target=percent_wrong(case.model, split.validation), limit=BETWEEN,
            every=case.shape.every, seed=case.seed,
        )  # fmt: skip
        between += percent_wrong(stage.model, split.test) / len(case.splits)
        spent += done.iterations / len(case.splits)
        last = prune_by(way, stage.model, second, split.calibration, case.seed)
        pruned.append(dataclasses.replace(last, seconds=last.seconds + stage.seconds))
    row = _row("stages", case, way, pruned)
    row.first_stage = between
    for k in range(repetitions):
        _retrain(row, case, pruned, limit, case.seed + k)
    row.iterations = [spent + count for count in row.iterations]
    return row


def taught(case: Case, how: Taught, *, repetitions: int) -> Row:
    """Prune in stages to the share of all weights that the paper's second stage keeps."""
    done = [_taught(case, how, case.seed + k) for k in range(repetitions)]
    first = done[0]
    for other in done[1:]:
        first.retrained += other.retrained
        first.iterations += other.iterations
        first.reached += other.reached
    return first


def _taught(case: Case, how: Taught, seed: int) -> Row:
    """One repetition."""
    first, last = case.shape.stages
    pruned, ends, spent, seconds = [], [], [], 0.0
    for split in case.splits:
        target = percent_wrong(case.model, split.validation)
        model, iterations = case.model, 0
        for k in range(how.stages):
            part = k / (how.stages - 1)
            kept = {name: first[name] ** (1 - part) * last[name] ** part for name in first}
            limit = how.last if k == how.stages - 1 else how.between
            stage = prune_by(TAUGHT_WAY, model, kept, split.calibration, seed)
            model = copy.deepcopy(stage.model)
            done = retrain(
                model, stage.masks, split.training, split.validation, target=target, limit=limit,
                every=case.shape.every, seed=seed, rate=how.rate, at_once=TAUGHT_AT_ONCE,
                teacher=case.model, temperature=how.temperature,
                vary=varied if how.vary or len(split.training) < FEW else None,
            )  # fmt: skip
            iterations += done.iterations
            seconds += done.seconds / len(case.splits)
        pruned.append(stage)
        ends.append((percent_wrong(model, split.test), done.reached))
        spent.append(iterations)
    row = _row(how.table, case, TAUGHT_WAY, pruned)
    row.retrained = [_mean(error for error, _ in ends)]
    row.reached = [_mean(reached for _, reached in ends)]
    row.iterations = [_mean(spent)]
    row.seconds_retraining = seconds
    return row


def _row(table: str, case: Case, way: str, pruned: list[Pruned]) -> Row:
    return Row(
        table, case.name, way, case.seed, case.dense,
        kept=pruned[0].kept,
        kept_all=pruned[0].kept_all,
        pruned=_mean(percent_wrong(p.model, s.test) for p, s in _pairs(case, pruned)),
        seconds=_mean(p.seconds for p in pruned),
        notes=pruned[0].notes,
    )  # fmt: skip


def _retrain(row: Row, case: Case, pruned: list[Pruned], limit: int, seed: int) -> None:
    """One repetition: retrain a copy of the pruned network of every split."""
    errors, iterations, reached, seconds = [], [], [], 0.0
    for p, split in _pairs(case, pruned):
        model: nn.Module = copy.deepcopy(p.model)
        target = percent_wrong(case.model, split.validation)
        done = retrain(
            model, p.masks, split.training, split.validation, target=target, limit=limit,
            every=case.shape.every, seed=seed,
        )  # fmt: skip
        errors.append(percent_wrong(model, split.test))
        iterations.append(done.iterations)
        reached.append(done.reached)
        seconds += done.seconds
        row.curve = row.curve or [list(point) for point in done.curve]
    row.retrained.append(_mean(errors))
    row.iterations.append(_mean(iterations))
    row.reached.append(_mean(reached))
    row.seconds_retraining = seconds / len(pruned)


def _pairs(case: Case, pruned: list[Pruned]) -> Iterator[tuple[Pruned, Split]]:
    return zip(pruned, case.splits, strict=True)


def _mean(values: Iterable[float]) -> float:
    return float(statistics.fmean(values))
