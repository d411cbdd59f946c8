"""Whole jobs of other programs, from inputs to pruned weights: as published, in torch, and ours.

SparseGPT prunes one layer from its inputs. OBC prunes one layer to several sparsities. oBERT makes
one step of its block Fisher pruner. The published methods are those of ``baselines``; ours use the
package's public functions only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import lobs_native as lobs
from speed import shapes
from speed.baselines import exact, hessian, inverse, solve, sweep
from speed.case import Case, Side, relative_error

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities that one OBC run is asked for
SEQUENCES, LENGTH = 16, 512  # of the calibration text
FISHER_SHARE = 0.5  # of the weights, in one step of the block Fisher pruner

# ---- SparseGPT: one layer ------------------------------------------------------------------------


def sparsegpt_inputs(
    shape: shapes.LayerShape, *, small: bool = False
) -> tuple[Tensor, Tensor, float]:
    """X (sequences, length, C), W (R, C) and the share to remove."""
    sequences, length = (4, 64) if small else (SEQUENCES, LENGTH)
    X = shapes.relu_features(sequences * length, shape.columns)
    return X.view(sequences, length, -1), shapes.weights(shape), 0.5


def sparsegpt_published(X: Tensor, W: Tensor, share: float) -> Tensor:
    """A running mean sequence by sequence, three factorisations, the loop over columns."""
    H = torch.zeros(W.shape[1], W.shape[1])
    for i, x in enumerate(X):
        # The program counts sequences: its mean is a sum over tokens divided by their number.
        hessian.gram_running_mean_(H, i * len(x), x)
    return sweep.sparsegpt_(W.clone(), sweep.sparsegpt_factor(H, shapes.DAMPING), share)


def sparsegpt_torch(X: Tensor, W: Tensor, share: float) -> Tensor:
    """The lower block triangle of H in pieces of many rows, the sweep on transposed blocks."""
    H = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    hessian.gram_block_triangle_(H, X.flatten(0, 1))
    H = (H.tril() + H.tril(-1).T).div_(X.shape[0] * X.shape[1]).float()
    U = sweep.sparsegpt_factor(H, shapes.DAMPING)
    return sweep.sweep_transposed_(W.clone(), U, share)


def sparsegpt_ours(X: Tensor, W: Tensor, share: float, *, backend: str | None = None) -> Tensor:
    """Hessian and prune_weight, which also measures the error in float64."""
    h = lobs.Hessian(W.shape[1], device=W.device)
    for x in X:
        h.update(x)
    return lobs.prune_weight(
        W, h, sparsity=share, method="sweep", damping=shapes.DAMPING, backend=backend
    ).weight


def mean_moment(X: Tensor) -> Tensor:
    """H (C, C) float64 of X (..., C)."""
    x = X.reshape(-1, X.shape[-1]).to(torch.float64)
    return x.T @ x / len(x)


# ---- OBC: one layer, several sparsities ----------------------------------------------------------


def obc_inputs(shape: shapes.LayerShape) -> tuple[Tensor, Tensor, Sequence[float]]:
    """X (N, C), W (R, C) and the sparsities."""
    return shapes.relu_features(4 * shape.columns, shape.columns), shapes.weights(shape), LEVELS


def _obc_inverse(X: Tensor) -> Tensor:
    """The damped inverse in float32, from a sum in float64."""
    return shapes.inverse(mean_moment(X)).to(torch.float32)


def _counts(loss: Tensor, share: float) -> Tensor:
    """How many removals each row makes if the layer's cheapest are made, (R,)."""
    count = round(share * loss.numel())
    chosen = loss.flatten().argsort(stable=True)[:count]
    return torch.bincount(chosen // loss.shape[1], minlength=len(loss))


def obc_published(X: Tensor, W: Tensor, levels: Sequence[float], parallel: int = 32) -> Tensor:
    """Every row to the end with an inverse of its own; the weights after every removal are kept.

    Then one sort of all costs, and each row as it was after its share of them. (levels, R, C).
    """
    A = _obc_inverse(X)
    batches = []
    for w in W.split(parallel):
        batches.append(exact.PublishedRows(w, A))
        batches[-1].remove(W.shape[1])
    loss = torch.cat([rows.loss for rows in batches])
    kept = torch.cat([rows.history for rows in batches if rows.history is not None], dim=1)
    every = torch.arange(len(W))
    return torch.stack([kept[_counts(loss, share), every] for share in levels])


def obc_torch(X: Tensor, W: Tensor, levels: Sequence[float]) -> Tensor:
    """Rows in panels, orders and costs only; then the weights of each level, row by row."""
    A = _obc_inverse(X)
    C = W.shape[1]
    trace = exact.exact_torch(W, A, C)
    rank = torch.empty_like(trace.order).scatter_(1, trace.order, torch.arange(C).expand_as(W))
    results = []
    for share in levels:
        removed = rank < _counts(trace.loss, share)[:, None]
        x = solve.solve_together(torch.where(removed, W, 0), A, removed)
        results.append(torch.addmm(W, x, A, alpha=-1).masked_fill_(removed, 0))
    return torch.stack(results)


def obc_ours(
    X: Tensor, W: Tensor, levels: Sequence[float], *, backend: str | None = None
) -> Tensor:
    """Hessian and trace_weight, which also measures every level's error in float64."""
    h = lobs.Hessian(W.shape[1], device=W.device).update(X)
    trace = lobs.trace_weight(W, h, damping=shapes.DAMPING, backend=backend)
    return torch.stack([trace.at(share).weight for share in levels])


def lost_shares(W: Tensor, H: Tensor, levels: Sequence[float]) -> Callable[[Tensor], float]:
    """Mean over the levels of the share of the output that is lost; infinite for a wrong count."""
    energy = shapes.cost(W, torch.zeros_like(W), H)

    def error(pruned: Tensor) -> float:
        for w, share in zip(pruned, levels, strict=True):
            if int((w == 0).sum()) != round(share * W.numel()):
                return float("inf")
        return sum(shapes.cost(W, w, H) for w in pruned) / energy / len(levels)

    return error


# ---- oBERT: one step of the block Fisher pruner --------------------------------------------------


def fisher_inputs(shape: shapes.LayerShape, B: int) -> tuple[Tensor, Tensor, int]:
    """Gradients (r, d), weights (d,) and the block size; d is cut to whole blocks."""
    d = shape.rows * shape.columns // B * B
    return shapes.gradients(shapes.FISHER_GRADIENTS, d), shapes.weights(shape).flatten()[:d], B


def _fisher_start(G: Tensor, B: int) -> Tensor:
    F = torch.zeros(G.shape[1] // B, B, B, dtype=G.dtype)
    F.diagonal(dim1=1, dim2=2).fill_(shapes.FISHER_ALPHA)
    return F


def fisher_step(F: Tensor, w: Tensor) -> Tensor:
    """Remove the cheapest weights by w^2 / F_qq, each compensated as if it were removed alone."""
    diag = F.diagonal(dim1=1, dim2=2).reshape(-1)
    score = w * w / diag
    removed = score <= score.kthvalue(round(FISHER_SHARE * len(w))).values
    pull = torch.where(removed, w / diag, 0).view(len(F), -1, 1)
    return (w - torch.bmm(F, pull).view(-1)).masked_fill_(removed, 0)


def fisher_published(G: Tensor, w: Tensor, B: int) -> Tensor:
    """Every gradient streams all blocks through memory three times."""
    return fisher_step(inverse.inverse_update_one_by_one_(_fisher_start(G, B), G, float(len(G))), w)


def fisher_torch(G: Tensor, w: Tensor, B: int) -> Tensor:
    """Sixteen gradients at a time, in groups of blocks that fit into the cache."""
    return fisher_step(inverse.inverse_update_together_(_fisher_start(G, B), G, float(len(G))), w)


def fisher_ours(G: Tensor, w: Tensor, B: int, *, backend: str | None = None) -> Tensor:
    """StreamingInverse; the step itself is torch's on all sides."""
    s = lobs.StreamingInverse(
        G.shape[1],
        rows=len(G),
        alpha=shapes.FISHER_ALPHA,
        blocks=G.shape[1] // B,
        dtype=torch.float32,
        device=G.device,
    )
    return fisher_step(s.update(G).inverse(), w)


# ---- cases ---------------------------------------------------------------------------------------


def sparsegpt_cases(quick: bool) -> Iterator[Case]:
    """One layer for ``paired.py``."""
    yield sparsegpt_case(shapes.named("bert-base.fc1", small=quick), small=quick)


def sparsegpt_case(shape: shapes.LayerShape, *, small: bool) -> Case:
    """Half of a layer. All sides must come within 1 % of the lower of the two errors."""
    X, W, share = sparsegpt_inputs(shape, small=small)
    H = mean_moment(X)
    energy = shapes.cost(W, torch.zeros_like(W), H)
    surplus = -(-shape.columns // 128) * 4  # the published threshold takes a few more

    def error(pruned: Tensor) -> float:
        if not 0 <= int((pruned == 0).sum()) - share * W.numel() <= surplus:
            return torch.inf
        return shapes.cost(W, pruned, H) / energy

    note = "errors are the layer's"
    return Case(
        name=f"SparseGPT layer, {shape} {tuple(W.shape)}, {X.shape[0]} x {X.shape[1]} tokens, 50%",
        inputs=(X, W, share),
        work=float(X.numel()) * shape.columns + float(W.numel()) * shape.columns,
        unit="GFLOP/s",
        error=error,
        tolerance=1.01 * min(error(f(X, W, share)) for f in (sparsegpt_published, sparsegpt_ours)),
        ours=Side("lobs", sparsegpt_ours),
        rivals={
            "published": Side("published", sparsegpt_published, note=note),
            "torch": Side("torch", sparsegpt_torch, note=note),
        },
        most_pairs=9,
    )


def obc_cases(quick: bool) -> Iterator[Case]:
    """One layer for ``paired.py``."""
    yield obc_case(shapes.named("resnet50.layer1.conv2", small=quick))


def obc_case(shape: shapes.LayerShape) -> Case:
    """Five sparsities, exactly. All sides must lose no more than the published choice, within 1 %.

    The time of the published job, without its choice of the levels, is extrapolated from some
    removals of one batch of rows.
    """
    X, W, levels = obc_inputs(shape)
    R, C = W.shape
    error = lost_shares(W, mean_moment(X), levels)
    sample, batch = min(24, C // 2), W[:32]

    def sampled() -> float:
        begun = time.perf_counter()
        A = _obc_inverse(X)
        inverted = time.perf_counter()
        rows = exact.PublishedRows(batch, A)
        ready = time.perf_counter()
        rows.remove(sample)
        each = (time.perf_counter() - ready) / sample
        return inverted - begun + (ready - inverted + each * C) * (R / len(batch))

    return Case(
        name=f"OBC layer, {shape} {tuple(W.shape)}, {len(levels)} sparsities from one run",
        inputs=(X, W, levels),
        work=2.0 * R * (C**3 / 2 - C**3 / 3),
        unit="GFLOP/s",
        error=error,
        tolerance=1.01 * error(obc_torch(X, W, levels)),  # which chooses as published
        ours=Side("lobs", obc_ours),
        rivals={
            "published": Side(
                "published",
                obc_published,
                seconds=sampled,
                note=f"extrapolated from {sample} of {C} removals; errors are the layer's",
            ),
            "torch": Side("torch", obc_torch, note="errors are the layer's"),
        },
        most_pairs=7,
    )


def fisher_cases(quick: bool) -> Iterator[Case]:
    """Both published block sizes for ``paired.py``."""
    for B in shapes.FISHER_BLOCKS:
        yield fisher_case(shapes.named("bert-base.attention", small=quick), B)


def fisher_case(shape: shapes.LayerShape, B: int) -> Case:
    """Half of the weights. All sides must leave the weights that float64 leaves."""
    G, w, _ = fisher_inputs(shape, B)
    return Case(
        name=f"block Fisher step, {shape}, {len(w):,} weights, B={B}, {len(G)} gradients",
        inputs=(G, w, B),
        work=len(w) / B * (len(G) / 16) * (4 * 16 * B**2 + 3 * 16**2 * B),
        unit="GFLOP/s",
        error=relative_error(fisher_torch(G.double(), w.double(), B)),
        tolerance=1e-2,  # a weight at the threshold may fall on either side
        ours=Side("lobs", fisher_ours),
        rivals={
            "published": Side("published", fisher_published),
            "torch": Side("torch", fisher_torch),
        },
        most_pairs=5,
    )
