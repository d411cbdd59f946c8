"""The second moment of a layer's inputs, accumulated or given as a matrix.

``H = X^T X / N``, the mean over all samples that the layer has read (Dong, Chen & Pan 2017, eq. 9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
)

__all__ = ["Hessian", "few_rows", "needs_float64", "second_moment"]

_TILE = 256  # rows and columns of a tile that is compared with its mirror image, in cache
_AT_ONCE = 4096  # rows converted to float64
_SAMPLE = 256  # rows that are looked at for their means
_FAR = 1000.0  # squares of means over variances from which on float32 loses too much
_SMALLEST = 1e-15  # entries of this size, or of its inverse, have squares that float32 can hold


class Hessian:
    """Streaming second moment of a layer's inputs.

    A sum and a total weight are kept and divided once, at the end. Nothing is rescaled on the way,
    so nothing drifts, and the result does not depend on the number of threads.

    Parameters
    ----------
    columns : int
        C, the width of the inputs.
    bias : bool
        Append a column of ones to every input, so that a bias can be updated with the weights.
        ``matrix()`` is then (C + 1, C + 1), the ones last.
    dtype : torch.float64 or torch.float32
        Type of the running sum. float32 halves the memory and costs about two digits over a long
        calibration.
    device : torch.device or str
        Where the sum lives, and where inputs must be.
    """

    def __init__(
        self,
        columns: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.columns = checks.positive_int(columns, "columns")
        checks.flag(bias, "bias")
        if dtype not in (torch.float64, torch.float32):
            raise DtypeError(f"dtype: {dtype}; the sum is kept in torch.float64 or torch.float32")
        self.bias = bias
        size = self.columns + int(bias)
        self._sum = checks.zeros((size, size), dtype, device, "columns")  # lower triangle
        self._rows = 0.0
        self._whole = True
        self.backend: str | None = None

    @property
    def rows(self) -> float:
        """Total weight of the samples seen: their number where no weights were passed."""
        return self._rows

    def set_rows(self, rows: float) -> None:
        """State the total weight of the samples that :attr:`running_sum` is of, after it has been
        written to from outside."""
        self._rows = float(rows)

    @property
    def running_sum(self) -> Tensor:
        """The sum itself, not a copy: the lower triangle of a (C, C) or (C + 1, C + 1) matrix."""
        self._check_whole()
        return self._sum

    @property
    def dtype(self) -> torch.dtype:
        """Type of the running sum."""
        return self._sum.dtype

    @property
    def device(self) -> torch.device:
        """Where the running sum lives."""
        return self._sum.device

    def __repr__(self) -> str:
        return (
            f"Hessian(columns={self.columns}, bias={self.bias}, rows={self.rows:g}, "
            f"device={self.device})"
        )

    def update(self, x: Any, weights: Any = None) -> Hessian:
        """Add inputs.

        Parameters
        ----------
        x : (..., C) float64, float32, float16 or bfloat16
            Any number of leading dimensions, any strides. Not modified. Gradients are not tracked.
        weights : (...,), optional
            A finite weight >= 0 for each row, 1 by default. Rows of weight 0 are not read: use it
            for padding.

        Returns
        -------
        Hessian
            Itself.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            x or weights do not fit.
        NonFiniteError
            A NaN or an infinity in a row that counts. The Hessian is unchanged.

        Notes
        -----
        float32 and 16-bit inputs are summed in float32 over 256 rows at a time and then in the
        master type; 16-bit products are exact. Inputs whose means are far larger than their
        deviations, or whose squares leave the range of float32, are summed in float64 throughout:
        the covariance, which is what a bias leaves of the second moment, would otherwise be lost
        in rounding. If Ctrl-C interrupts a call, the object refuses further use.
        """
        self._check_whole()
        x = checks.tensor(x, "x")
        if x.ndim == 0 or x.shape[-1] != self.columns:
            raise ShapeError(
                f"x: shape {tuple(x.shape)}, but its last dimension must be {self.columns}"
            )
        if x.device != self.device:
            raise ShapeError(
                f"x is on {x.device} but this Hessian is on {self.device}: move one of them"
            )
        lead = tuple(x.shape[:-1])
        samples = x.reshape(-1, self.columns)  # (N, C)
        if weights is not None:
            t = checks.tensor(weights, "weights", dtypes=checks.WEIGHTS)
            if tuple(t.shape) != lead:
                raise ShapeError(
                    f"weights: shape {tuple(t.shape)}, but x has rows {lead}: give one weight "
                    "per row"
                )
            weights = checks.token_weights(t.reshape(-1), len(samples), x.device)
        wide = self.dtype == torch.float64 and needs_float64(samples, weights)
        self._whole = False
        try:
            for at in _slices(len(samples)) if wide else [slice(None)]:
                part = samples[at].double() if wide else samples
                weight = None if weights is None else weights[at]
                self.backend = ops.hessian_accumulate_(self._sum, part, weight, ones=self.bias)
        except NonFiniteError as error:
            self._whole = True
            if error.flat is None:
                raise
            raise checks.not_finite("x", x, error.flat) from None
        except (LobsError, MemoryError):
            self._whole = True  # refused before anything was written
            raise
        self._whole = True
        self._rows += float(len(samples)) if weights is None else float(weights.sum())
        return self

    def merge(self, other: Hessian) -> Hessian:
        """Add what ``other`` has seen. It must have the same columns and bias, and is not modified.
        Returns itself."""
        self._check_whole()
        if not isinstance(other, Hessian):
            raise DtypeError(f"other: expected a Hessian, got {type(other).__name__}")
        other._check_whole()
        if (other.columns, other.bias) != (self.columns, self.bias):
            raise ShapeError(
                f"other: {other!r} cannot be merged into {self!r}: columns and bias must agree"
            )
        self._sum += other._sum.to(device=self.device, dtype=self.dtype)
        self._rows += other._rows
        return self

    def all_reduce(self, group: Any = None) -> Hessian:
        """Add up the sums and total weights of all ranks of a ``torch.distributed`` group, so that
        unequal shards count correctly.

        Collective: every rank of the group must call it. A rank that has seen nothing contributes
        zeros. Returns itself.
        """
        self._check_whole()
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise LobsError(
                "all_reduce: torch.distributed has no process group; call init_process_group first"
            )
        rows = torch.tensor([self._rows], dtype=torch.float64, device=self.device)
        self._whole = False
        dist.all_reduce(self._sum, group=group)
        dist.all_reduce(rows, group=group)
        self._whole = True
        self._rows = float(rows)
        return self

    def release(self) -> None:
        """Free the sum's memory. ``rows`` stays; everything else is refused from then on."""
        self._sum = self._sum.new_empty(0)

    def matrix(self) -> Tensor:
        """H = X^T X / N as a new symmetric (C, C) float64 tensor; (C + 1, C + 1) with a bias.

        Raises LobsError if no sample has been seen, NonFiniteError if the sum overflowed.
        """
        return self._mean(in_place=False)

    def take(self) -> Tensor:
        """:meth:`matrix` and then :meth:`release`, in the memory of the sum if that is float64."""
        mean = self._mean(in_place=self.dtype == torch.float64)
        self.release()
        return mean

    def _mean(self, *, in_place: bool) -> Tensor:
        self._check_whole()
        if not self._rows > 0:
            raise LobsError(
                "hessian: it has seen no rows (or only rows of weight 0); call update first"
            )
        self._whole = not in_place
        # Only the lower triangle of the sum is read, and each tile before it is written.
        mean = self._sum if in_place else torch.empty_like(self._sum, dtype=torch.float64)
        finite = True
        for first in range(0, len(mean), _TILE):  # one more copy may be gigabytes
            rows = slice(first, first + _TILE)
            low = self._sum[rows, : rows.stop].to(torch.float64) / self._rows
            square = low[:, first:].tril_()
            mean[rows, :first] = low[:, :first]
            mean[rows, rows] = square + square.tril(-1).T
            for other in range(0, first, _TILE):
                columns = slice(other, other + _TILE)
                mean[columns, rows] = low[:, columns].T
            finite = finite and checks.is_finite(low)
        if not finite:
            raise NonFiniteError(
                f"hessian: the sum overflowed {str(self.dtype).removeprefix('torch.')}; scale the "
                "inputs down, or use a wider sum"
            )
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to resume later, as tensors that safetensors can save."""
        self._check_whole()
        return {
            "sum": self._sum.tril(),
            "rows": torch.tensor(self._rows, dtype=torch.float64),
            "bias": torch.tensor(self.bias),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Nothing changes if it does not fit."""
        if not isinstance(state, Mapping):
            raise DtypeError(f"state: expected a mapping, got {type(state).__name__}")
        if set(state) != {"sum", "rows", "bias"}:
            keys = ", ".join(sorted(map(repr, state)))
            raise ArgumentError(f"state: keys {keys}; expected 'bias', 'rows' and 'sum'")
        total = checks.tensor(
            state["sum"], "state['sum']", ndim=2, dtypes=(torch.float64, torch.float32)
        )
        rows = checks.real(state["rows"], "state['rows']")
        if not isinstance(state["bias"], (bool, Tensor)):
            kind = type(state["bias"]).__name__
            raise DtypeError(f"state['bias']: expected a bool, got {kind}")
        bias = checks.tensor(torch.as_tensor(state["bias"]), "state['bias']", dtypes=(torch.bool,))
        if bias.numel() != 1:
            raise DtypeError(f"state['bias']: expected one bool, got shape {tuple(bias.shape)}")
        if total.shape != self._sum.shape or bool(bias) != self.bias:
            raise ShapeError(
                f"state['sum'] is {tuple(total.shape)} with bias={bool(bias)}, this is {self!r}"
            )
        if not 0 <= rows < math.inf:
            raise ArgumentError(f"state['rows']: {rows}; it must be finite and >= 0")
        checks.check_finite(total, "state['sum']")
        if bool((total.diagonal() < 0).any()):
            raise NotPositiveDefiniteError("state['sum']: it has a negative diagonal entry")
        self._sum = total.to(device=self.device, dtype=self.dtype).tril()
        self._rows = rows
        self._whole = True

    @classmethod
    def from_matrix(cls, H: Any, rows: float = 1.0) -> Hessian:
        """A Hessian that has seen ``rows`` samples with the mean second moment ``H`` (C, C), which
        is symmetric and is copied."""
        H = second_moment(H, "H")
        rows = checks.real(rows, "rows")
        if not 0 < rows < math.inf:
            raise ArgumentError(f"rows: {rows}; it must be positive and finite")
        hessian = cls(H.shape[0], device=H.device)
        hessian._sum = (H * rows).tril()
        hessian._rows = rows
        return hessian

    def _check_whole(self) -> None:
        if self._sum.numel() == 0:
            raise LobsError("hessian: its sum was released; start again with a new one")
        if not self._whole:
            raise LobsError(
                "hessian: an update was interrupted halfway; discard this one and start again"
            )


