"""What :func:`lobs_native.shrink` is about to remove: which families, how many units of each, and,
where that is decided before anything is pruned, which ones."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lobs_native.calibration.flow import flow_of
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.layers import layers_of
from lobs_native.network.resources import waiting_limit
from lobs_native.network.selection import candidates_of
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shrinking.blocks import block_families, block_removals
from lobs_native.network.shrinking.channels import channel_families
from lobs_native.network.shrinking.configured import configurable
from lobs_native.network.shrinking.experts import expert_families, expert_removals
from lobs_native.network.shrinking.families import families_of
from lobs_native.network.shrinking.latency import LatencyTable, inputs_of, table_of
from lobs_native.network.shrinking.removals import removals_of
from lobs_native.network.shrinking.sizes import (
    Counts,
    Work,
    divided,
    kept,
    share_of,
    shares_of,
    uniform,
)
from lobs_native.network.shrinking.surgery import stand_alone
from lobs_native.network.shrinking.units import KINDS, Family, columns_of
from lobs_native.network.uses import settle
from lobs_native.solvers.joint import Removal

__all__ = ["BUDGETS", "Goal", "ShrinkPlan", "plan_shrinking"]

_BOUND = "without one of them the network does not compute what it does with it set to zero"
BUDGETS = ("parameters", "multiplications", "latency")
_Cost = Callable[[str, Sequence[int]], float]


@dataclass(frozen=True)
class Goal:
    """How small a network is to get: exactly one of the first four, as :func:`shrink` has them."""

    keep: float | Mapping[str, float] | None
    parameters: float | None
    multiplications: float | None
    latency: float | None
    latency_table: str | os.PathLike[str] | None
    kinds: Sequence[str]
    multiple: int
    configured: bool  # only what the class of the model can express

    def budget(self) -> tuple[str, float] | None:
        """The argument that sets a budget, and its value, checked; None with ``keep``."""
        given = {name: getattr(self, name) for name in ("keep", *BUDGETS)}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ArgumentError(f"keep, {', '.join(BUDGETS)}: give exactly one of them")
        ((name, value),) = given.items()
        return None if name == "keep" else (name, share_of(value, name))

    def for_class_of(self, model: nn.Module) -> bool:
        """Whether the model's own class has to be able to have the new sizes."""
        return self.configured and getattr(model, "config", None) is not None


@dataclass(frozen=True)
class ShrinkPlan:
    """The families that lose units, how many of each stay, and in which order they go, as far as
    that is known."""

    families: list[Family]
    counts: Counts
    removals: list[Removal | None]
    multiplications: tuple[int, int]  # of the layers of all families, before and after

    def kept(self, f: int) -> Tensor | None:
        """The units of a family that stay, if they are known, rising."""
        removal, family = self.removals[f], self.families[f]
        if removal is None:
            return None
        gone = torch.tensor(removal.order[: family.units - self.counts[f]], dtype=torch.int64)
        units = torch.arange(family.units)
        return units[~torch.isin(units, gone)]

    def spent(self, f: int) -> float | None:
        """What the removal of experts or blocks costs: see :func:`expert_removals` and
        :func:`block_removals`; None for other units."""
        removal, family = self.removals[f], self.families[f]
        if removal is None or family.readers:
            return None
        return sum(removal.spent[: family.units - self.counts[f]])

    def parted(self) -> tuple[ShrinkPlan, ShrinkPlan]:
        """That of blocks, and that of everything else."""
        parts = []
        for blocks in (True, False):
            at = [i for i, f in enumerate(self.families) if (f.kind == "blocks") == blocks]
            parts.append(self._of(at, [self.families[i] for i in at]))
        return parts[0], parts[1]

    def renamed(self, renaming: Callable[[str], str | None]) -> ShrinkPlan:
        """Of the families that are left when some names change, and others go."""
        new = [family.renamed(renaming) for family in self.families]
        at = [i for i, family in enumerate(new) if family is not None]
        return self._of(at, [family for family in new if family is not None])

    def _of(self, at: Sequence[int], families: list[Family]) -> ShrinkPlan:
        counts, removals = [self.counts[i] for i in at], [self.removals[i] for i in at]
        return ShrinkPlan(families, counts, removals, self.multiplications)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """(G, R, C) bool for each reader of the units that are known: what may stay of it."""
        layers = {layer.name: layer for layer in layers_of(model)}
        masks = {}
        for f, family in enumerate(self.families):
            if (units := self.kept(f)) is None:
                continue
            for name in family.readers:
                layer = layers[name]
                columns = columns_of(layer, family.read_at(name))
                stays = (columns < 0) | torch.isin(columns, units)
                weight = layer.weight()
                masks[name] = stays.to(weight.device).expand(weight.shape).contiguous()
        return masks


