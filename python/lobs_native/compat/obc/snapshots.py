"""The weights after every removal of a trace, computed on access.

Together they are rows x removals x columns numbers: 256 GB for a layer of 4096 x 4096.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.solvers.removals import Removals

__all__ = ["Snapshots"]

_BYTES = 256 << 20  # of factors and differences that are computed together


class Snapshots(Sequence[Tensor]):
    """A sequence of (K + 1, n, C) float32 tensors on the CPU, each for n rows, the last for fewer.

    Entry [k, i] of a tensor is row i after k removals (of weights or blocks); [0] is the original
    row. The tensor computed last is cached. Do not write to the tensors.

    Parameters
    ----------
    removals : Removals
        Traced to the end.
    parallel : int
        n.
    columns : (C,) int64, optional
        The order of columns: column c of a tensor is column columns[c] of the trace.
    """

    def __init__(self, removals: Removals, parallel: int, columns: Tensor | None = None) -> None:
        self._removals = removals
        self._parallel = parallel
        self._columns = None if columns is None else columns.cpu()
        self.unit = removals.pattern.unit
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return -(-len(self._removals.count) // self._parallel)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """One tensor, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._last is None or self._last[0] != number:
            self._last = None  # release it before computing the next one
            self._last = (number, self._computed(number))
        return self._last[1]

    def _computed(self, number: int) -> Tensor:
        problem = self._removals.problem
        _, R, C = problem.before.shape
        rows = torch.arange(len(self._removals.count))
        rows = rows[number * self._parallel : (number + 1) * self._parallel]
        out = torch.empty(C // self.unit + 1, len(rows), C)
        at_once = max(1, _BYTES // (24 * C * C))
        for g in (rows // R).unique().tolist():
            of_group = (rows // R == g).nonzero()[:, 0]
            for some in of_group.split(at_once):
                out[:, some] = self._levels(g, rows[some]).to(torch.float32).cpu()
        return out if self._columns is None else out[:, :, self._columns]

    def _levels(self, g: int, rows: Tensor) -> Tensor:
        """(K + 1, n, C) float64, for rows (n,) of group g.

        With the columns in their order of removal, let A = L L^T and c = L^-1 w. The k-th removal
        subtracts c_k L[:, k] from a row, and leaves zeros up to k.
        """
        problem = self._removals.problem
        A = problem.inverses[g].A
        C = len(A)
        order = self._removals.order[rows].long().to(A.device)  # (n, C)
        w = problem.before[g][(rows % problem.before.shape[1]).to(A.device)].to(A.dtype)
        factor, info = torch.linalg.cholesky_ex(A[order[:, :, None], order[:, None, :]])
        if bool(info.any()):
            raise NotPositiveDefiniteError(
                "Traces: rounding in float64 left no positive pivot; raise rel_damp"
            )
        ordered = w.gather(1, order)[:, :, None]
        steps = factor.mul_(
            torch.linalg.solve_triangular(factor, ordered, upper=False).mT
        )  # (n, C, C): [i, p, k] is subtracted from column p at removal k
        left = ordered - steps.cumsum_(2)
        left = left[:, :, self.unit - 1 :: self.unit]
        count = torch.arange(1, left.shape[2] + 1, device=A.device) * self.unit
        left.masked_fill_(torch.arange(C, device=A.device)[:, None] < count, 0.0)
        levels = torch.cat([ordered, left], 2).permute(2, 0, 1)  # (K + 1, n, C), order of removal
        return torch.empty_like(levels).scatter_(2, order.expand_as(levels), levels)