def second_moment(H: Any, name: str) -> Tensor:
    """Check a second moment (C, C) and return it in float64, exactly symmetric.

    Both triangles must be finite and agree to 1e-4 of the largest entry; the diagonal must not be
    negative. The result may share its memory with ``H``: do not write to it.
    """
    matrix = checks.tensor(H, name, ndim=2)
    if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ShapeError(f"{name}: shape {tuple(matrix.shape)}; it must be square and not empty")
    moment = matrix.to(torch.float64)
    pieces = range(0, len(moment), _TILE)  # so that temporaries stay small
    apart = torch.tensor([_skewest(moment, i) for i in pieces], dtype=torch.float64)
    worst = float(apart.max())
    if not math.isfinite(worst):  # as is the difference from whatever is not finite
        checks.check_finite(matrix, name)
    if worst > 0 and worst > 1e-4 * max(float(moment.max()), -float(moment.min())):
        first = pieces[int(apart.argmax())]
        skew = _skew(moment, first)
        i, j = divmod(int(skew.argmax()), skew.shape[1])
        i, j = i + first, j + first
        raise ArgumentError(
            f"{name}: not symmetric: {float(moment[i, j])} at ({i}, {j}) but "
            f"{float(moment[j, i])} at ({j}, {i}); pass both triangles"
        )
    negative = torch.nonzero(moment.diagonal() < 0)
    if len(negative):
        q = int(negative[0])
        raise NotPositiveDefiniteError(
            f"{name}: {float(moment[q, q])} at ({q}, {q}); the diagonal of a second moment is not "
            "negative"
        )
    if worst == 0:
        return moment.contiguous()
    return (moment + moment.T).div_(2).contiguous()


