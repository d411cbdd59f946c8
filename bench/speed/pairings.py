"""What paired.py compares: each problem, our way, and its rivals, with inputs and a float64 answer.

Cases are made one at a time, when they are asked for: some of them fill a gigabyte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import baselines
import numpy as np
import shapes
import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.ops import reference
from lobs_native.solvers.inversion import invert

SWEEP_BLOCK = 128  # columns of a block of SparseGPT's sweep, as published


@dataclass(frozen=True)
class Side:
    """One way to do it."""

    name: str
    seconds: Callable[[], float]  # one measurement, with whatever is not to be timed done inside
    answer: Callable[[], Tensor]
    note: str = ""
    work: float | None = None  # where it is not the case's: rates are then compared, not times
    error: Callable[[Tensor], float] | None = None  # where its answer is not like ours


@dataclass(frozen=True)
class Case:
    """One problem, our way, and the rivals'."""

    name: str
    work: float  # flops or bytes of one run, from the Cost line of the operation's contract
    unit: str  # what 1e9 of them in a second are called: "GFLOP/s" or "GB/s"
    error: Callable[[Tensor], float]  # of an answer
    tolerance: float  # highest error with which a side is still right
    ours: Side
    rivals: Sequence[Side]
    most_pairs: int | None = None  # for runs that take long


def clock(
    run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple
) -> Callable[[], float]:
    """Seconds of ``run(*prepare())``, the preparation (fresh copies, mostly) not counted."""

    def seconds() -> float:
        arguments = prepare()
        begun = time.perf_counter()
        run(*arguments)
        return time.perf_counter() - begun

    return seconds


def relative_error(expected: Tensor) -> Callable[[Tensor], float]:
    """Distance from a float64 answer in the Frobenius norm, relative to that answer."""

    def error(x: Tensor) -> float:
        return float((x.to(torch.float64) - expected).norm() / expected.norm())

    return error


# ---- cases: second moment ----------------------------------------------------------------------


def hessian_cases(quick: bool) -> Iterator[Case]:
    """X^T X of correlated ReLU features."""
    sizes = (
        [(1024, 256, torch.float32), (1024, 256, torch.bfloat16)]
        if quick
        else [
            (8192, 1024, torch.float32),
            (8192, 1024, torch.bfloat16),
            (4096, 2048, torch.float32),
        ]
    )
    for N, C, dtype in sizes:
        yield _hessian_case(N, C, dtype)