def plan_shrinking(
    session: Session, goal: Goal, settings: NetworkSettings, notes: list[str]
) -> ShrinkPlan:
    """Find the units of a model and decide what goes; ``settings`` are those that their readers are
    repaired with. Nothing is changed."""
    model, budget = session.model, goal.budget()
    shares = {} if goal.keep is None else shares_of(goal.keep)
    with session.evaluating():
        families, order = _families(session, goal, settings, shares, notes)
        each = _multiplications(families, session)
        costs: dict[str, _Cost] = {"parameters": _weights, "multiplications": each}
        table = None
        if goal.latency is not None:
            table = table_of(goal.latency_table)
            costs["latency"] = _latency(families, session, table)
        one_size = goal.for_class_of(model)
        if budget is not None and one_size:
            name, target = budget
            work = Work(model, families, costs[name])
            shares = dict.fromkeys(KINDS, uniform(work, target, goal.multiple, name))
        wanted = [f for f in families if f.readers and not (f.single and (shares or one_size))]
        if wanted:
            found = removals_of(
                wanted,
                session,
                method=settings.method,
                damping=settings.damping,
                memory=settings.memory,
            )
            order |= {id(f): removal for f, removal in zip(wanted, found, strict=True)}
        removals = [order.get(id(f)) for f in families]
        if budget is not None and not one_size:
            name, target = budget
            work = Work(model, families, costs[name], removals)
            counts = divided(work, target, goal.multiple, name)
        else:
            counts = [kept(f, shares.get(f.kind, 1.0), goal.multiple) for f in families]
            counts = [
                n if r is None else max(n, f.units - len(r.order))
                for f, n, r in zip(families, counts, removals, strict=True)
            ]
    if table is not None and goal.latency_table is not None:
        table.save(goal.latency_table)
    every = Work(model, families, costs["multiplications"], removals)
    fewer = [i for i, f in enumerate(families) if counts[i] < f.units]
    if not fewer:
        name, value = budget or ("keep", shares)
        raise ArgumentError(
            f"{name}: with {value} and multiples of {goal.multiple} all units stay; keep less, or "
            "pass a smaller multiple" + "".join(f"; {note}" for note in notes)
        )
    return ShrinkPlan(
        [families[i] for i in fewer],
        [counts[i] for i in fewer],
        [None if families[i].single else removals[i] for i in fewer],
        (round(every.total([f.units for f in families])), round(every.total(counts))),
    )


def _families(
    session: Session,
    goal: Goal,
    settings: NetworkSettings,
    shares: Mapping[str, float],
    notes: list[str],
) -> tuple[list[Family], dict[int, Removal]]:
    """The families of the kinds asked for, each reader in one of them; and in which order experts
    and blocks go, by the ``id`` of the family."""
    model = session.model
    families = list(families_of(model, goal.kinds))
    if "experts" in goal.kinds:
        families += expert_families(model)
    if "blocks" in goal.kinds:
        families += block_families(session, next(iter(session.each("blocks"))))
    if goal.configured:
        families = configurable(model, families, notes)
    if "channels" in goal.kinds and not goal.for_class_of(model):
        families = _with_channels(families, session, notes)
    elif "channels" in goal.kinds and not families:
        notes.append(
            f"channels stay: a {type(model).__name__} made from its configuration cannot have "
            "other numbers of them (configured=False removes them nevertheless)"
        )
    families = _repairable(families, session, goal, settings, notes)
    families = _alone(families, session, goal, notes)
    families, removals = _with_removable_experts(families, session, goal, notes)
    if lists := [f for f in families if f.kind == "blocks"]:
        fewest = [1 if goal.keep is None else kept(f, shares.get("blocks", 1.0), 1) for f in lists]
        limit = waiting_limit(settings.memory)
        orders = block_removals(lists, fewest, session, limit, notes)
        removals |= {id(f): order for f, order in zip(lists, orders, strict=True)}
    if not families:
        raise ArgumentError(
            "model: it has no feed-forward layers, attention, channels, experts or lists of blocks "
            "whose units can be removed" + "".join(f"; {note}" for note in notes)
        )
    return families, removals


def _repairable(
    families: Sequence[Family],
    session: Session,
    goal: Goal,
    settings: NetworkSettings,
    notes: list[str],
) -> list[Family]:
    """The families whose readers can be pruned, and are reached by the data."""
    if not any(family.readers for family in families):
        return list(families)
    settings = dataclasses.replace(settings, strict=False)
    settled = settle(candidates_of(session.model, settings), session, settings)
    known = {job.layer.name for job in settled.jobs}
    reasons = {skipped.name: skipped.reason for skipped in settled.skipped}
    why: dict[int, str] = {}
    for family in families:
        if unknown := next((name for name in family.readers if name not in known), None):
            why[id(family)] = f"{unknown}: {reasons.get(unknown, 'its use is not known')}"
    return _without(families, why, session, goal, notes)


