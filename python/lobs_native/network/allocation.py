"""The division of one budget among several layers.

The cost of a removal is its exact error times the sensitivity of the network's output to that row
of the layer. Where no sensitivity is known, the error is divided by the square root of the layer's
energy. The cheapest removals of all layers are made, within bounds on each layer's sparsity. Layers
are processed one after another and only their sorted costs are kept, so the division needs no more
memory than the pruning does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.partial import States, passed_before, readable
from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.session import Session
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError
from lobs_native.network.divided import owners
from lobs_native.network.resources import RunPlan
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.solvers.measurement import energy
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.workspace import Workspace

__all__ = ["Costs", "budget_costs", "passes", "shares"]

_KEPT = 1 << 20  # the most costs of a layer that are kept
_LEAST = 0.5  # a layer keeps at least this share of the weights that it was to keep
_PURPOSE = "costs"  # names the pass over the data, and its results in the run directory


def budget_costs(
    jobs: Sequence[LayerJob],
    session: Session,
    settings: NetworkSettings,
    plan: RunPlan,
    *,
    sensitivity: Mapping[str, Tensor] | None,
    each: Mapping[str, float],
    states: States | None = None,
) -> dict[str, Costs]:
    """name -> the costs of removals from a layer with scope "model", which :func:`shares` divides
    the common budget by.

    A layer's sparsity is then at most ``settings.spread`` away from the requested one, and it keeps
    at least half of the weights that it was to keep; a spread of 1 sets no bounds. Cut at that
    sparsity, a layer loses the weights that the common cut takes from it.

    A layer that is missing from ``sensitivity`` is left out. A weight of a layer counts
    ``each[name]`` in the budget: 1, or its multiplications. ``plan`` limits memory; ``states``
    checkpoints sums and costs.
    """
    together = [
        job for job in jobs if job.shared and (sensitivity is None or job.layer.name in sensitivity)
    ]
    costs = {} if states is None else _kept_costs(states)
    by_rank: dict[str, int] = {}  # who computes them
    rest = [job for job in together if job.layer.name not in costs]
    for piece in passes(rest, plan.statistics_limit, passed_before(states, _PURPOSE)):
        layers = [job.layer for job in piece]
        what = f"costs of {len(layers)} layers"
        moments = calibrate(layers, session, what, states=states, purpose=_PURPOSE)
        by_rank |= owners(session.ranks, piece)
        for job in piece:
            name = job.layer.name
            of_layer = moments.pop(name)
            if by_rank[name] == session.ranks.rank:
                costs[name] = _costs(
                    job,
                    of_layer,
                    spread=settings.spread,
                    importance=None if sensitivity is None else sensitivity[name],
                    each=each.get(name, 1.0),
                    memory=plan.scratch,
                    backend=settings.backend,
                )
            if states is not None:
                _keep_costs(states, costs)
    for name, owner in by_rank.items():
        costs[name] = _known_to_all(session.ranks, name, costs.get(name), owner)
    return {job.layer.name: costs[job.layer.name] for job in together}


def _known_to_all(ranks: Ranks, name: str, costs: Costs | None, owner: int) -> Costs:
    """The costs of a layer that one of the ranks has computed."""
    info, tensors = dict[str, Any](), dict[str, Tensor]()
    if costs is not None:
        info, tensors = costs.numbers(), {"values": costs.values}
    info, tensors = ranks.from_one(f"costs of {name}", info, tensors, owner)
    return Costs(tensors["values"], **info)


def _keep_costs(states: States, costs: Mapping[str, Costs]) -> None:
    if states.due(_PURPOSE, sum(x.values.numel() * 8 for x in costs.values())):
        tensors = {name: x.values for name, x in costs.items()}
        states.save(_PURPOSE, tensors, {name: x.numbers() for name, x in costs.items()})


def _kept_costs(states: States) -> dict[str, Costs]:
    saved = states.load(_PURPOSE)
    if saved is None:
        return {}
    tensors, info = saved
    with readable("costs"):
        return {name: Costs(values=tensors[name].clone(), **info[name]) for name in info}


def passes(
    jobs: Sequence[LayerJob], most: int, begun_with: Collection[str] = ()
) -> list[list[LayerJob]]:
    """The jobs in order, divided so that the second moments of each part fit into ``most`` bytes;
    those named in ``begun_with`` come first, in parts of their own."""
    pieces: list[list[LayerJob]] = []
    for begun in (True, False):
        held = float("inf")
        for job in jobs:
            if (job.layer.name in begun_with) != begun:
                continue
            if held + job.moment_bytes > most:
                pieces.append([])
                held = 0
            pieces[-1].append(job)
            held += job.moment_bytes
    return pieces


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of removals from one layer, each relative to what it counts in the budget: of the
    ``stride``-th cheapest, the ``2 * stride``-th and so on, up to ``most`` removals."""

    values: Tensor  # (K,) float64, ascending
    stride: int
    asked: int  # removals that the settings request of the layer
    least: int  # bounds on its removals
    most: int
    each: float = 1.0  # what a removal counts in the budget

    def numbers(self) -> dict[str, Any]:
        """All but ``values``, by name."""
        return {name: x for name, x in vars(self).items() if name != "values"}

    def below(self, limit: float, *, reached: bool = True) -> int:
        """The number of removals that cost at most ``limit`` (less than it without ``reached``),
        within the bounds."""
        count = int(torch.searchsorted(self.values, limit, right=reached)) * self.stride
        return min(max(count, self.least), self.most)


