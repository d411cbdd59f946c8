"""ADMM: ``admm_step_``, between two matrix products; and whole layers from H by method "admm"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from speed import shapes
from speed.baselines import admm as baselines
from speed.baselines.admm import Plan, State
from speed.case import Case, Side, clock
from speed.cases.layers import lost_share, named_layer
from speed.cases.sweep import published_procedure, threshold_surplus

_RIVALS: dict[str, Callable[[State, Plan], int]] = {
    "all": baselines.step_by_histogram,
    "all, no guess": baselines.step_by_histogram,
    "by row": baselines.step_by_kthvalue,
    "2:4": baselines.step_by_network,
}
SELECTIONS = tuple(_RIVALS)
BEFORE = 10  # iterations
SAMPLE = 8  # rows that say how long exact removal takes


def cases(quick: bool) -> Iterator[Case]:
    """A layer of a model with 7 billion weights, half removed in every way."""
    shape = shapes.LayerShape("7b.attention", 4096, 4096)
    for selection in SELECTIONS:
        yield step_case(shape.small() if quick else shape, selection)
    for name in ("opt-125m.fc2", "opt-1.3b.fc2"):
        yield whole_layer_case(name, quick)


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


def whole_layer_case(name: str, quick: bool) -> Case:
    """Everything from H, half removed, against exact removal and SparseGPT's procedure."""
    layer = named_layer(name, 0.5, small=quick)
    published = published_procedure(layer, None)
    theirs = lost_share(layer, threshold_surplus(layer, None))(
        published.run(*published.prepare(layer.W, layer.H))
    )

    def by(method: str, W: Tensor, H: Tensor, backend: str | None = None) -> Tensor:
        share = layer.share
        out = lobs.prune_weight(
            W, H, sparsity=share, method=method, damping=shapes.DAMPING, backend=backend
        )
        return out.weight

    def ours(W: Tensor, H: Tensor, *, backend: str | None = None) -> Tensor:
        return by("admm", W, H, backend)

    some = layer.W[:SAMPLE]
    energy = shapes.cost(some, torch.zeros_like(some), layer.H)
    some_seconds = clock(lambda: by("exact", some, layer.H))
    one_seconds = clock(lambda: by("exact", some[:1], layer.H))

    def exact_seconds() -> float:
        """From some rows and from one, so that the inverse is counted once."""
        more, one = some_seconds(), one_seconds()
        each = max(more - one, 0.0) / (len(some) - 1)  # of a small layer, noise
        return one + each * (len(layer.W) - 1)

    return Case(
        name=f"admm, whole layer from H, {layer}",
        inputs=(layer.W, layer.H),
        work=1e3 * layer.W.numel(),
        unit="Mweights/s",
        error=lost_share(layer),
        tolerance=1.01 * theirs,
        ours=Side("lobs.prune_weight", ours),
        rivals={
            "published": replace(published, note="errors are the layer's"),
            "exact": Side(
                'lobs.prune_weight, method "exact"',
                seconds=exact_seconds,
                answer=lambda: by("exact", some, layer.H),
                error=lambda rows: shapes.cost(some, rows, layer.H) / energy,
                note=f"extrapolated from {len(some)} of {len(layer.W)} rows, whose error it is",
            ),
        },
        most_pairs=5 if layer.W.shape[1] < 4096 else 1,  # minutes each
    )
