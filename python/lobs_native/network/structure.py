"""The structure of a model, observed on its batches: the order in which its layers are called, its
stacks of blocks, and which layers share a second moment."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.blocks import Stack, find_stacks
from lobs_native.calibration.flow import Flow, flow_of
from lobs_native.calibration.observe import Observation
from lobs_native.calibration.outputs import MEASURING, SAMPLE, sizes_of
from lobs_native.calibration.replay import repeated_limit, widest_repeated
from lobs_native.calibration.session import Session
from lobs_native.calibration.tree import chunks
from lobs_native.layers import Linear
from lobs_native.network.bound import norm_bytes, norm_flops
from lobs_native.network.descent import tuning_bytes
from lobs_native.network.output_aim import aiming_bytes
from lobs_native.network.resources import Workload
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.tuning import tuning_passes

__all__ = [
    "Structure",
    "multiplications",
    "order_of",
    "structure_of",
    "workload",
]

_UNTIL_KNOWN = 0.6  # of a block's forward, the part until the inputs of one of its layers are known


def order_of(
    jobs: Sequence[LayerJob], session: Session, seen: Observation | None = None
) -> tuple[list[LayerJob], Flow]:
    """The jobs in the order in which the model calls their layers, and how it calls them: as was
    ``seen``, or by another run."""
    layers = [job.layer for job in jobs]
    flow = None if seen is None else seen.flow_of(layers)
    if flow is None:
        flow = flow_of(layers, session)
    by_name = {job.layer.name: job for job in jobs}
    return [by_name[name] for name in flow.order], flow


@dataclass(frozen=True)
class Structure:
    """The parts of a model in order, each a stack of blocks or not; and the layers of each part, in
    groups that need one second moment."""

    parts: list[tuple[Stack | None, list[list[LayerJob]]]]
    once: set[str]  # layers that no batch calls twice
    reasons: list[str]  # why some modules do not form a stack

    @property
    def stacks(self) -> list[Stack]:
        return [stack for stack, _ in self.parts if stack is not None]

    def finishing(self, stack: Stack, block: int) -> dict[nn.Module, list[str]]:
        """The parts of a block that return the same once all of their layers are pruned, none of
        which may be called twice: children with several layers, without the one that has the
        block's last layer; and each other layer on its own, but for those of the last group, for
        which nothing waits. Part -> layers."""
        groups = self._groups_of(stack, block)
        names = [job.layer.name for group in groups for job in group]
        parts = {}
        for name, part in stack.modules[block].named_children():
            layers = [x for x in names if x.startswith(f"{stack.names[block]}.{name}.")]
            if len(layers) > 1 and self.once.issuperset(layers) and layers[-1] != names[-1]:
                parts[part] = layers
        within = {name for layers in parts.values() for name in layers}
        modules = dict(stack.modules[block].named_modules())
        for job in itertools.chain.from_iterable(groups[:-1]):
            name = job.layer.name
            module = modules.get(name.removeprefix(f"{stack.names[block]}."))
            if module is not None and name in self.once and name not in within:
                parts[module] = [name]
        return parts

    def _groups_of(self, stack: Stack, block: int) -> list[list[LayerJob]]:
        """The layers of a block, in groups."""
        return [
            group
            for within, groups in self.parts
            for group in groups
            if within is stack and stack.block_of(group[0].layer.name) == block
        ]

    def repeated_bytes(self, stack: Stack, rows: Mapping[str, float]) -> float:
        """The most bytes of outputs of finished parts of a block on the first batch, on which its
        layers see so many ``rows``."""
        most = 0.0
        for block in range(len(stack.modules)):
            layers = {job.layer.name: job.layer for g in self._groups_of(stack, block) for job in g}
            total = 0.0
            for names in self.finishing(stack, block).values():
                size = float(stack.hidden_bytes)
                if len(names) == 1:
                    layer = layers[names[0]]
                    each = next(iter(layer.parameters.values())).element_size()
                    size = rows.get(names[0], 0.0) * layer.groups * layer.rows * each
                total += size if size <= widest_repeated(stack) * stack.hidden_bytes else 0.0
            most = max(most, total)
        return most

    def with_jobs(self, jobs: Sequence[LayerJob]) -> Structure:
        """The same structure with other settings for its layers."""
        now = {job.layer.name: job for job in jobs}
        parts = [
            (stack, [[now[job.layer.name] for job in group] for group in groups])
            for stack, groups in self.parts
        ]
        return dataclasses.replace(self, parts=parts)

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {"blocks": [stack.name for stack in self.stacks], "no blocks": self.reasons}


def multiplications(jobs: Sequence[LayerJob], rows: Mapping[str, float]) -> dict[str, float]:
    """How often a weight of each layer is multiplied, relative to the layer with the fewest."""
    seen = {job.layer.name: rows.get(job.layer.name, 1.0) for job in jobs}
    return {name: n / min(seen.values()) for name, n in seen.items()}


def structure_of(
    jobs: Sequence[LayerJob],
    flow: Flow,
    session: Session,
    settings: NetworkSettings,
    seen: Observation | None = None,
) -> Structure:
    """The structure around these layers, in the order in which they are called."""
    if settings.inputs == "dense":
        return Structure([(None, [list(jobs)])], set(), [])
    stacks, reasons = list[Stack](), list[str]()
    if settings.blocks == "auto":
        names = [job.layer.name for job in jobs]
        stacks, reasons = find_stacks(session, names, None if seen is None else seen.sightings)
    stacks = [s for s in stacks if _contiguous(s, jobs) and _closed(s, jobs, session.model)]
    parts = [(stack, _together(own, flow.groups, stack)) for stack, own in _segments(jobs, stacks)]
    return Structure(parts, flow.once, reasons)


def workload(
    structure: Structure,
    session: Session,
    rows: Mapping[str, float],
    settings: NetworkSettings,
    *,
    sensitive: bool,
    weighted: Sequence[str],
    shared_budget: bool,
    sampled: bool,
    covered: Sequence[Tensor] = (),
    tuned: Sequence[Mapping[str, Tensor]] = (),
    seen: Observation | None = None,
) -> Workload:
    """The work ahead; it includes passes for sensitivities if ``sensitive`` or for the ``weighted``
    layers, one for the costs if there is a ``shared_budget``, and the output's change on a sample
    if ``sampled``, else on all data, with the norms of the weights that are ``covered`` by Theorem
    3.2. What was ``seen`` on the first batch spares another run."""
    batches, doubled = session.size(), 2.0 if settings.inputs == "corrected" else 1.0
    all_batches = batches * (1 + len(session.held_back) / len(session.batches))
    measured = batches * min(rows.values(), default=1.0)  # rows of output, or a little more
    part = min(1.0, SAMPLE / max(1.0, measured)) if sampled else 1.0
    passes = 2.0 * part + 3.0 * (sensitive or bool(weighted)) + shared_budget
    passes += 1.0 / batches  # the look at the first batch
    whole = bool(tuned) and settings.tune == "network"
    by_blocks = bool(tuned) and not whole
    for stack, groups in structure.parts:
        if stack is None:
            passes += doubled * len(groups)
            continue
        # A pass over a block ends where its inputs are known; between blocks it goes to the end.
        runs = _UNTIL_KNOWN * len(groups) + len(stack.modules) - 1
        runs += 0 if stack.hollow else len(stack.modules)
        passes += doubled * runs / stack.all_blocks
        if by_blocks:
            passes += (
                len(stack.modules)
                / stack.all_blocks
                * tuning_passes(False, settings.tune_passes, False)
            )
    if whole:
        recomputed = settings.memory is not None and bool(structure.stacks)
        passes += tuning_passes(True, settings.tune_passes, recomputed)
    states = max((stack.hidden_bytes for stack in structure.stacks), default=0)
    repeated = put_aside = 0  # outputs of finished parts, in memory and on disk
    for stack in structure.stacks:
        every = round(structure.repeated_bytes(stack, rows) * all_batches * doubled)
        most = repeated_limit(stack)
        stays = every if most is None else min(every, round(most * doubled))
        repeated, put_aside = max(repeated, stays), max(put_aside, every - stays)
    others = max((stack.other_bytes for stack in structure.stacks), default=0)
    if seen is not None and session.first_is_largest:
        forward, outputs = batches * seen.seconds, seen.outputs
    else:
        forward, output = session.timed_pass()
        outputs = sizes_of(output)
    size = sum(entries * size for entries, size in outputs)
    return Workload(
        batches=batches,
        forward=forward,
        rows=dict(rows),
        sets=2 if len(session.batches) > 1 else 1,
        states=round(states * all_batches * (doubled + by_blocks)),  # and targets
        repeated=repeated,
        put_aside=put_aside,
        others=round(others * all_batches * doubled),
        passes=passes * all_batches / batches,
        backward=sensitive or bool(weighted) or whole,
        norms=sum(norm_flops(weight) for weight in covered),
        tuning=max((tuning_bytes(part.values()) for part in tuned), default=0)
        + (aiming_bytes(size) if whole else 0),
        targets=round(batches * size) if whole else 0,
        network=_network_bytes(session),
        token_weights=round(4 * batches * sum(rows.get(name, 0.0) for name in weighted)),
        output=size,
        sample=round(part * batches * size) if sampled else 0,
        measuring=max(
            min(MEASURING, sum(4 * 8 * entries for entries, _ in outputs)),
            max(map(norm_bytes, covered), default=0),
        ),
        idle=max(0, session.ranks.size - len(chunks(len(session.batches)))),
    )


def _network_bytes(session: Session) -> int:
    """Bytes of the model's parameters that are in memory at a time."""
    if session.offload is not None:
        return session.offload.rest + session.offload.largest
    return sum(p.numel() * p.element_size() for p in session.model.parameters() if not p.is_meta)


