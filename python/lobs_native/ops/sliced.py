"""A sparse weight in slices of 16 rows, and the product of a few rows of x with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lobs_native import checks
from lobs_native.errors import ArgumentError, BackendError, DtypeError, ShapeError
from lobs_native.ops import dispatch, reference
from lobs_native.ops.native import DTYPES, check_status, core, crossing, has, threads

__all__ = ["SLICE_ROWS", "SlicedWeight", "multiply", "sliced_linear"]

SLICE_ROWS = 16
WIDTHS = (16, 64)
DTYPES_OF_VALUES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class SlicedWeight:
    """A matrix (R, C) without its zeros in sliced ELLPACK with blocks of columns, as
    ``csrc/sliced.h`` describes it. On the CPU.

    Raises ShapeError, DtypeError or ArgumentError where the parts do not fit one another.
    """

    values: Tensor  # (T, 16) float32 or bfloat16, contiguous; 0 in padding
    columns: Tensor  # (T, 16) uint8, within the block of columns; width - 1 in padding
    steps: Tensor  # (ceil(R / 16), ceil(C / (width - 1))) uint8: steps of each slice and block
    rows: int
    features: int
    width: int = 64
    start: Tensor = field(init=False)  # (slices + 1) int64: the first step of each slice

    def __post_init__(self) -> None:
        rows, features = checks.count(self.rows, "rows"), checks.count(self.features, "features")
        if self.width not in WIDTHS:
            raise ArgumentError(f"width: {self.width!r}; it must be 16 or 64")
        parts = (
            ("values", self.values, DTYPES_OF_VALUES),
            ("columns", self.columns, (torch.uint8,)),
            ("steps", self.steps, (torch.uint8,)),
        )
        for name, part, dtypes in parts:
            part = checks.tensor(part, name, ndim=2, dtypes=dtypes)
            if part.device.type != "cpu":
                raise BackendError(f"{name}: on {part.device}; sliced weights are for the CPU")
            object.__setattr__(self, name, part.contiguous())
        counted = self.steps.sum(dim=1, dtype=torch.int64)
        start = torch.cat((torch.zeros(1, dtype=torch.int64), counted.cumsum(0)))
        object.__setattr__(self, "start", start)
        total = int(start[-1])
        shapes = (
            ("steps", self.steps, (-(-rows // SLICE_ROWS), -(-features // (self.width - 1)))),
            ("values", self.values, (total, SLICE_ROWS)),
            ("columns", self.columns, (total, SLICE_ROWS)),
        )
        for name, part, shape in shapes:
            if tuple(part.shape) != shape:
                raise ShapeError(
                    f"{name} is {tuple(part.shape)}, but must be {shape} for rows={rows}, "
                    f"features={features}, width={self.width} and these steps"
                )
        if total:
            self._check_columns()

    def _check_columns(self) -> None:
        """Refuse columns that do not exist or do not rise within a block, and rows of the last
        slice that do not exist."""
        none, blocks = self.width - 1, self.steps.shape[1]
        if int(self.columns.max()) > none or int(self.steps.max()) > none:
            raise ArgumentError(f"columns, steps: all must be at most width - 1 = {none}")
        parts = torch.arange(self.steps.numel()).repeat_interleave(self.steps.reshape(-1).long())
        last = self.features - (blocks - 1) * none  # columns of the last block
        stored = self.columns != none
        bad = stored & (self.columns >= last) & (parts % blocks == blocks - 1)[:, None]
        absent = self.rows - (len(self.steps) - 1) * SLICE_ROWS
        bad[self.start[-2] :, absent:] |= stored[self.start[-2] :, absent:]
        falls = stored[1:] & (self.columns[1:] <= self.columns[:-1])
        bad[1:] |= falls & (parts[1:] == parts[:-1])[:, None]
        if bool(bad.any()):
            raise ArgumentError(
                f"columns: step {int(bad.any(dim=1).to(torch.uint8).argmax())} has a weight "
                f"outside ({self.rows}, {self.features}), or columns do not rise in a block"
            )

    @classmethod
    def pack(
        cls, weight: Tensor, *, dtype: torch.dtype | None = None, width: int | None = None
    ) -> SlicedWeight:
        """Store the weights (R, C) that are not zero, as ``dtype`` (default: as they are).

        ``width`` is that of the fastest kernel of this machine, if it is left out. Weights that
        become zero in ``dtype`` are stored all the same. ``weight`` is not modified.
        """
        weight = checks.tensor(weight, "weight", ndim=2).cpu()
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in DTYPES_OF_VALUES:
            raise DtypeError(f"dtype: {dtype}; values are kept in float32 or bfloat16: pass one")
        width = best_width() if width is None else width
        if width not in WIDTHS:
            raise ArgumentError(f"width: {width!r}; it must be 16 or 64")
        (R, C), none = weight.shape, width - 1
        slices, blocks = -(-R // SLICE_ROWS), -(-C // none)
        row, column = (weight != 0).nonzero(as_tuple=True)
        block = column // none
        counts = torch.zeros(slices * SLICE_ROWS * blocks, dtype=torch.int64)
        key = row * blocks + block
        counts.scatter_add_(0, key, torch.ones_like(key))
        steps = counts.view(slices, SLICE_ROWS, blocks).amax(dim=1) if R and C else counts
        steps = steps.view(slices, blocks)
        first = counts.cumsum(0) - counts  # the first weight of each row and block
        begun = (steps.reshape(-1).cumsum(0) - steps.reshape(-1)).view(slices, blocks)
        step = begun[row // SLICE_ROWS, block] + torch.arange(len(key)) - first[key]
        total = int(steps.sum())
        values = torch.zeros(total, SLICE_ROWS, dtype=dtype)
        columns = torch.full((total, SLICE_ROWS), none, dtype=torch.uint8)
        values[step, row % SLICE_ROWS] = weight[row, column].to(dtype)
        columns[step, row % SLICE_ROWS] = (column % none).to(torch.uint8)
        return cls(values, columns, steps.to(torch.uint8), R, C, width)

    def unpack(self) -> Tensor:
        """The matrix (R, C) with its zeros, in the dtype of the values."""
        return reference.unsliced(
            self.values, self.columns, self.steps, self.rows, self.features, self.width
        )[0]

    @property
    def nbytes(self) -> int:
        """The bytes that one product reads."""
        return sum(part.nbytes for part in (self.values, self.columns, self.steps, self.start))


def best_width() -> int:
    """The width for which this machine's CPU kernels are made."""
    return 64 if dispatch.select_backend(None, torch.device("cpu")) == "cpu_v4" else 16


