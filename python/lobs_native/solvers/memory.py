"""The memory that pruning a layer will take, before it is started."""

from __future__ import annotations

import torch

from lobs_native import checks, ops
from lobs_native.errors import DtypeError
from lobs_native.solvers.extent import Extent, MemoryPlan
from lobs_native.solvers.methods import TABLE

__all__ = ["MemoryPlan", "plan_memory"]


def plan_memory(
    rows: int,
    columns: int,
    *,
    sparsity: float = 0.5,
    method: str = "exact",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    memory: int | None = None,
    backend: str | None = None,
) -> MemoryPlan:
    """Memory for one layer of ``rows`` x ``columns`` under scope "layer".

    Parameters
    ----------
    rows, columns : int
    sparsity : float in [0, 1]
    method : str
        As for :func:`lobs_native.prune_weight`.
    dtype : torch.dtype
        Of the weights; float64 computes in float64, all others in float32.
    bias : bool
        Whether a bias is updated.
    memory : int, optional
        The limit on scratch that will be passed to :func:`lobs_native.prune_weight`. Without one,
        a device's rows in flight take half of its free memory at most. Only "exact" has scratch.
    backend : str, optional
        A name from ``backends()``; the CPU's by default.

    Returns
    -------
    MemoryPlan
        Sizes in bytes. ``matrices`` is the largest of inversion, choice and repair. The result and
        the libraries' own buffers come on top: for 659 MB here (4096 x 4096, half, "exact"), 769 MB
        were measured, including 84 MB of result (``python bench/speed/growth.py --memory``).

    Raises
    ------
    ArgumentError, DtypeError, BackendError
        An argument does not fit.
    MemoryError
        One thread (on a device, one row) needs more scratch than ``memory``.
    """
    R, C = checks.positive_int(rows, "rows"), checks.positive_int(columns, "columns")
    bias = checks.flag(bias, "bias")
    share = checks.sparsity(sparsity)
    chosen = TABLE[checks.check_choice(method, "method", tuple(TABLE))]
    if dtype not in checks.FLOATS:
        raise DtypeError(f"dtype: {dtype}; weights are floating point")
    ops.select_backend(backend, torch.device("cuda" if backend == "cuda" else "cpu"))
    if memory is not None:
        memory = checks.positive_int(memory, "memory")
    return chosen.memory(Extent(1, R, C + bias, share, dtype), limit=memory, backend=backend)
