"""Rates of this machine, and estimates for layers that are too large for it.

Operations are counted as in the kernels' contracts: ``N C^2`` for a second moment of N rows (half a
product, because it is symmetric), ``2 C^3`` for an inverse, ``2 R k C`` for the paper's order, and
``R (C k^2 - 2/3 k^3)`` for exact removal of k = C * sparsity weights in each of R rows. Seconds are
core seconds: those of all threads together, which other programs on the machine hardly change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.solvers.hessian import Hessian
from lobs_native.solvers.inversion import invert

__all__ = ["Rates", "WideLayer", "Work", "measured_rates", "removed_in_order", "wide_layer"]

_ROWS = 64  # of a layer that is too large, on which a stage is measured
_SPARE = 1 << 30  # bytes


@dataclass(frozen=True)
class Work:
    """One layer: R outputs, C inputs (with the column of ones), N rows per image."""

    name: str
    rows: int
    columns: int
    patches: int
    kept: float

    @property
    def removed(self) -> int:
        """Weights removed from a row, on average."""
        return round(self.columns * (1 - self.kept))

    @property
    def moment(self) -> float:
        """Operations for the second moment of one image."""
        return float(self.patches) * self.columns**2

    @property
    def inverse(self) -> float:
        """Operations for the inverse."""
        return 2.0 * self.columns**3

    @property
    def lobs(self) -> float:
        """Operations for the paper's removals."""
        return 2.0 * self.rows * self.removed * self.columns

    @property
    def exact(self) -> float:
        """Operations for exact removals."""
        k = float(self.removed)
        return self.rows * (self.columns * k**2 - 2 * k**3 / 3)

    @property
    def moment_bytes(self) -> int:
        """Bytes of the second moment in float64."""
        return 8 * self.columns**2


@dataclass(frozen=True)
class Rates:
    """Operations per second of a core, counted as above."""

    moment: float
    inverse: float
    lobs: float
    exact: float

    def seconds(self, work: Work, images: int) -> dict[str, float]:
        """Core seconds of each stage of a layer."""
        return {
            "calibration": images * work.moment / self.moment,
            "inverse": work.inverse / self.inverse,
            "lobs": work.lobs / self.lobs,
            "exact": work.exact / self.exact,
        }


@dataclass(frozen=True)
class WideLayer:
    """Core seconds of the stages of a layer that is too large for this machine."""

    work: Work
    seconds: dict[str, float]
    measured: tuple[str, ...]  # the stages that were run on some rows of it; others are estimates


def measured_rates(columns: int = 2048, seed: int = 0) -> Rates:
    """Measure the rates on a medium-sized layer, in a few seconds."""
    torch.manual_seed(seed)
    x = torch.randn(2 * columns, columns)
    moment = Hessian(columns)
    moment_seconds = _seconds(lambda: moment.update(x))
    H = moment.matrix()
    inverse_seconds = _seconds(lambda: invert(H, 0.01, "H").A)
    A = invert(H, 0.01, "H").A.float()
    R, few, k = 256, 16, columns // 2
    W = torch.randn(R, columns)
    lobs_seconds = _seconds(lambda: removed_in_order(W, A, k))
    exact_seconds = _seconds(lambda: ops.exact_trace(W[:few], A, limit=k))
    work = Work("", R, columns, 2 * columns, 0.5)
    return Rates(
        moment=work.moment / moment_seconds,
        inverse=work.inverse / inverse_seconds,
        lobs=work.lobs / lobs_seconds,
        exact=work.exact * few / R / exact_seconds,
    )


def removed_in_order(W: Tensor, A: Tensor, count: int) -> None:
    """Remove ``count`` weights of every row of a copy of W (R, C), with the paper's repair.

    The order is random.
    """
    R, C = W.shape
    order = torch.cat([torch.randperm(C)[:count] for _ in range(R)])
    start = torch.arange(R + 1) * count
    ops.static_order_prune_(W.clone(), A, order.to(torch.int32), start)


def wide_layer(work: Work, rates: Rates, memory: int, images: int) -> WideLayer:
    """Measure what can be measured of a layer that does not fit into ``memory`` bytes.

    On some of its rows: adding to its second moment, and the paper's removals with an artificial
    inverse (their time does not depend on its values). The rest is estimated from ``rates``.
    """
    estimate, measured = rates.seconds(work, images), []
    if work.moment_bytes + _SPARE < memory:
        moment = Hessian(work.columns)
        x = torch.randn(_ROWS, work.columns)
        seconds = _seconds(lambda: moment.update(x), times=1)
        del moment
        estimate["calibration"] = seconds * work.patches * images / _ROWS
        measured.append("calibration")
    if work.moment_bytes // 2 + _SPARE < memory:
        A = torch.full((work.columns, work.columns), 1e-5)
        A.diagonal().fill_(1.0)
        W = torch.randn(_ROWS, work.columns)
        seconds = _seconds(lambda: removed_in_order(W, A, work.removed), times=1)
        estimate["lobs"] = seconds * work.rows / _ROWS
        measured.append("lobs")
    return WideLayer(work, estimate, tuple(measured))


def _seconds(call: Callable[[], object], times: int = 2) -> float:
    """Core seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(times):
        begun = time.process_time()
        call()
        best = min(best, time.process_time() - begun)
    return best