def _skew(moment: Tensor, first: int, rows: int = _TILE) -> Tensor:
    """|M - M^T| for some rows of M, from the diagonal's first column on."""
    return (moment[first : first + rows, first:] - moment[first:, first : first + rows].T).abs()


def _skewest(moment: Tensor, first: int) -> float:
    """The largest entry of :func:`_skew`; not finite if one is not finite."""
    tile = slice(first, first + _TILE)
    worst = moment.new_zeros(())
    for other in range(first, len(moment), _TILE):
        mirrored = moment[other : other + _TILE, tile].T
        apart = (moment[tile, other : other + _TILE] - mirrored).abs_().amax()
        worst = torch.maximum(worst, apart)
    return float(worst)


def _slices(rows: int) -> list[slice]:
    return [slice(first, first + _AT_ONCE) for first in range(0, rows, _AT_ONCE)]


def needs_float64(x: Tensor, weights: Tensor | None = None) -> bool:
    """Whether sums of products of the rows x (n, C) would lose too much in float32: their means are
    far from zero, as measured by their deviations, or their squares leave its range. Rows of weight
    0 do not count; NaN and infinity do not matter here."""
    if x.dtype == torch.float64 or len(x) == 0:
        return False
    if weights is not None and bool((weights <= 0).any()):
        x = x[weights > 0]
        if len(x) == 0:
            return False
    low, high = torch.aminmax(x)  # the one pass over all of x: 2 percent of that of its products
    largest = max(-float(low), float(high))
    if not 0 < largest < torch.inf:
        return False
    if not _SMALLEST < largest < 1 / _SMALLEST:
        return True
    some = x[:: -(-len(x) // _SAMPLE)].float()
    means = float(some.mean(0).square().sum())
    squares = float(some.square().mean(0).sum())
    return means > _FAR * (squares - means)  # the difference of which is the variances' sum


def few_rows(rows: float, columns: int) -> str:
    """The note for a second moment that cannot have full rank."""
    return (
        f"fewer rows ({rows:g}) than columns ({columns}): the damping decides along the unseen "
        f"directions"
    )
