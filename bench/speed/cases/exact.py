"""Exact greedy removal: ``exact_trace``, and whole layers from H by method "exact"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from speed import shapes
from speed.baselines import exact as baselines
from speed.case import Case, Side, clock, copy_first, relative_error
from speed.cases.layers import lost_share, named_layer
from speed.cases.sweep import published_procedure, threshold_surplus

CHECKED = 2  # rows are independent, so a few of them check the rest
BATCH = 32  # rows that the published loop takes at a time


def cases(quick: bool) -> Iterator[Case]:
    """Rows to the end; 2:4 with its weights; the share of a product's rate; a whole layer."""
    yield loss_case(shapes.named("bert-base.fc1", small=quick))
    shape = shapes.named("bert-base.attention", small=quick)
    yield weights_case(shape, 0.5, keep=2, size=4, sample=24)
    yield rate_case(shapes.named("opt-1.3b.attention", small=quick))
    yield whole_layer_case(quick)


def loss_case(shape: shapes.LayerShape) -> Case:
    """What each removal costs, from a batch of rows that are removed to the end."""
    W, A, _ = _problem(shape, BATCH)
    R, C = W.shape
    sample = min(24, C // 2)

    def ours(W: Tensor, A: Tensor, *, backend: str | None = None) -> Tensor:
        return ops.exact_trace(W, A, backend=backend).loss

    def published(W: Tensor, A: Tensor) -> Tensor:
        return baselines.obc_unstructured(W, A).loss

    return Case(
        name=f"exact, {R} rows of {shape} ({C}) removed to the end",
        inputs=(W, A),
        work=useful_flops(R, C, C),
        unit="GFLOP/s",
        error=_curve_error(_expected(W, A, C).loss),
        tolerance=1e-3,
        ours=Side("lobs", ours),
        rivals={
            "published": Side(
                "published loop",
                published,
                seconds=_published_clock(W, A, R, sample),
                answer=lambda: published(W[:CHECKED], A),
                note=f"extrapolated from {sample} of {C} removals",
            ),
            "torch": Side("torch in panels", lambda W, A: baselines.exact_torch(W, A, C).loss),
        },
    )


def weights_case(
    shape: shapes.LayerShape, share: float, *, keep: int = 0, size: int = 0, sample: int = 0
) -> Case:
    """Costs and repaired weights, for a share of every row or ``keep`` of every ``size`` columns.

    All sides must lose what float64 loses, step for step, and their weights must lose that as well.
    With ``sample``, the rivals' times are extrapolated from one batch of rows, and that of the
    published loop from so many of its removals.
    """
    W, A, H = _problem(shape, shape.rows)
    R, C = W.shape
    k = round(share * C)
    damped = shapes.damped(H)
    curve_error = _curve_error(_expected(W, A, k, keep, size).loss)

    def ours(W: Tensor, A: Tensor, *, backend: str | None = None) -> baselines.Exact:
        trace = ops.exact_trace(
            W, A, limit=k, group=size, per_group=size - keep, update=True, backend=backend
        )
        return baselines.Exact(trace.order, trace.loss, W)

    def published(W: Tensor, A: Tensor) -> baselines.Exact:
        if size:
            return baselines.obc_groups(W, A, keep, size)
        return baselines.obc_unstructured(W, A, k)

    def tuned(W: Tensor, A: Tensor) -> baselines.Exact:
        return baselines.exact_torch(W, A, k, keep, size)

    def error(answer: baselines.Exact) -> float:
        removed = answer.weights == 0
        if not bool((removed.sum(dim=1) == k).all()):
            return torch.inf
        if size and not bool((removed.view(len(removed), -1, size).sum(2) == size - keep).all()):
            return torch.inf
        lost = shapes.cost(W[: len(removed)], answer.weights, damped)
        weights_error = abs(lost / float(answer.loss.to(torch.float64).sum()) - 1)
        return max(weights_error, curve_error(answer.loss))

    rivals = {
        "published": Side("published loop", published),
        "torch": Side("torch in panels", tuned),
    }
    if sample:
        batch, sample = W[:BATCH], min(sample, k // 2)
        batch_seconds = clock(lambda: tuned(batch, A))
        rows = f"{len(batch)} of {R} rows"
        rivals = {
            "published": replace(
                rivals["published"],
                seconds=_published_clock(batch, A, R, sample, keep, size),
                answer=lambda: published(W[:CHECKED], A),
                note=f"extrapolated from {sample} of {k} removals, {rows}",
            ),
            "torch": replace(
                rivals["torch"],
                seconds=lambda: batch_seconds() * (R / len(batch)),
                answer=lambda: tuned(W[:CHECKED], A),
                note=f"extrapolated from {rows}",
            ),
        }
    pattern = f"{keep}:{size}" if size else f"{share:.0%}"
    return Case(
        name=f"exact {pattern} with weights, {shape} ({R}, {C})",
        inputs=(W, A),
        prepare=copy_first,
        work=useful_flops(R, C, k),
        unit="GFLOP/s",
        error=error,
        tolerance=1e-3,
        ours=Side("lobs", ours),
        rivals=rivals,
    )


def rate_case(shape: shapes.LayerShape) -> Case:
    """Half of eight rows, against the rate of a matrix product."""
    W, A, _ = _problem(shape, 8)
    R, C = W.shape
    k = C // 2
    generator = torch.Generator().manual_seed(5)
    X, Y = (torch.randn(C, C, generator=generator) for _ in range(2))
    Z = torch.empty(C, C)

    def ours(W: Tensor, A: Tensor, *, backend: str | None = None) -> Tensor:
        return ops.exact_trace(W, A, limit=k, backend=backend).loss

    return Case(
        name=f"exact, {R} rows of {shape} ({C}), half removed",
        inputs=(W, A),
        work=useful_flops(R, C, k),
        unit="GFLOP/s",
        error=_curve_error(_expected(W, A, k).loss),
        tolerance=1e-3,
        ours=Side("lobs", ours),
        rivals={
            "product": Side(
                f"torch.mm, {C} x {C} float32",
                lambda W, A: torch.mm(X, Y, out=Z),
                note="the ratio is ours' share of the rate of a matrix product",
                work=2.0 * C**3,
                error=relative_error(X.to(torch.float64) @ Y.to(torch.float64)),
            ),
            "torch": Side("torch in panels", lambda W, A: baselines.exact_torch(W, A, k).loss),
        },
    )


def whole_layer_case(quick: bool) -> Case:
    """Everything from H: inversion, choice of the weights, repair, and the error."""
    layer = named_layer("opt-125m.fc2", 0.5, small=quick)
    published = published_procedure(layer, None)
    highest = lost_share(layer, threshold_surplus(layer, None))(
        published.run(*published.prepare(layer.W, layer.H))
    )

    def ours(W: Tensor, H: Tensor, *, backend: str | None = None) -> Tensor:
        return lobs.prune_weight(
            W, H, sparsity=layer.share, method="exact", damping=shapes.DAMPING, backend=backend
        ).weight

    return Case(
        name=f"exact, whole layer from H, {layer}",
        inputs=(layer.W, layer.H),
        work=1e3 * layer.W.numel(),
        unit="Mweights/s",
        error=lost_share(layer),
        tolerance=1.01 * highest,
        ours=Side("lobs.prune_weight", ours),
        rivals={"published": replace(published, note="errors are the layer's")},
        most_pairs=3,
    )


def useful_flops(rows: int, C: int, k: int) -> float:
    """Flops that k exact removals per row need, as csrc/exact.h counts them."""
    return 2.0 * rows * (C * k**2 / 2 - k**3 / 3)


def _problem(shape: shapes.LayerShape, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``rows`` rows of a layer: W (R, C) and A (C, C) float32, H (C, C) float64."""
    shape = replace(shape, rows=min(shape.rows, rows))
    H = shapes.second_moment(shape)
    return shapes.weights(shape), shapes.inverse(H).to(torch.float32), H


def _expected(W: Tensor, A: Tensor, until: int, keep: int = 0, size: int = 0) -> baselines.Exact:
    """The float64 answer for the first rows."""
    wide = W[:CHECKED].to(torch.float64), A.to(torch.float64)
    return baselines.exact_torch(*wide, until, keep, size)


def _curve_error(expected: Tensor) -> Callable[[Tensor], float]:
    """Distance of what was lost after every removal from what float64 loses, relative.

    Costs that are nearly equal may change places in float32, which the running sum forgives.
    """
    curve = expected.cumsum(dim=1)

    def error(loss: Tensor) -> float:
        found = loss[: len(curve)].to(torch.float64).cumsum(dim=1)
        return float((found - curve).norm() / curve.norm())

    return error


def _published_clock(
    W: Tensor, A: Tensor, rows: int, sample: int, keep: int = 0, size: int = 0
) -> Callable[[], float]:
    """Seconds of the published loop over ``rows`` rows in batches like W.

    ``sample`` removals of one batch are timed. All removals take the same time.
    """

    def seconds() -> float:
        begun = time.perf_counter()
        batch = baselines.PublishedRows(W, A, keep, size)
        ready = time.perf_counter()
        batch.remove(sample)
        each = (time.perf_counter() - ready) / sample
        return (ready - begun + each * batch.last) * (rows / len(W))

    return seconds
