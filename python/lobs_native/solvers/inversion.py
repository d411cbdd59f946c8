"""The damped inverse of a layer's second moment, with a record of how it was obtained.

It is computed in place of one copy of the matrix, by blocks of columns: a matrix of 25,000 columns
takes 5 GB in float64. Torch's Cholesky factorisation and solve hold three more. They also take
about twice the time (``bench/speed/paired.py --only inversion``): here nearly all of it goes into
matrix products, none of them with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.ops import one_thread

__all__ = [
    "LADDER",
    "Inverse",
    "climb",
    "invert",
    "invert_",
    "power_of_two",
    "upper_factor",
]

LADDER = (1.0, 10.0, 100.0)  # factors on the requested damping, tried in turn
_NORM_STEPS = 4  # of the power method
_BLOCK = 256  # columns; 128 and 512 are slower from 1,000 columns on
_PANEL = 128  # columns that invert_ eliminates at once, and the side of its smallest products


class Inverse:
    """``A = (H + damping * mean(diag H) * I)^-1`` up to a power of two, and how it was obtained.

    Attributes
    ----------
    scale : float
        A power of two near mean(diag H); A / scale is the inverse of the damped H.
    damping : float
        The fraction that was used.
    raised : bool
        Whether that is more than was requested.
    """

    def __init__(
        self,
        U: Tensor | None,
        H: Tensor,
        shift: float,
        scale: float,
        damping: float,
        *,
        raised: bool,
    ) -> None:
        self.scale = scale
        self.damping = damping
        self.raised = raised
        self._U = U  # None: to be computed
        self._A: Tensor | None = None
        self._lent = False  # whether a caller may hold U
        self._H, self._shift = H, shift  # from which a released U is computed again
        self._norm = 0.0  # once released

    def release(self) -> None:
        """Free U and A, two matrices of H's size, for as long as nothing but :meth:`norm` is asked
        for: H is factored again for anything else."""
        if self._U is not None or self._A is not None:
            self._norm = self.norm()
            self._U = self._A = None

    def _again(self) -> None:
        """Compute U, if it was released or never there."""
        if self._U is None and self._A is None:
            self._U, self._lent = _upper(self._H, self.scale, self._shift), False

    @property
    def U(self) -> Tensor:
        """(C, C) float64, upper, U^T U = A."""
        self._again()
        if self._U is None:
            assert self._A is not None
            L = self._A.clone()
            _factor_(L)
            self._U = L.tril_().T.contiguous()
        self._lent = True
        return self._U

    def factor(self) -> Tensor:
        """(C, C), upper, the inverse of U: ``G G^T = H / scale``, damped. Computed from H."""
        G = upper_factor(self._H, self.scale, self._shift, self._H.dtype)
        assert G is not None  # as U was found
        return G

    def times(self, b: Tensor) -> Tensor:
        """A @ b for b (C, N) float64, by U as long as A has not been computed."""
        self._again()
        if self._U is not None:
            return self._U.T @ (self._U @ b)
        return self.A @ b

    def diagonal(self) -> Tensor:
        """(C,) float64: the diagonal of A, from U as long as A has not been computed."""
        self._again()
        if self._U is None:
            return self.A.diagonal()
        # By blocks of rows, so that no temporary has the size of U.
        total = torch.zeros_like(self._U[0])
        for rows in _blocks(self._U):
            total[rows.start :] += self._U[rows, rows.start :].square().sum(0)
        return total

    def norm(self) -> float:
        """The spectral norm of A by the power method, from below, low by a third at most in tests:
        two products of U and a vector a step, or one of A where that has replaced it."""
        U, A = self._U, self._A
        matrix = A if U is None else U
        if matrix is None:
            return self._norm
        # Any start that favours no column will do; a sine needs no random numbers.
        v = torch.arange(1.0, len(matrix) + 1, dtype=torch.float64, device=matrix.device).sin_()
        norm = v.norm()
        for _ in range(_NORM_STEPS):
            v = v / norm
            v = matrix @ v if U is None else U.T @ (U @ v)
            norm = v.norm()
        return float(norm)

    @property
    def A(self) -> Tensor:
        """(C, C) float64, exactly symmetric: the inverse of H / scale. It replaces U (both are
        large), which is recomputed if it is needed again."""
        if self._A is None:
            self._again()
            assert self._U is not None
            A = self._U.clone() if self._lent else self._U
            self._U = None
            _square_(A)
            self._A = A
        return self._A


def power_of_two(mean: float) -> float:
    """The scale of a second moment with this mean diagonal."""
    return math.ldexp(1.0, math.frexp(mean)[1])


def invert(H: Tensor, damping: float, what: str) -> Inverse:
    """Invert a second moment (C, C) float64 with damping; where Cholesky fails, with 10 and then
    100 times as much. H is not modified. Besides it there is one matrix of its size at any time.

    ``what`` names the matrix in the error that is raised when the ladder ends. A power of two is
    taken out of H first, so that nothing over- or underflows and the result scales exactly with H.
    Where H is zero throughout, A = I.
    """
    if not bool(H.diagonal().any()):
        U = torch.eye(len(H), dtype=H.dtype, device=H.device)
        return Inverse(U, H, 1.0, 1.0, damping, raised=False)
    step = climb(H, damping, what, lambda scale, shift: _upper(H, scale, shift))
    return Inverse(step.found, H, step.shift, step.scale, step.damping, raised=step.raised)


class Step(NamedTuple):
    """What was found with which damping."""

    found: Tensor
    shift: float  # what damping adds to the diagonal of H / scale
    scale: float
    damping: float
    raised: bool


def climb(
    H: Tensor, damping: float, what: str, attempt: Callable[[float, float], Tensor | None]
) -> Step:
    """The first of ``attempt(scale, shift)`` that is not None, with rising damping; see
    :func:`invert`."""
    mean = float(H.diagonal().mean())
    scale = power_of_two(mean)
    mean /= scale
    for factor in LADDER:
        used = damping * factor
        found = attempt(scale, used * mean)
        if found is not None:
            return Step(found, used * mean, scale, used, factor > 1)
        if damping == 0:
            break
    tried = "0" if damping == 0 else ", ".join(f"{damping * factor:g}" for factor in LADDER)
    raise NotPositiveDefiniteError(
        f"{what}: the second moment ({len(H)} columns) is not positive definite with damping "
        f"{tried}; "
        f"pass a larger damping (0.01 is usual) or more calibration rows"
    )


def _upper(H: Tensor, scale: float, shift: float) -> Tensor | None:
    """(C, C) upper U with ``U^T U = (H / scale + shift * I)^-1``; None if that is not positive
    definite."""
    # Turned around, L^-1 is the upper factor of the inverse: one factorisation for both.
    U = _turned(H, scale, shift, H.dtype)
    if not _factor_(U):
        return None
    _invert_lower_(U)
    return _turned_back(U)


def upper_factor(H: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor | None:
    """(C, C) upper G with ``G G^T = H / scale + shift * I``, in ``dtype``; None if that is not
    positive definite. It is the inverse of U, at half of its cost."""
    G = _turned(H, scale, shift, dtype)
    return _turned_back(G) if _factor_(G) else None


def _turned(H: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    """H / scale + shift * I in ``dtype``, rows and columns in reversed order."""
    M = torch.empty_like(H, dtype=dtype)
    for rows in _blocks(H):
        M[len(H) - rows.stop : len(H) - rows.start] = H[rows].flip(0, 1).div_(scale)
    M.diagonal().add_(shift)
    return M


def _turned_back(L: Tensor) -> Tensor | None:
    """The lower triangle of L in reversed order, in place; None if something in it is not finite,
    or not positive on the diagonal."""
    L.tril_()
    _turn_(L)
    return L if _is_finite(L) and bool((L.diagonal() > 0).all()) else None


def invert_(M: Tensor) -> bool:
    """Replace a symmetric positive definite M (n, n), of which the lower triangle is read, by its
    inverse.

    False if a pivot is not positive (or NaN): M is then undefined. Both triangles are written.

    Blocks of columns are swept out of the matrix one after another, each by one update of the lower
    triangle: n^3 flops as for Cholesky, but nearly all of them in large products, and no temporary
    besides two blocks of columns. On an AVX2 core that takes 0.7 to 0.8 of the time of
    ``torch.cholesky_inverse(torch.linalg.cholesky(M))`` (``bench/speed/paired.py --only
    inversion``). Source: the sweep operator, Goodnight 1979.
    """
    n = len(M)
    for first in range(0, n, _PANEL):
        K = slice(first, min(first + _PANEL, n))
        panel = torch.cat([M[K, :first].T, torch.zeros_like(M[K, K]), M[K.stop :, K]])
        with one_thread():
            L, info = torch.linalg.cholesky_ex(M[K, K])
            if int(info) or not bool(L.diagonal().isfinite().all()):
                return False
            D = torch.cholesky_inverse(L)
        solved = panel @ D
        _update_lower_(M, solved, panel, slice(0, n))
        M[K, :first] = solved[:first].T
        M[K.stop :, K] = solved[K.stop :]
        M[K, K] = D.neg_()
    for rows in _blocks(M):
        M[rows, : rows.stop].neg_()
        square = M[rows, rows].tril()
        M[rows, rows] = square + square.tril(-1).T
    for rows in _blocks(M):
        M[rows, rows.stop :] = M[rows.stop :, rows].T
    return True


def _update_lower_(M: Tensor, left: Tensor, right: Tensor, part: slice) -> None:
    """Subtract ``left @ right.T`` from the lower triangle of M within ``part`` (and from a little
    above it): by halves, so that the products are large and few of them are wasted."""
    size = part.stop - part.start
    if size <= _PANEL:
        M[part, part].addmm_(left[part], right[part].T, alpha=-1)
        return
    middle = part.start + (size // 2 + 63) // 64 * 64
    top, bottom = slice(part.start, middle), slice(middle, part.stop)
    _update_lower_(M, left, right, top)
    _update_lower_(M, left, right, bottom)
    M[bottom, top].addmm_(left[bottom], right[top].T, alpha=-1)


def _blocks(M: Tensor) -> list[slice]:
    """The columns of a square matrix, in blocks."""
    n = len(M)
    return [slice(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)]


def _factor_(M: Tensor) -> bool:
    """Put Cholesky's L into the lower triangle of M. Nothing else of M is read. False if M is not
    positive definite (or holds NaN)."""
    failed = torch.zeros((), dtype=torch.int32, device=M.device)  # read once: on a GPU it waits
    for d in _blocks(M):
        below = M[d.stop :, d]
        with one_thread():
            L, info = torch.linalg.cholesky_ex(M[d, d])
            if len(below):
                unit = torch.eye(len(L), dtype=M.dtype, device=M.device)
                D = torch.linalg.solve_triangular(L, unit, upper=False)
        if len(below):
            below.copy_(below @ D.T)
        failed += info.ne(0)
        M[d, d] = L
        if len(below):
            for later in _blocks(M)[d.stop // _BLOCK :]:
                M[later.start :, later].addmm_(M[later.start :, d], M[later, d].T, alpha=-1)
    return int(failed) == 0


def _invert_lower_(L: Tensor) -> None:
    """Replace a lower triangle by its inverse, the last columns first. Entries above the blocks of
    the diagonal stay."""
    blocks = _blocks(L)
    for j, J in reversed(list(enumerate(blocks))):
        unit = torch.eye(J.stop - J.start, dtype=L.dtype, device=L.device)
        with one_thread():
            D = torch.linalg.solve_triangular(L[J, J].tril(), unit, upper=False)
        L[J, J] = D
        below = L[J.stop :, J] @ D
        for later in reversed(blocks[j + 1 :]):  # from below: those above are still needed
            between = slice(J.stop, later.stop)
            L[later, J] = (L[later, between] @ below[: later.stop - J.stop]).neg_()


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
    """Whether all entries are finite; without temporaries of M's size."""
    return all(checks.is_finite(M[rows]) for rows in _blocks(M))
