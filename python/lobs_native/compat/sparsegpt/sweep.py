"""SparseGPT's algorithm from a second moment to pruned weights, by the published program's rules.

They differ from those of ``method="sweep"``: a block loses ``int(numel * sparsity) + 1`` weights
and all ties of the last one, N:M groups are counted from the start of a block, and the factor of
the inverse is computed by three factorisations in float32. The last rule costs time and accuracy,
but masks depend on the factor's last bits: the same H and the same factorisations give the
published program's masks, and a more accurate factor does not (on an ill-conditioned H of 2048
columns, one in 5,000 mask entries differs).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, PatternError

__all__ = [
    "Choose",
    "by_threshold",
    "check_groups",
    "check_target",
    "lowest_in_row",
    "saliency",
    "sweep_",
    "sweep_quantized_",
    "upper_factor",
]

_SAMPLED = 1 << 14  # with at least so many scores, a threshold is found by sampling
_STRIDE = 61  # of the sample: odd, so that it reaches all columns of a block

# (current weights of a piece, its columns, U's diagonal there) -> bool of its shape, True = removed
Choose = Callable[[Tensor, slice, Tensor], Tensor]


def upper_factor(H: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Upper ``U`` (C, C) with ``U^T U`` the inverse of the damped ``H``, and the dead inputs (C,).

    Parameters
    ----------
    H : (C, C) float32, symmetric
        Its diagonal is changed during the call and restored.
    percdamp : float
        Damping, as a fraction of the mean diagonal, where dead inputs have a one.

    Raises
    ------
    ArgumentError
        H is all zeros: by the published rule, all weights would be set to zero.
    NotPositiveDefiniteError
        A factorisation failed; H is unchanged.
    """
    diagonal = H.diagonal()
    before = diagonal.clone()
    dead = before == 0
    if bool(dead.all()):
        raise ArgumentError(
            "H: all zeros, so the layer has seen no inputs; by the published rule for dead inputs "
            "all its weights would become zero; call add_batch first, or leave the layer out"
        )
    diagonal[dead] = 1.0
    diagonal.add_(percdamp * diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(H)
    diagonal.copy_(before)
    if not int(failed):
        inverse = torch.cholesky_inverse(factor)
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):
        raise NotPositiveDefiniteError(
            f"H ({len(H)} columns) could not be inverted with percdamp={percdamp:g}: pass a larger "
            "percdamp or more calibration data"
        )
    return factor, dead


def saliency(W: Tensor, diagonal: Tensor) -> Tensor:
    """``w^2 / U_jj^2`` (R, B) in float32, rounded as in the published program."""
    return W**2 / diagonal**2


def by_threshold(score: Tensor, sparsity: float) -> Tensor:
    """Bool of score's shape: entries up to the one of rank ``int(numel * sparsity)``, from 0."""
    return score <= _ranked(score.flatten(), int(score.numel() * sparsity))


def _ranked(score: Tensor, rank: int) -> Tensor:
    """``score.sort().values[rank]`` for score (n,).

    On the CPU kthvalue is single-threaded, and on all scores it would take a tenth of the pruning's
    time. A sorted sample brackets the entry, so that only the scores in between are ranked.
    """
    n = len(score)
    if score.device.type == "cpu" and n >= _SAMPLED:
        sample = score[::_STRIDE].sort().values
        middle, margin = rank * len(sample) / n, 2 * len(sample) ** 0.5
        low = sample[max(0, int(middle - margin))]
        high = sample[min(len(sample) - 1, int(middle + margin))]
        below = int((score < low).sum())
        between = score[(score >= low) & (score <= high)]
        if below <= rank < below + len(between):
            return between.kthvalue(rank - below + 1).values
    return score.kthvalue(rank + 1).values


