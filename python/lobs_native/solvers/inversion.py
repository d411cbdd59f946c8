"""Inverting a layer's second moment, with a record of how.

Everything is made in the place of one copy of it, by blocks of columns: a matrix of 25,000 columns
takes 5 GB in float64. Against torch's Cholesky factorisation and solve, which hold three more, it
also takes about half of the time (``bench/speed/paired.py --only inversion``), since nearly all of
it is in matrix products and none of them is of zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lobs_native.errors import NotPositiveDefiniteError

__all__ = ["LADDER", "Inverse", "invert"]

LADDER = (1.0, 10.0, 100.0)  # factors on the damping that was asked for, tried in turn
_BLOCK = 256  # columns; 128 and 512 are slower from 1,000 columns on


class Inverse:
    """``A = (H + damping * mean(diag H) * I)^-1`` up to a power of two, and how it was obtained.

    Attributes
    ----------
    scale : float
        A power of two near mean(diag H); A / scale is the inverse of the damped H.
    damping : float
        The fraction that was used.
    raised : bool
        True if that is more than was asked for.
    """

    def __init__(self, U: Tensor, scale: float, damping: float, *, raised: bool) -> None:
        self.scale = scale
        self.damping = damping
        self.raised = raised
        self._U: Tensor | None = U
        self._A: Tensor | None = None
        self._lent = False  # whether somebody else may hold U

    @property
    def U(self) -> Tensor:
        """(C, C) float64, upper, U^T U = A."""
        if self._U is None:
            assert self._A is not None
            self._U = torch.linalg.cholesky(self._A, upper=True)
        self._lent = True
        return self._U

    def times(self, b: Tensor) -> Tensor:
        """A @ b for b (C, N) float64, by U where that is all there is."""
        if self._U is not None:
            return self._U.T @ (self._U @ b)
        return self.A @ b

    def norm(self, steps: int = 4) -> float:
        """The spectral norm of A by the power method, from below, low by a third at most in tests:
        two products of U and a vector a step, or one of A where that has replaced it."""
        U, A = self._U, self._A
        matrix = A if U is None else U
        assert matrix is not None
        # Any start will do that favours no column; a sine needs no random numbers.
        v = torch.arange(1.0, len(matrix) + 1, dtype=torch.float64, device=matrix.device).sin_()
        norm = v.norm()
        for _ in range(steps):
            v = v / norm
            v = matrix @ v if U is None else U.T @ (U @ v)
            norm = v.norm()
        return float(norm)

    @property
    def A(self) -> Tensor:
        """(C, C) float64, exactly symmetric: the inverse of H / scale. It takes the place of U
        (they are large), which is computed anew should it be asked for again."""
        if self._A is None:
            assert self._U is not None
            A = self._U.clone() if self._lent else self._U
            self._U = None
            _square_(A)
            self._A = A
        return self._A


def invert(H: Tensor, damping: float, what: str) -> Inverse:
    """Invert a (C, C) float64 second moment, climbing the ladder damping, 10 x, 100 x where
    Cholesky fails. H is not modified; besides it there is one matrix of its size at any time.

    ``what`` names the matrix in the error that is raised when the ladder ends. A power of two is
    taken out of H first, so that nothing over- or underflows and the result scales exactly with H.
    Where H is zero throughout, A = I.
    """
    mean = float(H.diagonal().mean())
    if mean == 0:
        return Inverse(
            torch.eye(len(H), dtype=H.dtype, device=H.device), 1.0, damping, raised=False
        )
    scale = math.ldexp(1.0, math.frexp(mean)[1])
    mean /= scale
    for factor in LADDER:
        used = damping * factor
        # Turned around, L^-1 is the upper factor of the inverse: one factorisation for both.
        U = H.flip(0, 1).div_(scale)
        U.diagonal().add_(used * mean)
        if _factor_(U):
            _invert_lower_(U)
            U.tril_()
            _turn_(U)
            if _is_finite(U) and bool((U.diagonal() > 0).all()):
                return Inverse(U, scale, used, raised=factor > 1)
        del U
        if damping == 0:
            break
    tried = "0" if damping == 0 else ", ".join(f"{damping * factor:g}" for factor in LADDER)
    raise NotPositiveDefiniteError(
        f"{what}: the second moment ({len(H)} columns) is not positive definite with damping "
        f"{tried}; "
        f"pass a larger damping (0.01 is usual) or more calibration rows"
    )


def _blocks(M: Tensor) -> list[slice]:
    """The columns of a square matrix, in blocks."""
    n = len(M)
    return [slice(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)]


def _factor_(M: Tensor) -> bool:
    """Put Cholesky's L into the lower triangle of M, of which only that is read; False if M is not
    positive definite (or holds NaN)."""
    failed = torch.zeros((), dtype=torch.int32, device=M.device)  # read once: on a GPU it waits
    for d in _blocks(M):
        L, info = torch.linalg.cholesky_ex(M[d, d])
        failed += info.ne(0)
        M[d, d] = L
        below = M[d.stop :, d]
        if len(below):
            below.copy_(torch.linalg.solve_triangular(L.T, below, upper=True, left=False))
            for later in _blocks(M)[d.stop // _BLOCK :]:
                M[later.start :, later].addmm_(M[later.start :, d], M[later, d].T, alpha=-1)
    return int(failed) == 0


def _invert_lower_(L: Tensor) -> None:
    """Replace a lower triangle by its inverse's, the last columns first; what is above the blocks
    of the diagonal stays."""
    blocks = _blocks(L)
    for j, J in reversed(list(enumerate(blocks))):
        unit = torch.eye(J.stop - J.start, dtype=L.dtype, device=L.device)
        D = torch.linalg.solve_triangular(L[J, J].tril(), unit, upper=False)
        L[J, J] = D
        for later in reversed(blocks[j + 1 :]):  # from below: those above are still to be read
            between = slice(J.stop, later.stop)
            L[later, J] = (L[later, between] @ (L[between, J] @ D)).neg_()


def _square_(U: Tensor) -> None:
    """Replace an upper triangle U by U^T U, both triangles, the last rows first."""
    for rows in reversed(_blocks(U)):
        top = slice(None, rows.stop)
        U[rows, rows.start :] = U[top, rows].T @ U[top, rows.start :]
        square = U[rows, rows].triu()
        U[rows, rows] = square + square.triu(1).T
    for rows in _blocks(U):
        U[rows.stop :, rows] = U[rows, rows.stop :].T


def _turn_(M: Tensor) -> None:
    """Reverse the order of rows and of columns."""
    n = len(M)
    for first in range(0, n // 2, _BLOCK):
        last = min(first + _BLOCK, n // 2)
        top, bottom = slice(first, last), slice(n - last, n - first)
        kept = M[top].flip(0, 1)
        M[top] = M[bottom].flip(0, 1)
        M[bottom] = kept
    if n % 2:
        M[n // 2] = M[n // 2].flip(0)


def _is_finite(M: Tensor) -> bool:
    """Without temporaries of M's size."""
    return all(bool(torch.isfinite(M[rows]).all()) for rows in _blocks(M))
