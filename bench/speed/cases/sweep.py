"""SparseGPT's sweep over a layer: ``sweep_block_`` in a loop over blocks, and everything from H."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.ops import reference
from speed import shapes
from speed.baselines import sweep as baselines
from speed.case import Case, Side, copy_first
from speed.cases.layers import Layer, lost_share, named_layer

BLOCK = 128  # columns of a block, as published
CHECKED = 4  # rows are independent once the mask is chosen, so a few of them check the rest


def cases(quick: bool) -> Iterator[Case]:
    """Half, and 2:4: from the same factor, and everything from H; and H of few samples."""
    layer = named_layer("opt-1.3b.attention", 0.5, small=quick)
    for pattern in (None, "2:4"):
        yield sweep_case(layer, pattern)
        yield whole_layer_case(layer, pattern)
    yield few_samples_case(quick)


def sweep_case(layer: Layer, pattern: str | None) -> Case:
    """The sweep from the factor U; every row must be repaired as float64 repairs it."""
    U = torch.linalg.cholesky(shapes.inverse(layer.H), upper=True).to(torch.float32)
    groups = _groups(pattern)

    def ours(W: Tensor, U: Tensor, *, backend: str | None = None) -> Tensor:
        return swept_(W, U, layer.count, pattern, backend=backend)

    return _judged(
        f"sweep {pattern or 'half'} from U, {layer}",
        layer,
        pattern,
        inputs=(layer.W, U),
        prepare=copy_first,
        ours=Side("lobs", ours),
        published=Side(
            "published loop", lambda W, U: baselines.sparsegpt_(W, U, layer.share, *groups, BLOCK)
        ),
        torch=Side(
            "torch, transposed blocks",
            lambda W, U: baselines.sweep_transposed_(W, U, layer.share, *groups, BLOCK),
        ),
        repaired=_repaired(layer, U),
    )


def few_samples_case(quick: bool) -> Case:
    """A wide and low layer whose inputs had fewer samples than columns: its H has a low rank."""
    shape = shapes.LayerShape("patch embedding", 64, 3072)
    shape = shape.small() if quick else shape
    h = lobs.Hessian(shape.columns).update(shapes.relu_features(shape.columns // 16, shape.columns))
    H = h.matrix()
    count = shape.rows * shape.columns // 2
    layer = Layer(shape, shapes.weights(shape), H, shapes.inverse(H).to(torch.float32), count)
    # The published factor, in float32, loses up to 2 percent by rounding: H has a low rank.
    return whole_layer_case(layer, None, h, within=1.02)


def whole_layer_case(
    layer: Layer, pattern: str | None, hessian: lobs.Hessian | None = None, *, within: float = 1.01
) -> Case:
    """Everything from H: inversion, factor, sweep, and the error. With a ``hessian``, ours starts
    from that, which knows how many samples it has seen."""
    target: dict[str, Any] = {"pattern": pattern} if pattern else {"sparsity": layer.share}

    samples = "" if hessian is None else f" of {hessian.rows:g} samples"

    def ours(W: Tensor, H: Tensor, *, backend: str | None = None) -> Tensor:
        given = H if hessian is None else hessian
        return lobs.prune_weight(
            W, given, method="sweep", damping=shapes.DAMPING, backend=backend, **target
        ).weight

    return _judged(
        f"sweep {pattern or 'half'} from H{samples}, {layer}",
        layer,
        pattern,
        inputs=(layer.W, layer.H),
        ours=Side("lobs.prune_weight", ours),
        published=published_procedure(layer, pattern),
        within=within,
    )


def swept_(
    W: Tensor, U: Tensor, count: int, pattern: str | None, *, backend: str | None = None
) -> Tensor:
    """Sweep W (R, C) in place: ``count`` weights of the layer, or 2:4.

    One native call per block. What is right of the block is left to torch's matrix product.
    """
    R, C = W.shape
    group, per_group = _groups(pattern)
    removed = 0
    for begin in range(0, C, BLOCK):
        end = min(begin + BLOCK, C)
        part, u = W[:, begin:end], U[begin:end, begin:end]
        E = torch.empty(R, end - begin, device=W.device)
        if pattern:
            mask = torch.zeros(R, end - begin, dtype=torch.uint8, device=W.device)
        else:
            score = (part / u.diagonal()).to(torch.float64).square_()
            until = count * end // C
            lowest = ops.rank_lowest(score.view(1, -1), until - removed, backend=backend)
            mask, removed = lowest.view_as(score).view(torch.uint8), until
        ops.sweep_block_(part, u, mask, E, group=group, per_group=per_group, backend=backend)
        if end < C:
            W[:, end:].addmm_(E, U[begin:end, end:], alpha=-1)
    return W


def published_procedure(layer: Layer, pattern: str | None) -> Side:
    """SparseGPT from H: three factorisations in float32, and the loop."""
    H32 = layer.H.to(torch.float32)

    def prepare(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        return W.clone(), H32

    def run(W: Tensor, H: Tensor) -> Tensor:
        U = baselines.sparsegpt_factor(H, shapes.DAMPING)
        return baselines.sparsegpt_(W, U, layer.share, *_groups(pattern))

    return Side(
        "published procedure",
        run,
        prepare=prepare,
        error=lost_share(layer, threshold_surplus(layer, pattern)),
    )


def threshold_surplus(layer: Layer, pattern: str | None) -> int:
    """The published threshold takes one weight too many of every block, and all equal to it."""
    return 0 if pattern else -(-layer.shape.columns // BLOCK) * 4


def _groups(pattern: str | None) -> tuple[int, int]:
    """Group size and how many of a group go; 0 and 0 without groups."""
    return (4, 2) if pattern == "2:4" else (0, 0)


def _repaired(layer: Layer, U: Tensor) -> Callable[[Tensor], bool]:
    """Whether the first rows are what the sequential loop in float64 leaves for their masks."""
    few = slice(0, CHECKED)

    def check(pruned: Tensor) -> bool:
        expected = layer.W[few].to(torch.float64)
        removed = (pruned[few] == 0).to(torch.uint8)
        reference.sweep_block_(expected, U, removed, torch.empty_like(expected), 0, 0)
        return float((pruned[few] - expected).norm() / expected.norm()) < 1e-4

    return check


def _judged(
    name: str,
    layer: Layer,
    pattern: str | None,
    *,
    inputs: tuple[Tensor, Tensor],
    ours: Side,
    repaired: Callable[[Tensor], bool] = lambda pruned: True,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    within: float = 1.01,
    **rivals: Side,
) -> Case:
    """All sides must come within 1 % of the lower error, or what ``within`` says, and remove what
    was asked for."""
    group, per_group = _groups(pattern)

    def judge(surplus: int) -> Callable[[Tensor], float]:
        lost = lost_share(layer, surplus)

        def error(pruned: Tensor) -> float:
            in_groups = (pruned == 0).view(-1, group).sum(dim=1) if group else None
            if in_groups is not None and not bool((in_groups == per_group).all()):
                return torch.inf
            return lost(pruned) if repaired(pruned) else torch.inf

        return error

    error, rivals_error = judge(0), judge(threshold_surplus(layer, pattern))
    case = Case(
        name=name,
        inputs=inputs,
        work=float(layer.W.numel()) * layer.shape.columns,
        unit="GFLOP/s",
        error=error,
        tolerance=torch.inf,
        ours=ours,
        rivals={
            key: replace(rival, error=rivals_error, note="errors are the layer's")
            for key, rival in rivals.items()
        },
    )
    case = case if prepare is None else replace(case, prepare=prepare)
    lowest = min(case.error_of(s, case.answer(s)) for s in (ours, case.rivals["published"]))
    return replace(case, tolerance=within * lowest)
