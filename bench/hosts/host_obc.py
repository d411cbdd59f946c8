"""compat.obc.TrueOBS against OBC's own class: unstructured at three sparsities, and 2:4.

    python bench/hosts/host_obc.py --folder DIR [--quick] [--pairs N] [--threads N] [--json FILE]

DIR holds a clone of IST-DASLab/OBC as DIR/OBC. Both sides get the same layer and the same H, which
is not timed. The original takes many minutes for a layer. It works on 32 rows at a time, and all
batches take the same time, so one batch is timed and the time is multiplied by their number. Ours
is timed on the whole layer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as in paired.py

import contextlib
import copy
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from hosts import host_runs, originals
from lobs_native.compat.obc import TrueOBS
from speed import shapes
from speed.baselines import exact as baselines
from speed.case import Case, Side

BATCH = 32  # rows that the original has in flight
SHARES = [0.3, 0.5, 0.7]


class Problem:
    """A layer, its first batch of rows as a layer of its own, and their second moment."""

    def __init__(self, module: Any, quick: bool) -> None:
        shape = shapes.LAYERS["bert-base.attention"]
        if quick:
            shape = shapes.LayerShape("small", 64, 96)
        self.theirs = module.TrueOBS
        self.H = 2 * shapes.second_moment(shape)
        self.layer = nn.Linear(shape.columns, shape.rows, bias=False)
        self.layer.weight.data = shapes.weights(shape)
        self.part = nn.Linear(shape.columns, BATCH, bias=False)
        self.part.weight.data = self.layer.weight.data[:BATCH].clone()
        self.batches = shape.rows / BATCH
        self.damped = shapes.damped(self.H)
        self.A = shapes.inverse(self.H)
        self.shape = shape

    def ours(self, layer: nn.Linear) -> TrueOBS:
        obs = TrueOBS(copy.deepcopy(layer), rel_damp=shapes.DAMPING)
        obs.H, obs.nsamples = self.H, 1
        return obs

    def original(self, layer: nn.Linear) -> Any:
        obs = self.theirs(copy.deepcopy(layer), rel_damp=shapes.DAMPING)
        obs.H, obs.nsamples = self.H, 1
        return obs


def seconds(make: Callable[[], Any], use: Callable[[Any], Any], times: float = 1.0) -> float:
    """Seconds of ``use(make())`` without ``make``, times a factor."""
    obs = make()
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # the original prints
        use(obs)
    return (time.perf_counter() - begun) * times


def traced(obs: Any) -> list[Tensor]:
    obs.prepare_unstr()
    return obs.prune_unstr(SHARES)


def unstructured_case(problem: Problem) -> Case:
    """Three sparsities. Losses and costs of the first batch of rows must be those of float64."""
    W = problem.part.weight.data
    C = problem.shape.columns
    expected = baselines.exact_torch(W.to(torch.float64), problem.A, C).loss / 2
    curve = torch.nn.functional.pad(expected.cumsum(1), (1, 0))
    order = expected.reshape(-1).argsort(stable=True)
    lost = []
    for share in SHARES:
        taken = (order[: math.ceil(share * W.numel())] // C).bincount(minlength=BATCH)
        lost.append(float(curve.gather(1, taken[:, None]).sum()))

    def answer(make: Callable[[nn.Linear], Any]) -> Tensor:
        """Largest relative deviation of costs and weights from float64."""
        obs = make(problem.part)
        with contextlib.redirect_stdout(io.StringIO()):
            weights = traced(obs)
        off = [float((obs.Losses.to(torch.float64).cumsum(1) - curve).norm() / curve.norm())]
        for weight, cost in zip(weights, lost, strict=True):
            off.append(abs(shapes.cost(W, weight, problem.damped) / 2 / cost - 1))
        return torch.tensor(off).max()

    return Case(
        inputs=(),
        name=f"TrueOBS, {problem.shape} {tuple(problem.layer.weight.shape)}, 30, 50 and 70%",
        work=2.0 * problem.shape.rows * C**3 / 6,
        unit="GFLOP/s",
        error=float,
        tolerance=1e-3,
        **sides(problem, traced, answer),
    )


def sides(
    problem: Problem, job: Callable[[Any], Any], answer: Callable[..., Tensor]
) -> dict[str, Any]:
    """Ours on the whole layer, the original on the first batch of its rows, at the same job."""
    return {
        "ours": Side(
            "lobs",
            seconds=lambda: seconds(lambda: problem.ours(problem.layer), job),
            answer=lambda: answer(problem.ours),
        ),
        "rivals": {
            "OBC": Side(
                "OBC",
                seconds=lambda: seconds(
                    lambda: problem.original(problem.part), job, problem.batches
                ),
                answer=lambda: answer(problem.original),
                note=f"timed on {BATCH} of {problem.shape.rows} rows",
            )
        },
    }


def groups_case(problem: Problem) -> Case:
    """2:4. The first batch of rows must lose what it loses in float64."""
    W = problem.part.weight.data
    C = problem.shape.columns
    expected = float(baselines.exact_torch(W.to(torch.float64), problem.A, C // 2, 2, 4).loss.sum())

    def error(pruned: Tensor) -> float:
        if not bool(((pruned == 0).view(BATCH, -1, 4).sum(2) == 2).all()):
            return math.inf
        return abs(shapes.cost(W, pruned, problem.damped) / expected - 1)

    def answer(make: Callable[[nn.Linear], Any]) -> Tensor:
        obs = make(problem.part)
        with contextlib.redirect_stdout(io.StringIO()):
            obs.nmprune(2, 4)
        return obs.layer.weight.data

    def prune(obs: Any) -> None:
        obs.nmprune(2, 4)

    return Case(
        inputs=(),
        name=f"TrueOBS, {problem.shape} {tuple(problem.layer.weight.shape)}, 2:4",
        work=2.0 * problem.shape.rows * C**3 / 12,
        unit="GFLOP/s",
        error=error,
        tolerance=1e-3,
        **sides(problem, prune, answer),
    )


def cases(folder: Path, quick: bool) -> Iterator[Case]:
    with originals.trueobs(folder) as module:
        problem = Problem(module, quick)
        yield unstructured_case(problem)
        yield groups_case(problem)


if __name__ == "__main__":
    host_runs.run(__doc__, {"obc": cases}, pairs=3, quick_pairs=3)
