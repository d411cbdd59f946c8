"""The paper's removal in a fixed order: ``static_order_prune_``, with its ranking, from H."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.ops import reference
from lobs_native.solvers.inversion import invert
from speed import shapes
from speed.baselines import static_order as baselines
from speed.case import Case, Side, clock, copy_first, relative_error
from speed.cases.layers import Layer, lost_share, named_layer

CHECKED = 4  # rows are independent, so a few of them check a layer: the loop would take hours


def cases(quick: bool) -> Iterator[Case]:
    """Ranking and removal, given A; the removal alone; everything from H."""
    for name, share, samples in (
        ("lenet300-100.fc1", 0.933, (2_000, 10_000)),
        ("opt-1.3b.attention", 0.5, (50, 5_000)),
    ):
        layer = named_layer(name, share, small=quick)
        yield ranked_removal_case(layer, *(min(n, layer.count // 10) for n in samples))
        yield removal_case(layer).against("torch")
        yield whole_layer_case(layer)


def removal_case(layer: Layer) -> Case:
    """The removal, given which weights go and in what order."""
    W, A = layer.W, layer.A
    ranking = baselines.rank_by_row(W, A.diagonal(), layer.count)
    order, start = ranking.removals()

    def ours(
        W: Tensor, A: Tensor, order: Tensor, start: Tensor, *, backend: str | None = None
    ) -> Tensor:
        ops.static_order_prune_(W, A, order, start, backend=backend)
        return W

    def released(W: Tensor, A: Tensor, order: Tensor, start: Tensor) -> Tensor:
        return _released_loop(W, A, order, start, mask_at_once=False)

    expected, _ = _first_rows(layer, ranking)
    return Case(
        name=f"static order, removal alone, {layer}",
        inputs=(W, A, order, start),
        prepare=copy_first,
        work=2.0 * layer.count * layer.shape.columns,
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-4,
        ours=Side("lobs", ours),
        rivals={
            "published": Side("released loop, masked once", released),
            "torch": Side(
                "torch in blocks",
                lambda W, A, order, start: baselines.remove_in_blocks_(W, A, ranking),
            ),
        },
    )


def ranked_removal_case(layer: Layer, masked_sample: int, sample: int) -> Case:
    """Ranking and removal; the released loops are extrapolated from samples of their removals."""
    W, A = layer.W, layer.A
    diag = A.diagonal().contiguous()

    def ours(W: Tensor, A: Tensor, diag: Tensor, *, backend: str | None = None) -> Tensor:
        score = (W * W / diag).to(torch.float64)
        removed = ops.rank_lowest(score.view(1, -1), layer.count, backend=backend).view_as(score)
        order, start = ops.rank_rows(score, removed, backend=backend)
        pruned = W.clone()
        ops.static_order_prune_(pruned, A, order, start, backend=backend)
        return pruned

    def tuned(W: Tensor, A: Tensor, diag: Tensor) -> Tensor:
        ranking = baselines.rank_by_row(W, diag, layer.count)
        return baselines.remove_in_blocks_(W.clone(), A, ranking)

    ranking = baselines.rank_by_row(W, diag, layer.count)
    _check_ranking(layer, ranking)
    expected, released = _first_rows(layer, ranking)
    return Case(
        name=f"static order, ranking and removal, {layer}",
        inputs=(W, A, diag),
        work=2.0 * layer.count * layer.shape.columns,
        unit="GFLOP/s",
        error=relative_error(expected),
        tolerance=1e-4,
        ours=Side("lobs", ours),
        rivals={
            "published": _sampled_loop(layer, masked_sample, released, mask_at_once=True),
            "published-masked-once": _sampled_loop(layer, sample, released, mask_at_once=False),
            "torch": Side("torch in blocks", tuned),
        },
    )


def whole_layer_case(layer: Layer) -> Case:
    """Everything from H: inversion, ranking, removal, and the error."""

    def ours(W: Tensor, H: Tensor, *, backend: str | None = None) -> Tensor:
        return lobs.prune_weight(
            W, H, sparsity=layer.share, method="lobs", damping=shapes.DAMPING, backend=backend
        ).weight

    def removed(W: Tensor, A: Tensor) -> Tensor:
        A = A.to(torch.float32)
        ranking = baselines.rank_by_row(W, A.diagonal(), layer.count)
        return baselines.remove_in_blocks_(W.clone(), A, ranking)

    def tuned(W: Tensor, H: Tensor) -> Tensor:
        return removed(W, shapes.inverse(H))

    def tuned_with_our_inverse(W: Tensor, H: Tensor) -> Tensor:  # which is torch throughout
        return removed(W, invert(H, shapes.DAMPING, "H").A)

    layer_error = lost_share(layer)

    def with_error(prune: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(W: Tensor, H: Tensor) -> Tensor:
            pruned = prune(W, H)
            layer_error(pruned)
            return pruned

        return run

    return Case(
        name=f"whole layer from H, {layer}",
        inputs=(layer.W, layer.H),
        work=2.0 * layer.count * layer.shape.columns,
        unit="GFLOP/s",
        error=layer_error,
        tolerance=1.01 * layer_error(tuned(layer.W, layer.H)),
        ours=Side("lobs.prune_weight", ours),
        rivals={
            "torch": Side(
                "torch Cholesky, in blocks, error",
                with_error(tuned),
                note="errors are the layer's, which both sides compute in float64",
            ),
            "torch-our-inverse": Side(
                "torch, our blocked inverse, in blocks, error",
                with_error(tuned_with_our_inverse),
                note="our inverse is made of torch's operations alone",
            ),
        },
    )


def _sampled_loop(
    layer: Layer, sample: int, answer: Callable[[bool], Tensor], *, mask_at_once: bool
) -> Side:
    """The released loop: the ranking in full, and a counted sample of the removals."""
    inputs_first = layer.W.numpy().T.copy()  # (C, R)
    A = layer.A.numpy()
    diag = A.diagonal().copy()
    positions = baselines.rank_globally(inputs_first, diag)

    ranking = clock(lambda: baselines.rank_globally(inputs_first, diag))
    removing = clock(
        lambda W: baselines.remove_one_by_one(W, A, positions[:sample], mask_at_once=mask_at_once),
        lambda: (inputs_first.copy(),),
    )
    return Side(
        "released loop" if mask_at_once else "released loop, masked once",
        seconds=lambda: ranking() + removing() * (layer.count / sample),
        answer=lambda: answer(mask_at_once),
        note=f"extrapolated from {sample:,} of {layer.count:,} removals",
    )


def _released_loop(
    W: Tensor, A: Tensor, order: Tensor, start: Tensor, *, mask_at_once: bool
) -> Tensor:
    """The authors' loop with the removals of ``order`` and ``start``."""
    unit = np.repeat(np.arange(len(W)), start.diff().numpy())
    positions = order.numpy().astype(np.int64) * len(W) + unit
    inputs_first = W.numpy().T.copy()  # (C, R)
    return torch.from_numpy(
        baselines.remove_one_by_one(inputs_first, A.numpy(), positions, mask_at_once=mask_at_once)
    ).T


def _first_rows(
    layer: Layer, ranking: baselines.Ranking
) -> tuple[Tensor, Callable[[bool], Tensor]]:
    """The float64 answer for the first rows, and the released loop's answer for them."""
    few = slice(0, CHECKED)
    first = baselines.Ranking(
        ranking.removed[few], ranking.columns[few], ranking.counts[few], ranking.cut
    )
    order, start = first.removals()
    expected = layer.W[few].to(torch.float64)
    reference.static_order_prune_(expected, layer.A, order, start)

    def released(mask_at_once: bool) -> Tensor:
        return _released_loop(layer.W[few], layer.A, order, start, mask_at_once=mask_at_once)

    return expected, released


def _check_ranking(layer: Layer, ranking: baselines.Ranking) -> None:
    """End the program unless the released ranking has the same highest score."""
    W, A = layer.W, layer.A
    ranked = baselines.rank_globally(W.numpy().T.copy(), A.numpy().diagonal())[: layer.count]
    q, unit = np.divmod(ranked, len(W))
    highest = float((W[unit[-1], q[-1]] ** 2) / A[q[-1], q[-1]])
    if highest != ranking.cut:
        raise SystemExit(f"{layer}: the two rankings disagree: {highest} and {ranking.cut}")
