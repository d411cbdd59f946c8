"""Between two matrix products of ADMM: ``admm_step_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lobs_native import ops
from speed import shapes
from speed.baselines import admm as baselines
from speed.baselines.admm import Plan, State
from speed.case import Case, Side

_RIVALS: dict[str, Callable[[State, Plan], int]] = {
    "all": baselines.step_by_histogram,
    "all, no guess": baselines.step_by_histogram,
    "by row": baselines.step_by_kthvalue,
    "2:4": baselines.step_by_network,
}
SELECTIONS = tuple(_RIVALS)
BEFORE = 10  # iterations


def cases(quick: bool) -> Iterator[Case]:
    """A layer of a model with 7 billion weights, half removed in every way."""
    shape = shapes.LayerShape("7b.attention", 4096, 4096)
    for selection in SELECTIONS:
        yield step_case(shape.small() if quick else shape, selection)


def step_case(shape: shapes.LayerShape, selection: str) -> Case:
    """An iteration in the middle, for a second moment that is diagonal: M rho is ``share``.

    ``selection`` says among which weights half are removed. With "all", the cut is guessed from the
    last iteration. The error is that of d; a wrong choice is infinite.
    """
    R, C = shape.rows, shape.columns
    generator = torch.Generator().manual_seed(5)
    x = shapes.weights(shape)
    plan = {
        "all": Plan(R * C // 2),
        "all, no guess": Plan(R * C // 2),
        "by row": Plan(C // 2, by_row=True),
        "2:4": Plan(0, group=4, per_group=2),
    }[selection]
    options = (
        {"group": 4, "per_group": 2} if plan.group else {"count": plan.count, "by_row": plan.by_row}
    )

    share = torch.rand(C, generator=generator).mul_(0.6).add_(0.3)
    d, removed, last = torch.zeros_like(x), torch.zeros(R, C, dtype=torch.bool), 0.0
    for _ in range(BEFORE):
        last = ops.admm_step_(d * share, d, x, removed, **options, cut=last).cut
    p, cut = d * share, last if selection == "all" else 0.0
    after, gone = d.clone(), removed.clone()
    ops.admm_step_(p, after, x, gone, **options, backend="reference")

    def prepare(*inputs: Tensor) -> tuple[State]:
        now = State(*inputs)
        return (now._replace(d=now.d.clone(), removed=now.removed.clone()),)

    def ours(s: State, *, backend: str | None = None) -> State:
        ops.admm_step_(s.p, s.d, s.x, s.removed, **options, cut=cut, backend=backend)
        return s

    def rival(step: Callable[[State, Plan], int]) -> Callable[[State], State]:
        def run(s: State) -> State:
            step(s, plan)
            return s

        return run

    def error(s: State) -> float:
        if not torch.equal(s.removed, gone):
            return torch.inf
        return float((s.d - after).abs().max() / after.abs().max())

    best = _RIVALS[selection]
    values, marks = (4, 2) if plan.group or plan.by_row else (7, 3)
    return Case(
        name=f"ADMM step ({R}, {C}), half of {selection}",
        inputs=(p, d, x, removed, torch.empty_like(x), torch.empty_like(x), removed.clone()),
        work=(4 * values + marks) * R * C,
        unit="GB/s",
        error=error,
        tolerance=1e-6,
        prepare=prepare,
        ours=Side("lobs", ours),
        rivals={
            "published": Side("torch topk, where", rival(baselines.step_by_topk)),
            "torch": Side(f"torch in place, {best.__name__.split('_by_')[1]}", rival(best)),
        },
    )
