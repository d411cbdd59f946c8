"""Greedy removal of units, groups of columns, from all rows of one or several layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import (
    ColumnsPlan,
    Status,
    call,
    check_status,
    core,
    crossing,
    has,
)

# W, A, start, scale, columns of the widest unit
_Crossing = tuple[tuple[int, int, Sequence[int], Sequence[int]], int, int, float, int]

__all__ = ["ColumnLayer", "ColumnsTrace", "columns_trace"]


@dataclass(frozen=True)
class ColumnLayer:
    """A layer that reads units."""

    W: Tensor  # (R, C) float64 or float32
    A: Tensor  # (C, C) of W's dtype, symmetric: its damped inverse second moment
    start: Tensor  # (units + 1,) int64 from 0 to C: unit u is columns start[u] .. start[u + 1] - 1
    scale: float = 1.0  # on its costs


def columns_trace(
    layers: Sequence[ColumnLayer],
    limit: int,
    *,
    first: Tensor | None = None,
    sets: Sequence[Tensor] = (),
    backend: str | None = None,
) -> ColumnsTrace:
    """Remove the unit that costs least in all layers together, repair all of them, and repeat.

    Removing unit u, its columns in a layer, costs ``tr(W_u (A_uu)^-1 W_u^T)`` where all rows of the
    layer re-adjust; then ``W -= W_u Q`` and ``A -= A_:u Q`` with ``Q = A_uu^-1 A_u:``. The order is
    that of these updates, step for step, though neither W nor A is written.

    Parameters
    ----------
    layers : Sequence[ColumnLayer]
        At least one; all of one dtype, on one device and with the same number of units. A unit may
        have any number of columns, none where a layer does not read it. Not modified, and read
        again by :meth:`ColumnsTrace.extend`.
    limit : int
        Maximum number of removals.
    first : (units,) float64, optional
        Below zero for units that go before all others whatever they cost, the lowest first; else
        zero.
    sets : Sequence[(n,) int64]
        Sets of units of which one has to stay each.
    backend : str, optional
        A name from ``backends()``. Tensors of a device whose backend has no kernel for it are
        copied to the CPU; then the trace's backend is a CPU level.

    Returns
    -------
    ColumnsTrace
        Every prefix of its order is the choice for its length. What is left of a layer is repaired
        by ``W - W_S A_SS^-1 A_S:``, with S the columns of all units that have gone.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.
    NonFiniteError
        W or A holds a NaN or an infinity.
    NotPositiveDefiniteError
        A is not positive definite on the columns of a unit, at the start or, by rounding, after
        some removals.

    Notes
    -----
    Source: Hassibi & Stork 1993, in blocks; Kurtic et al. 2023 (ZipLM).
    """
    if not layers:
        raise ArgumentError("layers: none; there must be at least one")
    checked = [_checked(layer, m, layers[0]) for m, layer in enumerate(layers)]
    units, device = len(checked[0].start) - 1, checked[0].W.device
    if first is None:
        first = torch.zeros(units, dtype=torch.float64, device=device)
    first = checks.tensor(first, "first", ndim=1, dtypes=(torch.float64,)).contiguous()
    if len(first) != units:
        raise ShapeError(f"first has {len(first)} entries but there are {units} units")
    checks.same_device(checked[0].W, "layers[0].W", first, "first")
    checks.check_finite(first, "first")
    for s in sets:
        checks.tensor(s, "sets", ndim=1, dtypes=(torch.int64,))
        if len(s) and not 0 <= int(s.min()) <= int(s.max()) < units:
            raise ArgumentError(
                f"sets: {int(s.min())} .. {int(s.max())}; units are 0 .. {units - 1}"
            )
        if len(s.unique()) < len(s):
            raise ArgumentError("sets: a unit occurs twice in one of them")
    chosen = dispatch.select_backend(backend, device)
    if device.type != "cpu" and (chosen == "reference" or not has(chosen, "columns_trace")):
        device, chosen = torch.device("cpu"), dispatch.select_backend("cpu", torch.device("cpu"))
        checked = [ColumnLayer(x.W.cpu(), x.A.cpu(), x.start.cpu(), x.scale) for x in checked]
    trace = ColumnsTrace(checked, first.to(device), [s.to(device) for s in sets], chosen)
    trace.extend(limit)
    return trace


def _checked(layer: ColumnLayer, m: int, other: ColumnLayer) -> ColumnLayer:
    name = f"layers[{m}]"
    floats = (torch.float64, torch.float32) if m == 0 else (other.W.dtype,)
    W = checks.tensor(layer.W, f"{name}.W", ndim=2, dtypes=floats)
    W = W if W.shape[1] == 0 or W.stride(1) == 1 else W.contiguous()
    A = checks.tensor(layer.A, f"{name}.A", ndim=2, dtypes=(W.dtype,)).contiguous()
    start = checks.tensor(layer.start, f"{name}.start", ndim=1, dtypes=(torch.int64,)).contiguous()
    checks.square(A, f"{name}.A", W, f"{name}.W")
    C = W.shape[1]
    if len(start) != len(other.start) or len(start) == 0:
        raise ShapeError(
            f"{name}.start has {len(start)} entries and that of layers[0] {len(other.start)}; "
            "there must be one more than units, the same in all layers"
        )
    ends = (int(start[0]), int(start[-1]))
    if ends != (0, C) or bool((start.diff() < 0).any()):
        raise ArgumentError(f"{name}.start: it must rise from 0 to {C}, the number of columns")
    for x, of in ((A, "A"), (start, "start"), (other.W, "W")):
        checks.same_device(W, f"{name}.W", x, f"{name if x is not other.W else 'layers[0]'}.{of}")
    checks.check_finite(W, f"{name}.W")
    checks.check_finite(A, f"{name}.A")
    scale = checks.real(layer.scale, f"{name}.scale")
    if not 0 <= scale < torch.inf:
        raise ArgumentError(f"{name}.scale: {scale:g}; it must be finite and not below 0")
    return ColumnLayer(W, A, start, scale)


class ColumnsTrace:
    """The removals of :func:`columns_trace`, which can go on.

    Attributes
    ----------
    order : list[int]
        Units in the order of removal.
    cost : list[float]
        What each removal added to the error of all layers, by their scales.
    backend : str
    """

    def __init__(
        self, layers: list[ColumnLayer], first: Tensor, sets: list[Tensor], backend: str
    ) -> None:
        self.order: list[int] = []
        self.cost: list[float] = []
        self.backend = backend
        self._layers, self._first, self._sets = layers, first, sets
        self._floor = 8 * torch.finfo(layers[0].W.dtype).eps  # as that of exact_trace
        self._memory: Tensor | None = None

    def extend(self, limit: int) -> None:
        """Go on to at most ``limit`` removals in all.

        The result is that of a call with this limit from the start, bit for bit. After an error,
        the removals before it are known, and it is raised again.
        """
        limit = min(checks.count(limit, "limit"), len(self._first))
        if limit <= len(self.order) and (self._memory is not None or self.order):
            return
        if self.backend == "reference":
            layers = [(x.W, x.A, x.start, x.scale) for x in self._layers]
            sets = [s.tolist() for s in self._sets]
            self.order, self.cost, lost = reference.columns_trace(
                layers, self._first.tolist(), sets, limit, self._floor
            )
        else:
            lost = self._extend(limit)
        if lost >= 0:
            m, unit = divmod(lost, len(self._first))
            after = f" after {len(self.order)} removals" if self.order else ""
            raise NotPositiveDefiniteError(
                f"layers[{m}].A: not positive definite on the columns of unit {unit}{after}: raise "
                "the damping"
            )

    def _extend(self, limit: int) -> int:
        """Go on natively; layer * units + unit of a lost pivot, or -1."""
        device, units, done = self._first.device, len(self._first), len(self.order)
        widths = [layer.start.diff().cpu() for layer in self._layers]
        widest = [int(width.max()) if units else 0 for width in widths]
        if self._memory is None:
            host = [layer.start.cpu() for layer in self._layers]
            size = core.columns_bytes(
                self.backend, self._crossing(host, widest), units, len(self._sets)
            )
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        order = torch.zeros(max(limit, 1), dtype=torch.int32, device=device)
        cost = torch.zeros(max(limit, 1), dtype=torch.float64, device=device)
        count = torch.full((1,), done, dtype=torch.int64, device=device)
        sizes = torch.tensor([0, *map(len, self._sets)], dtype=torch.int64, device=device)
        set_start = sizes.cumsum(0)
        set_unit = torch.cat([self._first.new_empty(0), *self._sets]).to(torch.int32)
        plan = ColumnsPlan(
            units=units,
            done=done,
            limit=limit,
            floor=self._floor,
            first=self._first.data_ptr(),
            sets=len(self._sets),
            set_start=set_start.data_ptr(),
            set_unit=set_unit.data_ptr(),
        )
        status, where = call(
            "columns_trace",
            self.backend,
            device,
            order.data_ptr(),
            cost.data_ptr(),
            count.data_ptr(),
            self._crossing([layer.start for layer in self._layers], widest),
            plan,
            self._memory.data_ptr(),
        )
        if status != Status.NOT_POSITIVE:
            check_status(status)
        found = slice(done, int(count))
        self.order += order[found].tolist()
        self.cost += cost[found].tolist()
        return where if status == Status.NOT_POSITIVE else -1

    def _crossing(self, starts: list[Tensor], widest: list[int]) -> list[_Crossing]:
        """The layers as native code takes them."""
        each = zip(self._layers, starts, widest, strict=True)
        return [
            (crossing(layer.W), layer.A.data_ptr(), start.data_ptr(), layer.scale, most)
            for layer, start, most in each
        ]
