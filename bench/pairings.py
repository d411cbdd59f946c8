"""What paired.py compares: each problem, our way, and its rivals, with inputs and a float64 answer.

Cases are made one at a time, when they are asked for: some of them fill a gigabyte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import baselines
import numpy as np
import shapes
import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops, reference


@dataclass(frozen=True)
class Side:
    """One way to do it."""

    name: str
    seconds: Callable[[], float]  # one measurement, with whatever is not to be timed done inside
    answer: Callable[[], Tensor]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One problem, our way, and the rivals'."""

    name: str
    work: float  # flops or bytes of one run, from the Cost line of the operation's contract
    unit: str  # "GFLOP/s" or "GB/s"
    error: Callable[[Tensor], float]  # of an answer
    tolerance: float  # highest error with which a side is still right
    ours: Side
    rivals: Sequence[Side]


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

    def tuned() -> Tensor:
        A = shapes.inverse(H).to(torch.float32)
        ranking = baselines.rank_by_row(W, A.diagonal(), given.count)
        return baselines.remove_in_blocks_(W.clone(), A, ranking)

    def layer_error(pruned: Tensor) -> float:
        """The share of the layer's output that is lost; infinite if the count is not exact."""
        if int((pruned == 0).sum()) != given.count:
            return float("inf")
        before = W.to(torch.float64)
        change = pruned - before
        return float(((change @ H) * change).sum() / ((before @ H) * before).sum())

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
            )
        ],
    )


GROUPS = {
    "hessian": hessian_cases,
    "inverse": inverse_cases,
    "saliency": saliency_cases,
    "static_order": static_order_cases,
}
