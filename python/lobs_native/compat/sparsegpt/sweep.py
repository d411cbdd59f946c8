"""SparseGPT's procedure from a second moment to pruned weights, by the published program's rules.

They differ from those of ``method="sweep"``: a block loses ``int(numel * sparsity) + 1`` weights
and all ties of the last one, N:M groups are counted from the start of a block, and the factor of
the inverse is taken by three factorisations in float32. The last rule costs time and digits, but
masks follow from the factor's last bits: with the same H and the same factorisations they are the
published program's, which no better factor gives (on an ill-conditioned H of 2048 columns, one in
5,000 entries changes sides).
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

_SAMPLED = 1 << 14  # scores from which on a threshold is looked for by a sample
_STRIDE = 61  # of the sample: odd, so that it goes through all columns of a block

# (weights of a piece as they stand, its columns, U's diagonal there) -> bool like it, True = goes
Choose = Callable[[Tensor, slice, Tensor], Tensor]


def upper_factor(H: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Upper ``U`` (C, C) with ``U^T U`` the inverse of the damped ``H``, and which inputs are dead.

    Parameters
    ----------
    H : (C, C) float32, symmetric
        Not modified in the end: its diagonal is changed for the time of the call.
    percdamp : float
        Damping, as a share of the mean of the diagonal once dead inputs have got a one there.

    Raises
    ------
    ArgumentError
        H is zero throughout: by the published rule all weights would be set to zero.
    NotPositiveDefiniteError
        A factorisation failed; H is as it was.
    """
    diagonal = H.diagonal()
    before = diagonal.clone()
    dead = before == 0
    if bool(dead.all()):
        raise ArgumentError(
            "H: zero throughout, so the layer has seen no inputs, and by the published rule for "
            "dead inputs all its weights would become zero; call add_batch first, or leave it out"
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
    """``w^2 / U_jj^2`` (R, B) in float32, with the published program's roundings."""
    return W**2 / diagonal**2


def by_threshold(score: Tensor, sparsity: float) -> Tensor:
    """Bool like score: what is not above the entry of rank ``int(numel * sparsity)``, from 0."""
    return score <= _ranked(score.flatten(), int(score.numel() * sparsity))


def _ranked(score: Tensor, rank: int) -> Tensor:
    """The entry of a rank, from 0, as ``score.sort().values[rank]``; score (n,).

    On the host kthvalue has one thread, and looking at all scores would be a tenth of the whole
    pruning: a sample brackets the entry, and only what lies between is looked at closely.
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
    """Bool like score (R, B): the ``count`` lowest of each row."""
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
    """Sweep W (R, C) float32 from left to right in place; returns ``sum(e^2) / 2``.

    Parameters
    ----------
    U : (C, C) float32, upper
    blocksize : int
        Columns of a block: what is right of it is repaired once it is done.
    choose : callable, optional
        Which weights go, asked once for every ``step`` columns of a block, all of them by default.
    groups : (int, int)
        Without ``choose``: of every m columns the n cheapest go, (n, m). What is left over at the
        end of a block is a smaller group.
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
    """A block's ends, and where its last whole group of m columns ends."""
    return sorted({begin, end - (end - begin) % m, end})


def check_target(
    sparsity: float,
    n: int = 0,
    m: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
    names: Sequence[str] = ("prunen", "prunem", "blocksize", "percdamp"),
) -> None:
    """ArgumentError for what the host's rules cannot do; ``names``: what the host calls the
    arguments after the first."""
    n_name, m_name, size_name, damping_name = names
    if checks.count(n, n_name) > checks.count(m, m_name):
        raise ArgumentError(f"{n_name}, {m_name}: {n} of every {m} weights cannot go")
    if not n and not 0 <= checks.real(sparsity, "sparsity") < 1:
        raise ArgumentError(
            f"sparsity: {sparsity}; the host's rule needs 0 <= sparsity < 1 (a block loses "
            "int(numel * sparsity) + 1 weights)"
        )
    if checks.count(blocksize, size_name) == 0:
        raise ArgumentError(f"{size_name}: 0; it is a number of columns, 128 as published")
    if checks.real(percdamp, damping_name) < 0:
        raise ArgumentError(f"{damping_name}: {percdamp}; it must be >= 0")


def check_groups(columns: int, blocksize: int, n: int, m: int) -> None:
    """PatternError where a group that is left over at the end of a block has no n columns."""
    for width in {min(blocksize, columns), columns % blocksize}:
        if 0 < width % m < n:
            raise PatternError(
                f"prunen: {n} of {m}, but a block of {width} columns ends with a group of "
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
    """:func:`sweep_` where kept weights are quantised on the way: ``quantize`` (R, 1) -> (R, 1).

    In torch, a column at a time, as published and as slow: the kernel keeps what it does not
    remove.
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