def multiply(x: Tensor, weight: SlicedWeight, bias: Tensor | None, chosen: str) -> Tensor:
    """``sliced_linear`` for x (..., C) and arguments that have been checked, on a backend by its
    own name. Views of tensors are avoided: each takes a tenth of a small product's time."""
    leading = x.shape[:-1]
    samples = math.prod(leading)
    if chosen == "reference" or not has(chosen, "sliced_linear"):
        parts = (weight.values, weight.columns, weight.steps)
        sizes = (weight.rows, weight.features, weight.width)
        rows = x.detach().reshape(samples, weight.features)
        return reference.sliced_linear(rows, *parts, bias, *sizes).view(*leading, weight.rows)
    y = x.new_empty(*leading, weight.rows)
    if y.numel() == 0:
        return y
    if x.ndim == 2:
        given = crossing(x)
    else:
        x = x.contiguous()
        given = (x.data_ptr(), DTYPES[x.dtype], (samples, weight.features), (weight.features, 1))
    status, _ = core.sliced_linear(  # not by call(), which takes as long as a small product
        chosen,
        (y.data_ptr(), DTYPES[y.dtype], (samples, weight.rows), (weight.rows, 1)),
        given,
        weight.values.data_ptr(),
        DTYPES[weight.values.dtype],
        weight.columns.data_ptr(),
        weight.steps.data_ptr(),
        weight.start.data_ptr(),
        weight.width,
        0 if bias is None else bias.data_ptr(),
        threads(),
    )
    check_status(status)
    return y


def sliced_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    steps: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int,
    features: int,
    width: int = 64,
    backend: str | None = None,
) -> Tensor:
    """Compute ``x @ W.T + bias`` for a sparse weight W (R, C) in slices.

    Parameters
    ----------
    x : (N, C) float32 or bfloat16
        Not modified; any strides.
    values, columns, steps, rows, features, width
        The parts of :class:`SlicedWeight`, with R rows and C features. They are checked at every
        call, which takes longer than a small product: ``lobs_native.SparseLinear`` checks once.
    bias : (R,) float32, optional
    backend : str, optional
        A name from ``backends()``. A backend that lacks this operation leaves it to plain torch.

    Returns
    -------
    (N, R), of x's dtype
        Accumulated in float32. Weights that are not stored do not touch the result, so an infinity
        or NaN in x is seen only by the rows of W that have a weight in its column.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, BackendError
        An argument does not fit.

    Notes
    -----
    Source: Monakov et al. 2010 (sliced ELLPACK), Kreutzer et al. 2014 (SELL-C-sigma);
    ``csrc/sliced.h``.
    """
    weight = SlicedWeight(values, columns, steps, rows, features, width)
    x = checks.tensor(x, "x", ndim=2, dtypes=DTYPES_OF_VALUES)
    checks.same_device(x, "x", weight.values, "values")
    if x.shape[1] != features:
        raise ShapeError(f"x is {tuple(x.shape)}, but the weight has {features} columns")
    if bias is not None:
        bias = checks.tensor(bias, "bias", ndim=1, dtypes=(torch.float32,)).contiguous()
        checks.same_device(x, "x", bias, "bias")
        if len(bias) != rows:
            raise ShapeError(f"bias has {len(bias)} entries, but the weight has {rows} rows")
    return multiply(x, weight, bias, dispatch.select_backend(backend, x.device))