def _alone(
    families: Sequence[Family], session: Session, goal: Goal, notes: list[str]
) -> list[Family]:
    """The families on whose units nothing but their readers depends, among those found by name:
    all are tried together, and one by one only if that goes wrong."""
    named = [f for f in families if f.single]
    if not named:
        return list(families)
    batch = next(iter(session.each("units")))
    if stand_alone(session, batch, named):
        return list(families)
    why = {id(f): _BOUND for f in named if not stand_alone(session, batch, [f])}
    return _without(families, why, session, goal, notes)


def _without(
    families: Sequence[Family],
    why: Mapping[int, str],
    session: Session,
    goal: Goal,
    notes: list[str],
) -> list[Family]:
    """The families without those of which ``why`` has the ``id``, with a note of the reason. Where
    the class of the model has one number for some of these and others, the others stay as well."""
    left, fields = list[Family](), set[tuple[int, str]]()
    for family in families:
        if id(family) in why:
            notes.append(f"{family.label} stay: {why[id(family)]}")
            fields |= family.fields
        else:
            left.append(family)
    if not goal.for_class_of(session.model):
        return left
    remaining = [f for f in left if fields.isdisjoint(f.fields)]
    if len(remaining) < len(left):
        count = len(left) - len(remaining)
        notes.append(
            f"other families that stay: {count}, as the configuration has one number for all"
        )
    return remaining


def _with_removable_experts(
    families: list[Family], session: Session, goal: Goal, notes: list[str]
) -> tuple[list[Family], dict[int, Removal]]:
    """The families without those of experts that have to stay; and in which order the others go."""
    mixtures = [f for f in families if f.kind == "experts"]
    others = [f for f in families if f.kind != "experts"]
    if not mixtures:
        return families, {}
    if isinstance(goal.keep, Mapping) and "experts" not in goal.keep:
        return others, {}  # costs are not needed
    if goal.parameters is None and goal.keep is None:
        notes.append("experts stay: a row is routed to as many of fewer experts, in the same time")
        return others, {}
    found = expert_removals(mixtures, session, notes)
    known = {id(f): r for f, r in zip(mixtures, found, strict=True) if r is not None}
    if len(known) < len(mixtures) and goal.for_class_of(session.model):
        return others, {}  # there is one number for all of them
    return [f for f in families if f.kind != "experts" or id(f) in known], known


def _with_channels(families: Sequence[Family], session: Session, notes: list[str]) -> list[Family]:
    """These families and those of channels. Names are believed unless more is seen to have the
    units, such as a convolution in between: then the family that was seen takes their place."""
    model, batch = session.model, next(iter(session.each("channels")))
    named = {f.readers[0]: f.tensors for f in families_of(model)}
    seen = channel_families(model, session, batch, notes)
    wider = [f for f in seen if not f.tensors <= named.get(f.readers[0], set())]
    replaced = {name for f in wider for name in f.readers}
    result = [f for f in families if replaced.isdisjoint(f.readers)]
    for family in wider:
        if stand_alone(session, batch, [family]):
            result.append(family)
        else:
            notes.append(f"{', '.join(family.producers)}: their outputs stay: {_BOUND}")
    return result


def _weights(name: str, shape: Sequence[int]) -> float:
    return float(math.prod(shape))


def _multiplications(families: Sequence[Family], session: Session) -> _Cost:
    """Of a weight with so many rows and columns, for one row of inputs of the layer that has fewest
    of them: a convolution's weight is used at every position."""
    concerned = {slot.name for f in families for slot in f.slots}
    layers = [x for x in layers_of(session.model) if f"{x.name}.weight" in concerned]
    rows = flow_of(layers, session).rows
    fewest = min(rows.values(), default=1.0)
    times = {f"{name}.weight": count / fewest for name, count in rows.items()}
    return lambda name, shape: times.get(name, 0.0) * math.prod(shape)


def _latency(families: Sequence[Family], session: Session, table: LatencyTable) -> _Cost:
    """Seconds of a layer's calls on the first batch, with a weight of that shape."""
    concerned = {slot.name.removesuffix(".weight") for f in families for slot in f.slots}
    modules = {x.name: x.module for x in layers_of(session.model) if x.name in concerned}
    batch = next(iter(session.each("latency")))
    shapes = inputs_of(modules.values(), session, batch)

    def seconds(name: str, shape: Sequence[int]) -> float:
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            return 0.0
        return sum(table.seconds(module, x, shape) for x in shapes.get(module, ()))

    return seconds
