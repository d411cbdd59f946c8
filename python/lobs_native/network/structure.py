"""How a model is gone through: the order in which its layers come, its stacks of blocks, and which
layers need one second moment; from running it on the first batch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.blocks import Stack, find_stacks, readers
from lobs_native.calibration.hooks import Columns, hooked
from lobs_native.calibration.run import Run
from lobs_native.errors import ArgumentError
from lobs_native.layers import Layer, Linear
from lobs_native.network.resources import Workload
from lobs_native.network.selection import Plan
from lobs_native.report.records import Skipped

__all__ = [
    "Structure",
    "multiplications",
    "order_of",
    "structure_of",
    "workload",
]


def order_of(
    plans: Sequence[Plan], run: Run, explicit: bool
) -> tuple[list[Plan], list[Skipped], dict[str, float]]:
    """The plans in the order in which the model calls their layers; those it never calls are
    skipped or refused. And how many rows the first batch has for a layer's groups on average."""
    called: dict[str, None] = {}
    rows: dict[str, float] = {}
    first = True

    def see(layer: Layer, x: Tensor, columns: Columns) -> None:
        called.setdefault(layer.name)
        if first:
            seen = sum(len(piece) for _, piece in columns(x)) / layer.groups
            rows[layer.name] = rows.get(layer.name, 0.0) + seen

    with hooked([p.layer for p in plans], see):
        for batch in run.each("order"):
            run.call(run.model, batch)
            first = False
            if len(called) == len(plans):
                break
    by_name = {p.layer.name: p for p in plans}
    missing = [name for name in by_name if name not in called]
    if missing and (explicit or not called):
        raise ArgumentError(
            f"include: the model never calls {', '.join(map(repr, missing))} on the "
            "calibration data; leave it out"
        )
    skipped = [Skipped(name, "never called on the calibration data") for name in missing]
    if missing:
        warnings.warn(
            "lobs_native.prune: not pruned, because the model never calls them: "
            f"{', '.join(missing)}",
            stacklevel=5,
        )
    return [by_name[name] for name in called], skipped, rows


@dataclass(frozen=True)
class Structure:
    """How the model is gone through: parts, each a stack of blocks or not, and in each part groups
    of layers that need one second moment."""

    parts: list[tuple[Stack | None, list[list[Plan]]]]
    once: set[str]  # layers that one forward calls once
    reasons: list[str]  # why some modules are no stack

    @property
    def stacks(self) -> list[Stack]:
        return [stack for stack, _ in self.parts if stack is not None]

    def with_plans(self, order: Sequence[Plan]) -> Structure:
        """The same with what was decided for the layers since."""
        now = {plan.layer.name: plan for plan in order}
        parts = [
            (stack, [[now[plan.layer.name] for plan in group] for group in groups])
            for stack, groups in self.parts
        ]
        return dataclasses.replace(self, parts=parts)

    def said(self) -> dict[str, Any]:
        """For the report."""
        return {"blocks": [stack.name for stack in self.stacks], "no blocks": self.reasons}


def multiplications(order: Sequence[Plan], rows: Mapping[str, float]) -> dict[str, float]:
    """How often a weight of a layer is multiplied, of that of the layer where it is least often."""
    seen = {plan.layer.name: rows.get(plan.layer.name, 1.0) for plan in order}
    return {name: n / min(seen.values()) for name, n in seen.items()}


def structure_of(order: Sequence[Plan], run: Run, inputs: str, blocks: str | None) -> Structure:
    if inputs == "dense":
        return Structure([(None, [list(order)])], set(), [])
    modules = {plan.layer.name: plan.layer.caller for plan in order}
    stacks, reasons = find_stacks(run, modules) if blocks == "auto" else ([], [])
    stacks = [s for s in stacks if _contiguous(s, order) and _closed(s, order, run.model)]
    shared, once = readers(run, modules)
    parts = [(stack, _together(plans, shared, stack)) for stack, plans in _segments(order, stacks)]
    return Structure(parts, once, reasons)


def workload(
    structure: Structure,
    run: Run,
    rows: Mapping[str, float],
    inputs: str,
    *,
    weighed: bool,
    shared_budget: bool,
) -> Workload:
    batches, doubled = run.size(), 2.0 if inputs == "corrected" else 1.0
    passes = 2.0 + 3.0 * weighed + shared_budget  # the change of the output, at the end
    for stack, groups in structure.parts:
        blocks = 1 if stack is None else len(stack.modules)
        passes += doubled * (len(groups) / blocks + (0 if stack is None else 2))
    states = max((stack.hidden_bytes for stack in structure.stacks), default=0)
    others = max((stack.other_bytes for stack in structure.stacks), default=0)
    return Workload(
        batches=batches,
        forward=run.pass_seconds(),
        rows=dict(rows),
        states=round(states * batches * doubled),
        others=round(others * batches * doubled),
        passes=passes,
    )


def _contiguous(stack: Stack, order: Sequence[Plan]) -> bool:
    """Whether its layers come one after another, block after block."""
    inside = [plan.layer.name in stack for plan in order]
    first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
    numbers = [stack.block_of(plan.layer.name) or 0 for plan in order[first : last + 1]]
    return all(inside[first : last + 1]) and numbers == sorted(numbers)


def _closed(stack: Stack, order: Sequence[Plan], model: nn.Module) -> bool:
    """Whether every weight of its layers is used in one block only."""
    block = {
        site.module: stack.block_of(plan.layer.name)
        for plan in order
        for site in plan.layer.sites
        if plan.layer.name in stack
    }
    names = model.named_modules(remove_duplicate=False)
    return all(stack.block_of(name) == block[m] for name, m in names if m in block)


def _segments(
    order: Sequence[Plan], stacks: Sequence[Stack]
) -> list[tuple[Stack | None, list[Plan]]]:
    """The plans in order, cut into those of one stack and those outside."""
    out: list[tuple[Stack | None, list[Plan]]] = []
    for plan in order:
        stack = next((s for s in stacks if plan.layer.name in s), None)
        if out and out[-1][0] is stack:
            out[-1][1].append(plan)
        else:
            out.append((stack, [plan]))
    return out


def _together(
    plans: Sequence[Plan], shared: Sequence[Sequence[str]], stack: Stack | None
) -> list[list[Plan]]:
    """Neighbours that read the same tensor in the same way need one second moment."""

    def reads(plan: Plan) -> tuple[Any, ...]:
        layer = plan.layer
        place = next((i for i, names in enumerate(shared) if layer.name in names), -1)
        block = None if stack is None else stack.block_of(layer.name)
        return place, block, layer.width, layer.bias() is not None

    groups: list[list[Plan]] = []
    for plan in plans:
        alike = groups and all(isinstance(p.layer, Linear) for p in (plan, groups[-1][0]))
        if alike and reads(plan) == reads(groups[-1][0]) and reads(plan)[0] >= 0:
            groups[-1].append(plan)
        else:
            groups.append([plan])
    return groups