def _costs(
    job: LayerJob,
    moments: Moments,
    *,
    spread: float,
    importance: Tensor | None,
    each: float,
    memory: int | None,
    backend: str | None,
) -> Costs:
    layer, settings = job.layer, job.settings
    requested = settings.target.sparsity
    assert requested is not None
    try:
        problem = Problem.of(
            layer.weight(),
            layer.bias(),
            moments.matrices(),
            damping=settings.damping,
            inverted=True,
            prune_bias=settings.prune_bias,
            mask=None,
            workspace=Workspace(ops.select_backend(backend, layer.weight().device), memory),
        )
        method = TABLE[settings.method](problem, settings.resolved_pattern, importance)
        unpruned = energy(problem)
        most = nearest_count(_highest(requested, spread), job.weights)
        values, unit = method.cheapest(most)
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    stride = -(-most // _KEPT) or 1
    unit /= each
    if importance is not None:
        unit *= float(importance.mean())
    elif unpruned > 0:
        unit /= unpruned**0.5
    return Costs(
        values=(values[stride - 1 :: stride] * unit).contiguous(),
        stride=stride,
        asked=nearest_count(requested, job.weights),
        least=nearest_count(max(0.0, requested - spread), job.weights),
        most=most,
        each=each,
    )


def _highest(requested: float, spread: float) -> float:
    """The highest sparsity that a layer may get.

    Costs hold for small changes. Emptying a nearly empty layer therefore seems cheap, because the
    losses of the other layers grow without limit in the same model. Without the second bound, the
    first convolution of LeNet-5 with 1% kept was left with 1 of its 500 weights.
    """
    if spread == 1:
        return 1.0
    return min(requested + spread, 1 - _LEAST * (1 - requested))


def shares(parts: Sequence[Costs]) -> list[int]:
    """How many weights each part loses; together they count as much as all parts request.

    Costs rise along a part's order, so the best shares within bounds are those below one common
    cost. Among removals of equal cost, those of the first parts are made.
    """
    if not parts:
        return []
    total = sum(part.asked * part.each for part in parts)
    enough = total * (1 - 1e-12)
    values = torch.cat([part.values for part in parts]).sort().values
    low, high = 0, len(values)  # places of the common cost: too little is below ``low``
    while low < high:
        middle = (low + high) // 2
        limit = float(values[middle])
        if sum(part.below(limit) * part.each for part in parts) >= enough:
            high = middle
        else:
            low = middle + 1
    limit = float(values[low]) if low < len(values) else torch.inf
    counts = [part.below(limit, reached=False) for part in parts]
    left = total - sum(n * part.each for n, part in zip(counts, parts, strict=True))
    for i, part in enumerate(parts):
        more = min(part.below(limit) - counts[i], max(0, round(left / part.each)))
        counts[i] += more
        left -= more * part.each
    return counts
