"""The memory that pruning a layer exactly will take, before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lobs_native import checks, ops
from lobs_native.errors import DtypeError
from lobs_native.solvers.removals import rows_together

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that method "exact" needs besides its inputs; ``str()`` is meant for people."""

    rows: int
    columns: int
    threads: int  # that the limit allows; on a device, rows in flight
    scratch: int  # of all of them
    trace: int  # order and cost of every removal
    matrices: int  # inverse, weights and temporaries
    private_inverses: int  # of the published algorithm: one inverse per row, for 32 rows

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.scratch + self.trace + self.matrices

    def __str__(self) -> str:
        def mb(size: int) -> str:
            return f"{size / 1e6:,.0f} MB"

        return (
            f"{self.rows} x {self.columns}: {mb(self.total)} = {mb(self.scratch)} scratch for "
            f"{self.threads} rows at a time + {mb(self.trace)} trace + {mb(self.matrices)} matrices"
        )


def plan_memory(
    rows: int,
    columns: int,
    *,
    sparsity: float = 0.5,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    memory: int | None = None,
    backend: str | None = None,
) -> MemoryPlan:
    """Memory for one layer of ``rows`` x ``columns`` under method "exact" and scope "layer".

    Parameters
    ----------
    rows, columns : int
    sparsity : float in [0, 1]
    dtype : torch.dtype
        Of the weights; float64 computes in float64, all others in float32.
    bias : bool
        Whether a bias is updated.
    memory : int, optional
        The limit on scratch that will be passed to :func:`lobs_native.prune_weight`. Without one,
        a device's rows in flight take half of its free memory at most.
    backend : str, optional
        A name from ``backends()``; the CPU's by default.

    Returns
    -------
    MemoryPlan
        Sizes in bytes. ``matrices`` is the largest of inversion, tracing and repair. The result and
        the libraries' own buffers come on top: for 659 MB here (4096 x 4096, half), 769 MB were
        measured, including 84 MB of result (``python bench/speed/growth.py --memory``).

    Raises
    ------
    ArgumentError, DtypeError, BackendError
        An argument does not fit.
    MemoryError
        One thread (on a device, one row) needs more scratch than ``memory``.
    """
    R = checks.positive_int(rows, "rows")
    D = checks.positive_int(columns, "columns") + checks.flag(bias, "bias")
    share = checks.sparsity(sparsity)
    if dtype not in checks.FLOATS:
        raise DtypeError(f"dtype: {dtype}; weights are floating point")
    kernel = torch.float64 if dtype == torch.float64 else torch.float32
    size = kernel.itemsize
    threads = ops.affordable_threads(
        D, kernel, rows=min(R, rows_together(backend or "cpu")), memory=memory, backend=backend
    )
    scratch = threads * ops.exact_bytes(D, kernel, backend=backend)
    longest = min(D, round(1.5 * share * D) + 1)  # rows of a layer differ in length
    trace = R * longest * (4 + size)
    square, weights = D * D, R * D
    inverting = 8 * square + size * square  # and a copy of it for the kernels
    repairing = (8 + 2 * size) * square + 3 * size * weights + 2 * weights
    merging = 8 * square + 8 * R * longest + size * weights
    private: Any = min(R, 32) * size * square
    return MemoryPlan(
        R, D, threads, scratch, trace, max(inverting, repairing, merging), int(private)
    )