def _hessian_case(N: int, C: int, dtype: torch.dtype) -> Case:
    X = shapes.relu_features(N, C).to(dtype)
    exact = X.to(torch.float64)

    def sum64() -> tuple[Tensor]:
        return (torch.zeros(C, C, dtype=torch.float64),)

    def mean32() -> tuple[Tensor]:
        return (torch.zeros(C, C),)

    def ours(H: Tensor) -> Tensor:
        ops.hessian_accumulate_(H, X)
        return H

    def running_mean(H: Tensor) -> Tensor:
        return baselines.gram_running_mean_(H, 0, X)

    def triangle(H: Tensor) -> Tensor:
        return baselines.gram_block_triangle_(H, X)

    product = "x.T @ x" if dtype == torch.float32 else "x.float().T @ x.float()"
    return Case(
        name=f"hessian ({N}, {C}) {_short(dtype)}",
        work=N * C * (C + 1),
        unit="GFLOP/s",
        error=relative_error((exact.T @ exact).tril()),
        tolerance=1e-5,
        ours=Side("lobs", clock(ours, sum64), lambda: ours(*sum64()).tril()),
        rivals=[
            Side(product, clock(lambda: baselines.gram(X)), lambda: baselines.gram(X).tril()),
            Side(
                "published running mean",
                clock(running_mean, mean32),
                lambda: running_mean(*mean32()).tril() * (N / 2),
            ),
            Side("torch block triangle", clock(triangle, sum64), lambda: triangle(*sum64()).tril()),
        ],
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- cases: inverse of the second moment -------------------------------------------------------


def inversion_cases(quick: bool) -> Iterator[Case]:
    """The damped inverse of a layer's second moment."""
    for C in (256,) if quick else (1024, 4096):
        yield _inversion_case(C)


def _inversion_case(C: int) -> Case:
    H = shapes.second_moment(shapes.LayerShape("layer", 1, C))
    damped = shapes.damped(H)

    def ours() -> Tensor:
        found = invert(H, shapes.DAMPING, "H")
        return found.A.div_(found.scale)

    def published() -> Tensor:
        return torch.linalg.inv(shapes.damped(H))

    def tuned() -> Tensor:
        return shapes.inverse(H)

    def residual(A: Tensor) -> float:
        product = A @ damped
        product.diagonal().sub_(1.0)
        return float(product.norm()) / C**0.5

    return Case(
        name=f"damped inverse of {C:,} columns, float64",
        work=float(C) ** 3,
        unit="GFLOP/s",
        error=residual,
        tolerance=1e-9,
        ours=Side("lobs", clock(ours), ours),
        rivals=[
            Side("torch.linalg.inv, as published", clock(published), published),
            Side("torch Cholesky and its inverse", clock(tuned), tuned),
        ],
    )


# ---- cases: block inverse ----------------------------------------------------------------------


def inverse_cases(quick: bool) -> Iterator[Case]:
    """64 gradients of a million weights into the block inverse Fisher."""
    for B in shapes.FISHER_BLOCKS:
        yield _inverse_case(20_000 if quick else shapes.FISHER_WEIGHTS, B, sample=4)


def _inverse_case(d: int, B: int, sample: int) -> Case:
    r = shapes.FISHER_GRADIENTS
    blocks = -(-d // B)
    m = float(r)
    G = shapes.gradients(r, blocks * B)
    F = torch.empty(blocks, B, B)
    few = slice(0, 8)  # blocks are independent: eight of them are checked against float64

    def start() -> tuple[Tensor]:
        F.zero_().diagonal(dim1=1, dim2=2).fill_(shapes.FISHER_ALPHA)
        return (F,)

    def ours(f: Tensor) -> Tensor:
        ops.inverse_update_(f, G, m)
        return f

    def one_by_one(f: Tensor, count: int) -> Tensor:
        return baselines.inverse_update_one_by_one_(f, G[:count], m)

    def together(f: Tensor) -> Tensor:
        return baselines.inverse_update_together_(f, G, m)

    expected = start()[0][few].to(torch.float64)
    reference.inverse_update_(expected, G[:, : len(expected) * B], m)
    sampled = clock(lambda f: one_by_one(f, sample), start)
    return Case(
        name=f"inverse update, {d:,} weights, B={B}, {r} gradients",
        work=blocks * (r / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-3,
        ours=Side("lobs", clock(ours, start), lambda: ours(*start())[few].clone()),
        rivals=[
            Side(
                "published rank-1 updates",
                lambda: sampled() * (r / sample),
                lambda: one_by_one(*start(), r)[few].clone(),
                note=f"extrapolated from {sample} of {r} gradients",
            ),
            Side(
                "torch, 16 at once",
                clock(together, start),
                lambda: together(*start())[few].clone(),
            ),
        ],
    )


# ---- cases: saliency ---------------------------------------------------------------------------


def saliency_cases(quick: bool) -> Iterator[Case]:
    """The cheapest weight of each row in the middle of a removal: three weights in ten are gone."""
    shape = shapes.LAYERS["opt-1.3b.attention"]
    if quick:
        shape = shape.small()
    R, C = shape.rows, shape.columns
    generator = torch.Generator().manual_seed(3)
    W = shapes.weights(shape)
    diag = torch.rand(R, C, generator=generator).add_(0.5)
    live = torch.rand(R, C, generator=generator) >= 0.3
    dead = ~live
    cost = torch.empty_like(W)
    score = torch.where(live, W.to(torch.float64) ** 2 / diag, torch.inf)
    lowest = score.amin(dim=1)

    def excess(column: Tensor) -> float:
        chosen = score.gather(1, column[:, None])[:, 0]
        return float((chosen - lowest).max() / lowest.mean())  # the lowest itself may be zero

    def in_place() -> Tensor:
        return baselines.saliency_argmin_in_place(W, diag, dead, cost)

    def ours() -> Tensor:
        return ops.saliency_argmin(W, diag, live)[0]

    def where() -> Tensor:
        return baselines.saliency_argmin(W, diag, live)

    yield Case(
        name=f"saliency argmin ({R}, {C})",
        work=9 * R * C,
        unit="GB/s",
        error=excess,
        tolerance=1e-6,
        ours=Side("lobs", clock(ours), ours),
        rivals=[
            Side("torch.where, argmin", clock(where), where),
            Side("torch in place", clock(in_place), in_place),
        ],
    )


# ---- cases: static order -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer to be pruned."""

    shape: shapes.LayerShape
    W: Tensor  # (R, C) float32
    H: Tensor  # (C, C) float64
    A: Tensor  # (C, C) float32
    count: int  # weights to remove

    @property
    def share(self) -> float:
        return self.count / self.W.numel()

    def __str__(self) -> str:
        return f"{self.shape} ({self.shape.rows}, {self.shape.columns}), {self.share:.1%} removed"


def layer(name: str, share: float, quick: bool) -> Layer:
    """Weights, second moment and inverse for a named layer."""
    shape = shapes.LAYERS[name].small() if quick else shapes.LAYERS[name]
    H = shapes.second_moment(shape)
    count = round(share * shape.rows * shape.columns)
    return Layer(shape, shapes.weights(shape), H, shapes.inverse(H).to(torch.float32), count)


def lost_share(given: Layer, surplus: int = 0) -> Callable[[Tensor], float]:
    """The share of the layer's output that is lost; infinite if the count is not exact.

    ``surplus`` is how many weights too many may be gone.
    """
    energy = shapes.cost(given.W, torch.zeros_like(given.W), given.H)

    def error(pruned: Tensor) -> float:
        if not 0 <= int((pruned == 0).sum()) - given.count <= surplus:
            return float("inf")
        return shapes.cost(given.W, pruned, given.H) / energy

    return error


def static_order_cases(quick: bool) -> Iterator[Case]:
    """The paper's removal: ranking and removal, given A; the removal alone; everything from H."""
    for name, share, samples in (
        ("lenet300-100.fc1", 0.933, (2_000, 10_000)),
        ("opt-1.3b.attention", 0.5, (50, 5_000)),
    ):
        chosen = layer(name, share, quick)
        yield _ranked_removal_case(chosen, *(min(n, chosen.count // 10) for n in samples))
        yield _removal_case(chosen)
        yield _whole_layer_case(chosen)


def _ranked_removal_case(given: Layer, masked_sample: int, sample: int) -> Case:
    W, A = given.W, given.A
    diag = A.diagonal().contiguous()

    def ours() -> Tensor:
        score = (W * W / diag).to(torch.float64)
        gone = ops.rank_lowest(score.view(1, -1), given.count).view_as(score)
        order, start = ops.rank_rows(score, gone)
        pruned = W.clone()
        ops.static_order_prune_(pruned, A, order, start)
        return pruned

    def tuned() -> Tensor:
        return baselines.remove_in_blocks_(
            W.clone(), A, baselines.rank_by_row(W, diag, given.count)
        )

    few, expected, released = _checked_rows(given)
    return Case(
        name=f"static order, ranking and removal, {given}",
        work=2.0 * given.count * given.shape.columns,
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-4,
        ours=Side("lobs", clock(ours), lambda: ours()[few]),
        rivals=[
            _loop(given, masked_sample, mask_at_once=True, answer=released),
            _loop(given, sample, mask_at_once=False, answer=released),
            Side("torch in blocks", clock(tuned), lambda: tuned()[few]),
        ],
    )


def _loop(
    given: Layer, sample: int, *, mask_at_once: bool, answer: Callable[[bool], Tensor]
) -> Side:
    """The released loop: the ranking in full, and a counted sample of the removals."""
    inputs_first = given.W.numpy().T.copy()  # (C, R)
    A = given.A.numpy()
    diag = A.diagonal().copy()
    positions = baselines.rank_globally(inputs_first, diag)[:sample]
    ranking = clock(lambda: baselines.rank_globally(inputs_first, diag))
    removing = clock(
        lambda W: baselines.remove_one_by_one(W, A, positions, mask_at_once=mask_at_once),
        lambda: (inputs_first.copy(),),
    )
    return Side(
        "released loop" if mask_at_once else "released loop, masked once",
        lambda: ranking() + removing() * (given.count / sample),
        lambda: answer(mask_at_once),
        note=f"extrapolated from {sample:,} of {given.count:,} removals",
    )


def _checked_rows(given: Layer) -> tuple[slice, Tensor, Callable[[bool], Tensor]]:
    """A few rows, their float64 answer, and the released loop's answer for them.

    Rows are independent, so a few of them check a layer; the loop in full would take hours.
    """
    few = slice(0, 4)
    W, A = given.W, given.A
    ranking = baselines.rank_by_row(W, A.diagonal(), given.count)
    inputs_first = W.numpy().T.copy()
    ranked = baselines.rank_globally(inputs_first, A.numpy().diagonal())[: given.count]
    q, unit = np.divmod(ranked, len(W))
    highest = float((W[unit[-1], q[-1]] ** 2) / A[q[-1], q[-1]])
    if highest != ranking.cut:
        raise SystemExit(f"{given}: the two rankings disagree: {highest} and {ranking.cut}")
    some = baselines.Ranking(
        ranking.gone[few], ranking.columns[few], ranking.counts[few], ranking.cut
    )
    order, start = some.removals()
    expected = W[few].to(torch.float64)
    reference.static_order_prune_(expected, A, order, start)

    def released(mask_at_once: bool) -> Tensor:
        unit = np.repeat(np.arange(len(expected)), some.counts.numpy())
        positions = order.numpy().astype(np.int64) * len(expected) + unit
        loop = baselines.remove_one_by_one(
            inputs_first[:, few].copy(), A.numpy(), positions, mask_at_once=mask_at_once
        )
        return torch.from_numpy(loop).T

    return few, expected, released


def _removal_case(given: Layer) -> Case:
    W, A = given.W, given.A
    ranking = baselines.rank_by_row(W, A.diagonal(), given.count)
    order, start = ranking.removals()
    few, expected, _ = _checked_rows(given)

    def fresh() -> tuple[Tensor]:
        return (W.clone(),)

    def ours(w: Tensor) -> Tensor:
        ops.static_order_prune_(w, A, order, start)
        return w

    def tuned(w: Tensor) -> Tensor:
        return baselines.remove_in_blocks_(w, A, ranking)

    return Case(
        name=f"static order, removal alone, {given}",
        work=2.0 * given.count * given.shape.columns,
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-4,
        ours=Side("lobs", clock(ours, fresh), lambda: ours(*fresh())[few]),
        rivals=[Side("torch in blocks", clock(tuned, fresh), lambda: tuned(*fresh())[few])],
    )


def _whole_layer_case(given: Layer) -> Case:
    W, H = given.W, given.H

    def ours() -> Tensor:
        return lobs.prune_weight(
            W, H, sparsity=given.share, method="lobs", damping=shapes.DAMPING
        ).weight

    def removed(A: Tensor) -> Tensor:
        A = A.to(torch.float32)
        ranking = baselines.rank_by_row(W, A.diagonal(), given.count)
        return baselines.remove_in_blocks_(W.clone(), A, ranking)

    def tuned() -> Tensor:
        return removed(shapes.inverse(H))

    def best() -> Tensor:  # the package's inversion is torch throughout
        return removed(invert(H, shapes.DAMPING, "H").A)

    layer_error = lost_share(given)
    return Case(
        name=f"whole layer from H, {given}",
        work=2.0 * given.count * given.shape.columns,
        unit="GFLOP/s",
        error=layer_error,
        tolerance=1.01 * layer_error(tuned()),
        ours=Side("lobs.prune_weight", clock(ours), ours),
        rivals=[
            Side(
                "torch Cholesky, in blocks, error",
                clock(lambda: layer_error(tuned())),
                tuned,
                note="errors are the layer's, which both sides compute in float64",
            ),
            Side(
                "torch, our blocked inverse, in blocks, error",
                clock(lambda: layer_error(best())),
                best,
                note="our inverse is made of torch's operations alone",
            ),
        ],
    )


# ---- cases: exact removal ----------------------------------------------------------------------


def exact_cases(quick: bool) -> Iterator[Case]:
    """Rows to the end; 2:4 with its weights; the share of a product's rate; a whole layer."""
    yield _exact_rows_case(quick)
    yield _exact_groups_case(quick)
    yield _exact_rate_case(quick)
    yield from _exact_layer_cases(quick)


def _useful(rows: int, C: int, k: int) -> float:
    """Flops that k exact removals per row need, as csrc/exact.h counts them."""
    return 2.0 * rows * (C * k**2 / 2 - k**3 / 3)


def _some_rows(
    name: str, rows: int, quick: bool
) -> tuple[shapes.LayerShape, Tensor, Tensor, Tensor]:
    """Some rows of a named layer: shape, W (R, C) and A (C, C) float32, H (C, C) float64."""
    shape = shapes.LAYERS[name].small() if quick else shapes.LAYERS[name]
    shape = replace(shape, rows=min(shape.rows, rows))
    H = shapes.second_moment(shape)
    return shape, shapes.weights(shape), shapes.inverse(H).to(torch.float32), H


def _few_exact(
    W: Tensor, A: Tensor, until: int, keep: int = 0, size: int = 0
) -> tuple[slice, baselines.Exact]:
    """A few rows, which are independent of the others, and their float64 answer."""
    few = slice(0, 2)
    wide = W[few].to(torch.float64), A.to(torch.float64)
    return few, baselines.exact_torch(*wide, until, keep, size)


def _curve_error(expected: Tensor) -> Callable[[Tensor], float]:
    """Distance of what was lost after every removal from what float64 loses, relative.

    Costs that are nearly equal may change places in float32, which the running sum forgives.
    """
    curve = expected.cumsum(dim=1)

    def error(loss: Tensor) -> float:
        return float((loss.to(torch.float64).cumsum(dim=1) - curve).norm() / curve.norm())

    return error


def _published_clock(
    W: Tensor, A: Tensor, rows: int, sample: int, keep: int = 0, size: int = 0
) -> Callable[[], float]:
    """Seconds of the published loop over ``rows`` rows in batches like W.

    Of one batch, ``sample`` removals are made and counted for all, as they all take the same time.
    """

    def seconds() -> float:
        begun = time.perf_counter()
        batch = baselines.PublishedRows(W, A, keep, size)
        ready = time.perf_counter()
        batch.remove(sample)
        each = (time.perf_counter() - ready) / sample
        return (ready - begun + each * batch.last) * (rows / len(W))

    return seconds


def _exact_rows_case(quick: bool) -> Case:
    shape, W, A, _ = _some_rows("bert-base.fc1", 32, quick)
    R, C = W.shape
    few, expected = _few_exact(W, A, C)
    sample = min(24, C // 2)

    def ours() -> Tensor:
        return ops.exact_trace(W, A).loss

    def tuned() -> Tensor:
        return baselines.exact_torch(W, A, C).loss

    return Case(
        name=f"exact, {R} rows of {shape} ({C}) removed to the end",
        work=_useful(R, C, C),
        unit="GFLOP/s",
        error=_curve_error(expected.loss),
        tolerance=1e-3,
        ours=Side("lobs", clock(ours), lambda: ours()[few]),
        rivals=[
            Side(
                "published loop",
                _published_clock(W, A, R, sample),
                lambda: baselines.obc_unstructured(W[few], A).loss,
                note=f"extrapolated from {sample} of {C} removals",
            ),
            Side("torch in panels", clock(tuned), lambda: tuned()[few]),
        ],
    )


def _exact_groups_case(quick: bool) -> Case:
    shape, W, A, H = _some_rows("bert-base.attention", 768, quick)
    R, C = W.shape
    few, expected = _few_exact(W, A, C // 2, 2, 4)
    lowest = float(expected.loss.sum())
    damped = shapes.damped(H)
    batch = W[: min(R, 32)]
    sample = min(24, C // 4)

    def fresh() -> tuple[Tensor]:
        return (W.clone(),)

    def ours(w: Tensor) -> Tensor:
        ops.exact_trace(w, A, group=4, per_group=2, update=True)
        return w

    def error(pruned: Tensor) -> float:
        """How far the cost of the weights is from float64's; infinite if they are not 2:4."""
        if not bool(((pruned == 0).view(len(pruned), -1, 4).sum(dim=2) == 2).all()):
            return float("inf")
        return abs(shapes.cost(W[few], pruned, damped) / lowest - 1)

    def sampled() -> float:
        return tuned() * (R / len(batch))

    tuned = clock(lambda: baselines.exact_torch(batch, A, C // 2, 2, 4))
    return Case(
        name=f"exact 2:4 with weights, {shape} ({R}, {C})",
        work=_useful(R, C, C // 2),
        unit="GFLOP/s",
        error=error,
        tolerance=1e-3,
        ours=Side("lobs", clock(ours, fresh), lambda: ours(*fresh())[few]),
        rivals=[
            Side(
                "published loop",
                _published_clock(batch, A, R, sample, 2, 4),
                lambda: baselines.obc_groups(W[few], A, 2, 4).weights,
                note=f"extrapolated from {sample} of {C // 2} removals, {len(batch)} of {R} rows",
            ),
            Side(
                "torch in panels",
                sampled,
                lambda: baselines.exact_torch(W[few], A, C // 2, 2, 4).weights,
                note=f"extrapolated from {len(batch)} of {R} rows",
            ),
        ],
    )


def _exact_rate_case(quick: bool) -> Case:
    shape, W, A, _ = _some_rows("opt-1.3b.attention", 8, quick)
    R, C = W.shape
    k = C // 2
    few, expected = _few_exact(W, A, k)
    n = C
    generator = torch.Generator().manual_seed(5)
    X, Y = (torch.randn(n, n, generator=generator) for _ in range(2))
    Z = torch.empty(n, n)

    def ours() -> Tensor:
        return ops.exact_trace(W, A, limit=k).loss

    def tuned() -> Tensor:
        return baselines.exact_torch(W, A, k).loss

    def product() -> Tensor:
        return torch.mm(X, Y, out=Z)

    return Case(
        name=f"exact, {R} rows of {shape} ({C}), half removed",
        work=_useful(R, C, k),
        unit="GFLOP/s",
        error=_curve_error(expected.loss),
        tolerance=1e-3,
        ours=Side("lobs", clock(ours), lambda: ours()[few]),
        rivals=[
            Side(
                f"torch.mm, {n} x {n} float32",
                clock(product),
                product,
                note="the ratio is ours' share of the rate of a matrix product",
                work=2.0 * n**3,
                error=relative_error(X.to(torch.float64) @ Y.to(torch.float64)),
            ),
            Side("torch in panels", clock(tuned), lambda: tuned()[few]),
        ],
    )


def _exact_layer_cases(quick: bool) -> Iterator[Case]:
    """Everything from H: inversion, choice of the weights, repair, and the error."""
    given = layer("opt-125m.fc2", 0.5, quick)
    W, H = given.W, given.H
    published = _published_procedure(given, None)
    highest = lost_share(given, _surplus(given, None))(published.answer())

    def ours() -> Tensor:
        return lobs.prune_weight(
            W, H, sparsity=given.share, method="exact", damping=shapes.DAMPING
        ).weight

    yield Case(
        name=f"exact, whole layer from H, {given}",
        work=1e3 * W.numel(),
        unit="Mweights/s",
        error=lost_share(given),
        tolerance=1.01 * highest,
        ours=Side("lobs.prune_weight", clock(ours), ours),
        rivals=[replace(published, note="errors are the layer's")],
        most_pairs=3,
    )


# ---- cases: sweep ------------------------------------------------------------------------------


def sweep_cases(quick: bool) -> Iterator[Case]:
    """SparseGPT's sweep at half, and 2:4: from the same factor, and everything from H."""
    given = layer("opt-1.3b.attention", 0.5, quick)
    for pattern in (None, "2:4"):
        yield _sweep_case(given, pattern)
        yield _sweep_layer_case(given, pattern)


def _factor(given: Layer) -> Tensor:
    """U (C, C) float32, upper, with U^T U = A."""
    return torch.linalg.cholesky(shapes.inverse(given.H), upper=True).to(torch.float32)


def _surplus(given: Layer, pattern: str | None) -> int:
    """The published threshold takes one weight too many of every block, and all equal to it."""
    return 0 if pattern else -(-given.shape.columns // SWEEP_BLOCK) * 4


def _groups(pattern: str | None) -> tuple[int, int]:
    """Group size and how many of a group go; 0 and 0 without groups."""
    return (4, 2) if pattern == "2:4" else (0, 0)


def _swept(W: Tensor, U: Tensor, count: int, pattern: str | None) -> Tensor:
    """Sweep W (R, C) in place: ``count`` weights of the layer, or 2:4."""
    R, C = W.shape
    group, per_group = _groups(pattern)
    removed = 0
    for begin in range(0, C, SWEEP_BLOCK):
        end = min(begin + SWEEP_BLOCK, C)
        part, u = W[:, begin:end], U[begin:end, begin:end]
        E = torch.empty(R, end - begin)
        if pattern:
            gone = torch.zeros(R, end - begin, dtype=torch.uint8)
        else:
            score = (part / u.diagonal()).to(torch.float64).square_()
            until = count * end // C
            lowest = ops.rank_lowest(score.view(1, -1), until - removed)
            gone, removed = lowest.view_as(score).view(torch.uint8), until
        ops.sweep_block_(part, u, gone, E, group=group, per_group=per_group)
        if end < C:
            W[:, end:].addmm_(E, U[begin:end, end:], alpha=-1)
    return W


def _sweep_case(given: Layer, pattern: str | None) -> Case:
    W, U = given.W, _factor(given)

    def fresh() -> tuple[Tensor]:
        return (W.clone(),)

    def ours(w: Tensor) -> Tensor:
        return _swept(w, U, given.count, pattern)

    def published(w: Tensor) -> Tensor:
        return baselines.sparsegpt_(w, U, given.share, *_groups(pattern))

    def tuned(w: Tensor) -> Tensor:
        return baselines.sweep_transposed_(w, U, given.share, *_groups(pattern))

    return _judged(
        f"sweep {pattern or 'half'} from U, {given}",
        given,
        pattern,
        Side("lobs", clock(ours, fresh), lambda: ours(*fresh())),
        Side("published loop", clock(published, fresh), lambda: published(*fresh())),
        Side("torch, transposed blocks", clock(tuned, fresh), lambda: tuned(*fresh())),
    )


def _sweep_layer_case(given: Layer, pattern: str | None) -> Case:
    W, H = given.W, given.H
    target: dict[str, Any] = {"pattern": pattern} if pattern else {"sparsity": given.share}

    def ours() -> Tensor:
        return lobs.prune_weight(W, H, method="sweep", damping=shapes.DAMPING, **target).weight

    return _judged(
        f"sweep {pattern or 'half'} from H, {given}",
        given,
        pattern,
        Side("lobs.prune_weight", clock(ours), ours),
        _published_procedure(given, pattern),
    )


def _published_procedure(given: Layer, pattern: str | None) -> Side:
    """SparseGPT from H: three factorisations in float32, and the loop."""
    H = given.H.to(torch.float32)

    def run(w: Tensor) -> Tensor:
        U = baselines.sparsegpt_factor(H, shapes.DAMPING)
        return baselines.sparsegpt_(w, U, given.share, *_groups(pattern))

    def fresh() -> tuple[Tensor]:
        return (given.W.clone(),)

    return Side(
        "published procedure",
        clock(run, fresh),
        lambda: run(*fresh()),
        error=lost_share(given, _surplus(given, pattern)),
    )


def _judged(
    name: str, given: Layer, pattern: str | None, ours: Side, published: Side, *tuned: Side
) -> Case:
    """All sides must come within 1 % of the lower error, and remove what was asked for."""
    error, theirs = lost_share(given), lost_share(given, _surplus(given, pattern))
    return Case(
        name=name,
        work=float(given.W.numel()) * given.shape.columns,
        unit="GFLOP/s",
        error=error,
        tolerance=1.01 * min(error(ours.answer()), theirs(published.answer())),
        ours=ours,
        rivals=[
            replace(rival, error=theirs, note="errors are the layer's")
            for rival in (published, *tuned)
        ],
    )


# ---- cases: one small system per row -----------------------------------------------------------


def solve_cases(quick: bool) -> Iterator[Case]:
    """The repair of a whole layer of which about half is gone."""
    shape, W, A, _ = _some_rows("bert-base.attention", 768, quick)
    chosen = shapes.halves(shape)
    B = torch.where(chosen, W, 0)
    few = slice(0, 4)
    expected = B[few].to(torch.float64)
    reference.support_solve_(expected, A, chosen[few])

    def fresh() -> tuple[Tensor]:
        return (B.clone(),)

    def ours(X: Tensor) -> Tensor:
        ops.support_solve_(X, A, chosen)
        return X

    def one_by_one() -> Tensor:
        return baselines.solve_row_by_row(B, A, chosen)

    def together() -> Tensor:
        return baselines.solve_together(B, A, chosen)

    yield Case(
        name=f"one system per row, {shape} {tuple(W.shape)}",
        work=float((chosen.sum(dim=1, dtype=torch.float64) ** 3).sum() / 3),
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-3,
        ours=Side("lobs", clock(ours, fresh), lambda: ours(*fresh())[few]),
        rivals=[
            Side("torch row by row", clock(one_by_one), lambda: one_by_one()[few]),
            Side("torch, 16 rows at once", clock(together), lambda: together()[few]),
        ],
    )


GROUPS = {
    "hessian": hessian_cases,
    "inversion": inversion_cases,
    "inverse": inverse_cases,
    "saliency": saliency_cases,
    "static_order": static_order_cases,
    "exact": exact_cases,
    "sweep": sweep_cases,
    "solve": solve_cases,
}