def _contiguous(stack: Stack, jobs: Sequence[LayerJob]) -> bool:
    """Whether its layers come one after another, block after block."""
    inside = [job.layer.name in stack for job in jobs]
    first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
    numbers = [stack.block_of(job.layer.name) or 0 for job in jobs[first : last + 1]]
    return all(inside[first : last + 1]) and numbers == sorted(numbers)


def _closed(stack: Stack, jobs: Sequence[LayerJob], model: nn.Module) -> bool:
    """Whether every weight of its layers is used in one block only."""
    block = {
        site.module: stack.block_of(job.layer.name)
        for job in jobs
        for site in job.layer.sites
        if job.layer.name in stack
    }
    for job in jobs:
        number = stack.block_of(job.layer.name)
        if number is None and any(m in job.layer.around_some for m in stack.modules):
            return False
        around = job.layer.around_all
        if number is not None and around and stack.modules[number] not in around:
            return False
    names = model.named_modules(remove_duplicate=False)
    return all(stack.block_of(name) == block[m] for name, m in names if m in block)


def _segments(
    jobs: Sequence[LayerJob], stacks: Sequence[Stack]
) -> list[tuple[Stack | None, list[LayerJob]]]:
    """The jobs in order, divided into those of one stack and those outside."""
    out: list[tuple[Stack | None, list[LayerJob]]] = []
    for job in jobs:
        stack = next((s for s in stacks if job.layer.name in s), None)
        if out and out[-1][0] is stack:
            out[-1][1].append(job)
        else:
            out.append((stack, [job]))
    return out


def _together(
    jobs: Sequence[LayerJob], shared: Sequence[Sequence[str]], stack: Stack | None
) -> list[list[LayerJob]]:
    """Neighbours that read the same tensor in the same way need one second moment."""

    def reads(job: LayerJob) -> tuple[Any, ...]:
        layer = job.layer
        place = next((i for i, names in enumerate(shared) if layer.name in names), -1)
        block = None if stack is None else stack.block_of(layer.name)
        return place, block, layer.width, layer.bias() is not None

    groups: list[list[LayerJob]] = []
    for job in jobs:
        alike = groups and all(isinstance(j.layer, Linear) for j in (job, groups[-1][0]))
        if alike and reads(job) == reads(groups[-1][0]) and reads(job)[0] >= 0:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups
