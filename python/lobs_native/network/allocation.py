"""One budget for several layers: how much of it each of them gets.

A removal costs its exact error times how sensitive the network's output is to that row of the layer
(or over the root of the layer's energy, where that is not known of any); the cheapest ones of all
layers go, within bounds on each layer's sparsity. Layers are taken one after another, and only
their sorted costs are kept, so that it needs no more memory than pruning them does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.partial import States, passed_before, readable
from lobs_native.calibration.run import Run
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError
from lobs_native.network.selection import Plan
from lobs_native.solvers.measurement import energy
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.workspace import Workspace

__all__ = ["Costs", "passes", "share_budget", "shares"]

_KEPT = 1 << 20  # costs of a layer that are kept, at most
_LEAST = 0.5  # of the weights that a layer was to keep: those that it keeps in any case
_PURPOSE = "costs"  # of the pass, and what its results are kept under


def share_budget(
    order: Sequence[Plan],
    run: Run,
    *,
    spread: float,
    sensitivity: Mapping[str, Tensor] | None,
    each: Mapping[str, float],
    statistics: int,
    memory: int | None,
    backend: str | None,
    states: States | None = None,
) -> dict[str, float]:
    """name -> the sparsity that the common budget leaves to a layer with scope "model", at most
    ``spread`` away from what was asked for, and with at least half of the weights that were to be
    kept; a ``spread`` of 1 sets no bounds.

    Cut at that sparsity, a layer loses the weights that the common cut takes from it. Second
    moments take ``statistics`` bytes together, scratch ``memory``. A layer that ``sensitivity``
    does not hold takes no part. A weight of a layer counts ``each[name]`` in the budget: 1, or its
    multiplications. ``states`` keeps sums and costs on the way.
    """
    together = [
        plan
        for plan in order
        if plan.scope == "model" and (sensitivity is None or plan.layer.name in sensitivity)
    ]
    costs = {} if states is None else _costs_kept(states)
    rest = [plan for plan in together if plan.layer.name not in costs]
    for piece in passes(rest, statistics, passed_before(states, _PURPOSE)):
        layers = [plan.layer for plan in piece]
        what = f"costs of {len(layers)} layers"
        moments = calibrate(layers, run, what, states=states, purpose=_PURPOSE)
        for plan in piece:
            name = plan.layer.name
            importance = None if sensitivity is None else sensitivity[name]
            costs[name] = _costs(
                plan, moments.pop(name), spread, importance, each.get(name, 1.0), memory, backend
            )
            if states is not None:
                _keep_costs(states, costs)
    counts = shares([costs[plan.layer.name] for plan in together])
    return {plan.layer.name: n / plan.weights for plan, n in zip(together, counts, strict=True)}


def _keep_costs(states: States, costs: Mapping[str, Costs]) -> None:
    if states.due(_PURPOSE, sum(x.values.numel() * 8 for x in costs.values())):
        told = {name: dataclasses.asdict(x) for name, x in costs.items()}
        tensors = {name: values.pop("values") for name, values in told.items()}
        states.save(_PURPOSE, tensors, told)


def _costs_kept(states: States) -> dict[str, Costs]:
    found = states.load(_PURPOSE)
    if found is None:
        return {}
    tensors, told = found
    with readable("costs"):
        return {name: Costs(values=tensors[name].clone(), **told[name]) for name in told}


def passes(order: Sequence[Plan], most: int, begun_with: Collection[str] = ()) -> list[list[Plan]]:
    """Layers whose second moments fit into ``most`` bytes together, in order; those of
    ``begun_with`` for themselves."""
    pieces: list[list[Plan]] = []
    for begun in (True, False):
        held = float("inf")
        for plan in order:
            if (plan.layer.name in begun_with) != begun:
                continue
            if held + plan.moment_bytes > most:
                pieces.append([])
                held = 0
            pieces[-1].append(plan)
            held += plan.moment_bytes
    return pieces


@dataclasses.dataclass(frozen=True)
class Costs:
    """What removals from one layer cost for what they count in the budget: the ``stride``-th, the
    ``2 * stride``-th cheapest and so on, as far as it may go."""

    values: Tensor  # (K,) float64, ascending
    stride: int
    asked: int  # removals that were asked of the layer
    least: int  # bounds on its removals
    most: int
    each: float = 1.0  # what a removal counts in the budget

    def below(self, limit: float, *, reached: bool = True) -> int:
        """Removals that cost at most ``limit`` (less, if it is not to be ``reached``), within the
        bounds."""
        found = int(torch.searchsorted(self.values, limit, right=reached)) * self.stride
        return min(max(found, self.least), self.most)


def _costs(
    plan: Plan,
    moments: Moments,
    spread: float,
    importance: Tensor | None,
    each: float,
    memory: int | None,
    backend: str | None,
) -> Costs:
    layer, asked = plan.layer, plan.target.sparsity
    assert asked is not None
    try:
        problem = Problem.of(
            layer.weight(),
            layer.bias(),
            moments.matrices(),
            damping=plan.damping,
            inverted=True,
            prune_bias=plan.prune_bias,
            mask=None,
            workspace=Workspace(ops.select_backend(backend, layer.weight().device), memory),
        )
        chooser, unpruned = TABLE[plan.method](problem, plan.pattern, importance), energy(problem)
        most = nearest_count(_highest(asked, spread), plan.weights)
        values, unit = chooser.cheapest(most)
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
        asked=nearest_count(asked, plan.weights),
        least=nearest_count(max(0.0, asked - spread), plan.weights),
        most=most,
        each=each,
    )


def _highest(asked: float, spread: float) -> float:
    """The highest sparsity that a layer may get.

    Costs are those of small changes: a layer that is nearly empty seems cheap to empty altogether,
    since what the others lose has grown without a limit in the same model. Without the second bound
    LeNet-5 with 1% kept was left one of the 500 weights of its first convolution, of 100.
    """
    if spread == 1:
        return 1.0
    return min(asked + spread, 1 - _LEAST * (1 - asked))


def shares(parts: Sequence[Costs]) -> list[int]:
    """How many weights each part loses, counting as much together as what was asked of all.

    Costs rise along a part's order, so the best shares within bounds are those below one common
    cost. Of removals that cost the same, those of the first parts go.
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