def lowest_in_row(score: Tensor, count: int) -> Tensor:
    """Bool of score's shape (R, B): the ``count`` lowest of each row."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(1, score.topk(count, dim=1, largest=False).indices, True)


@ops.full_precision()
def sweep_(
    W: Tensor,
    U: Tensor,
    *,
    blocksize: int,
    choose: Choose | None,
    groups: tuple[int, int] = (0, 0),
    step: int | None = None,
) -> float:
    """Sweep W (R, C) float32 from left to right, in place. Returns ``sum(e^2) / 2``.

    Parameters
    ----------
    U : (C, C) float32, upper
    blocksize : int
        The number of columns in a block. The columns right of a block are repaired once it is done.
    choose : callable, optional
        Selects the weights to remove. It is called for every ``step`` columns of a block, by
        default for the whole block.
    groups : (int, int)
        (n, m), used without ``choose``: the n cheapest of every m columns are removed. The last
        group of a block may be smaller.
    """
    R, C = W.shape
    n, m = groups
    total = W.new_zeros(())
    for begin in range(0, C, blocksize):
        end = min(begin + blocksize, C)
        E = W.new_empty(R, end - begin)
        cuts = _cuts(begin, end, m) if choose is None else [*range(begin, end, step or C), end]
        for first, last in itertools.pairwise(cuts):
            piece, part, e = (
                slice(first, last),
                W[:, first:last],
                E[:, first - begin : last - begin],
            )
            u = U[piece, piece]
            if choose is not None:
                gone = choose(part, piece, u.diagonal()).to(torch.uint8)
                ops.sweep_block_(part, u, gone, e)
            else:
                gone = torch.zeros(part.shape, dtype=torch.uint8, device=W.device)
                ops.sweep_block_(part, u, gone, e, group=min(m, last - first), per_group=n)
            if last < end:
                W[:, last:end].addmm_(e, U[piece, last:end], alpha=-1)
        if end < C:
            W[:, end:].addmm_(E, U[begin:end, end:], alpha=-1)
        total += E.square_().sum()
    return float(total) / 2


def _cuts(begin: int, end: int, m: int) -> Sequence[int]:
    """The ends of a block, and the end of its last whole group of m columns."""
    return sorted({begin, end - (end - begin) % m, end})


def check_target(
    sparsity: float,
    n: int = 0,
    m: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
    names: Sequence[str] = ("prunen", "prunem", "blocksize", "percdamp"),
) -> None:
    """Raise ArgumentError for values that the host's rules exclude. ``names`` are the host's names
    of the arguments after the first."""
    n_name, m_name, size_name, damping_name = names
    if checks.count(n, n_name) > checks.count(m, m_name):
        raise ArgumentError(f"{n_name}, {m_name}: cannot remove {n} of every {m} weights")
    if not n and not 0 <= checks.real(sparsity, "sparsity") < 1:
        raise ArgumentError(
            f"sparsity: {sparsity}; the host's rule needs 0 <= sparsity < 1 (a block loses "
            "int(numel * sparsity) + 1 weights)"
        )
    if checks.count(blocksize, size_name) == 0:
        raise ArgumentError(
            f"{size_name}: 0; it must be a positive number of columns (usually 128)"
        )
    if checks.real(percdamp, damping_name) < 0:
        raise ArgumentError(f"{damping_name}: {percdamp}; it must be >= 0")


def check_groups(columns: int, blocksize: int, n: int, m: int) -> None:
    """Raise PatternError if the last group of a block would have fewer than n columns."""
    for width in {min(blocksize, columns), columns % blocksize}:
        if 0 < width % m < n:
            raise PatternError(
                f"prunen: {n} of {m}, but a block of {width} columns ends in a group of "
                f"{width % m}; choose a blocksize that is a multiple of {m}"
                + (f" (the layer has {columns} columns)" if columns % m else "")
            )


@ops.full_precision()
def sweep_quantized_(
    W: Tensor,
    U: Tensor,
    quantize: Callable[[Tensor], Tensor],
    *,
    blocksize: int,
    choose: Choose | None,
    groups: tuple[int, int] = (0, 0),
) -> float:
    """:func:`sweep_` that also quantises the kept weights: ``quantize`` (R, 1) -> (R, 1).

    It runs in torch, one column at a time, as slowly as the published program: the kernel cannot
    change kept weights.
    """
    R, C = W.shape
    n, m = groups
    total = W.new_zeros(())
    for begin in range(0, C, blocksize):
        end = min(begin + blocksize, C)
        u = U[begin:end, begin:end]
        w = W[:, begin:end].clone()
        E = W.new_empty(R, end - begin)
        gone = torch.zeros_like(w, dtype=torch.bool)
        if choose is not None:
            gone = choose(w, slice(begin, end), u.diagonal())
        for j in range(end - begin):
            if choose is None and j % m == 0:
                group = slice(j, min(j + m, end - begin))
                gone[:, group] = lowest_in_row(saliency(w[:, group], u.diagonal()[group]), n)
            left = quantize(w[:, j : j + 1].masked_fill(gone[:, j : j + 1], 0.0))
            E[:, j : j + 1] = (w[:, j : j + 1] - left) / u[j, j]
            w[:, j:].addmm_(E[:, j : j + 1], u[j : j + 1, j:], alpha=-1)
            W[:, begin + j] = left[:, 0]
        W[:, end:].addmm_(E, U[begin:end, end:], alpha=-1)
        total += E.square_().sum()
    return float(total) / 2
