"""A layer's second moment: accumulating it, and keeping its inverse up to date.

``H = X^T X / N``, the mean over all rows the layer saw (Dong, Chen & Pan 2017, eq. 9).
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

__all__ = ["Hessian", "StreamingInverse", "second_moment"]

_PIECE = 512  # rows of a matrix in one temporary


class Hessian:
    """Streaming second moment of a layer's inputs.

    A sum and a total weight are kept, and divided once at the end: no rescaling on the way, so no
    drift, and the result does not depend on the number of threads.

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
        """Total weight of the rows seen; their number where no weights were given."""
        return self._rows

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
        master type; 16-bit products are exact. If Ctrl-C interrupts a call, the object refuses
        further use.
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
        given, x = x, x.reshape(-1, self.columns)  # (N, C)
        if weights is not None:
            t = checks.tensor(weights, "weights", dtypes=checks.WEIGHTS)
            if tuple(t.shape) != lead:
                raise ShapeError(
                    f"weights: shape {tuple(t.shape)}, but x has rows {lead}: give one weight "
                    "per row"
                )
            weights = checks.token_weights(t.reshape(-1), x.shape[0], x.device)
        self._whole = False
        try:
            self.backend = ops.hessian_accumulate_(self._sum, x, weights, ones=self.bias)
        except NonFiniteError as error:
            self._whole = True
            if error.flat is None:
                raise
            raise checks.not_finite("x", given, error.flat) from None
        except (LobsError, MemoryError):
            self._whole = True  # refused before anything was written
            raise
        self._whole = True
        self._rows += float(x.shape[0]) if weights is None else float(weights.sum())
        return self

    def merge(self, other: Hessian) -> Hessian:
        """Add what ``other`` has seen. Same columns and bias; ``other`` is not modified. Returns
        itself."""
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
        """Sum over the ranks of a ``torch.distributed`` group: sums and total weights, so unequal
        shards count right.

        Collective: every rank of the group must call it. A rank that saw nothing takes part with
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
        """Give the sum's memory back; ``rows`` stays, everything else is refused from now on."""
        self._sum = self._sum.new_empty(0)

    def matrix(self) -> Tensor:
        """H = X^T X / N as a new symmetric (C, C) float64 tensor; (C + 1, C + 1) with a bias.

        Raises LobsError if nothing has been seen, NonFiniteError if the sum overflowed.
        """
        self._check_whole()
        if not self._rows > 0:
            raise LobsError(
                "hessian: it has seen no rows (or only rows of weight 0); call update first"
            )
        mean = self._sum.to(torch.float64) / self._rows
        finite = True
        for first in range(0, len(mean), _PIECE):  # in place: one more copy may be gigabytes
            rows, rest = slice(first, first + _PIECE), slice(first + _PIECE, None)
            square = mean[rows, rows].tril()
            mean[rows, rows] = square + square.tril(-1).T
            mean[rows, rest] = mean[rest, rows].T
            finite = finite and bool(torch.isfinite(mean[rows]).all())
        if not finite:
            raise NonFiniteError(
                f"hessian: the sum overflowed {str(self.dtype).removeprefix('torch.')}; scale the "
                "inputs down, or use a wider sum"
            )
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as tensors that safetensors can save."""
        self._check_whole()
        return {
            "sum": self._sum.tril(),
            "rows": torch.tensor(self._rows, dtype=torch.float64),
            "bias": torch.tensor(self.bias),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Nothing changes if it does not fit."""
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
        """A Hessian that has seen ``rows`` rows with mean second moment ``H`` (C, C), symmetric. H
        is copied."""
        H = second_moment(H, "H")
        rows = checks.real(rows, "rows")
        if not 0 < rows < math.inf:
            raise ArgumentError(f"rows: {rows}; it must be positive and finite")
        made = cls(H.shape[0], device=H.device)
        made._sum = (H * rows).tril()
        made._rows = rows
        return made

    def _check_whole(self) -> None:
        if self._sum.numel() == 0:
            raise LobsError("hessian: its sum was released; start again with a new one")
        if not self._whole:
            raise LobsError(
                "hessian: an update was interrupted half-way; throw this one away and start again"
            )


class StreamingInverse:
    """The paper's recursion: the inverse of a second moment, kept up to date sample by sample.

    After n = ``rows`` samples it is exactly ``(I / alpha + X^T X / n)^-1``, a ridge inverse. With
    ``blocks`` > 1 only diagonal blocks are kept: fed with gradients, that is the empirical block
    Fisher inverse of WoodFisher and oBERT.

    Parameters
    ----------
    columns : int
        Width d of the samples.
    rows : float
        Number of samples the mean is taken over; constant, as in the authors' code.
    alpha : float
        Start: ``alpha * I``. The paper uses 1e4 to 1e8. oBERT's ``1 / damp``.
    blocks : int
        Number of diagonal blocks, each of B = ceil(columns / blocks) columns; the last may be
        padded.
    dtype : torch.float64 or torch.float32
        float32 halves memory and time; with alpha above 1e4 it loses the smaller entries.
    device : torch.device or str
        Where the inverse lives.

    Notes
    -----
    Source: Dong, Chen & Pan 2017, section 3.4.1 (with the denominator of their code).
    """

    def __init__(
        self,
        columns: int,
        *,
        rows: float,
        alpha: float = 1e6,
        blocks: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.columns = checks.positive_int(columns, "columns")
        self.blocks = checks.positive_int(blocks, "blocks")
        self.rows = checks.real(rows, "rows")
        self.alpha = checks.real(alpha, "alpha")
        for name, value in (("rows", self.rows), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise ArgumentError(f"{name}: {value}; it must be positive and finite")
        B = -(-self.columns // self.blocks)
        if (self.blocks - 1) * B >= self.columns:
            fits = -(-self.columns // B)
            raise ArgumentError(
                f"blocks: {self.blocks} blocks of {B} leave some empty; {fits} are enough"
            )
        if dtype not in (torch.float64, torch.float32):
            raise DtypeError(
                f"dtype: {dtype}; the inverse is kept in torch.float64 or torch.float32"
            )
        self._inverse = checks.zeros((self.blocks, B, B), dtype, device, "columns")
        self._inverse.diagonal(dim1=1, dim2=2).fill_(self.alpha)
        self._whole = True
        self.seen = 0
        self.backend: str | None = None

    def update(self, x: Any) -> StreamingInverse:
        """Take samples.

        Parameters
        ----------
        x : (columns,) or (r, columns), any float dtype
            Any number of samples at once; equals that many rank-1 updates. Not modified.

        Returns
        -------
        StreamingInverse
            Itself.

        Raises
        ------
        ShapeError, DtypeError
            x does not fit.
        NonFiniteError
            A NaN or an infinity in x; nothing changed.
        NotPositiveDefiniteError
            Rounding has cost the inverse its definiteness; the object refuses further use.
        """
        self._check_whole()
        x = checks.tensor(x, "x")
        if x.ndim not in (1, 2) or x.shape[-1] != self.columns:
            raise ShapeError(
                f"x: shape {tuple(x.shape)}, expected (r, {self.columns}) or ({self.columns},)"
            )
        if x.device != self._inverse.device:
            raise ShapeError(
                f"x is on {x.device} but this inverse is on {self._inverse.device}: move one "
                "of them"
            )
        g = x.reshape(-1, self.columns).to(self._inverse.dtype)  # (r, d)
        self._whole = False
        try:
            self.backend = ops.inverse_update_(self._inverse, g, self.rows)
        except NonFiniteError as error:
            self._whole = True  # refused before anything was written
            if error.flat is None:
                raise
            raise checks.not_finite("x", g, error.flat) from None
        self._whole = True
        self.seen += len(g)
        return self

    def inverse(self) -> Tensor:
        """A copy of the inverse: (C, C), or (blocks, B, B)."""
        self._check_whole()
        return self._inverse[0].clone() if self.blocks == 1 else self._inverse.clone()

    def _check_whole(self) -> None:
        if not self._whole:
            raise LobsError("inverse: an update was interrupted or failed half-way; start again")


def second_moment(H: Any, name: str) -> Tensor:
    """Check a (C, C) second moment given as a tensor and return it in float64, exactly symmetric;
    not to be written to, because it may be the tensor that was given.

    Both triangles must be finite and agree to 1e-4 of the largest entry; the diagonal must not be
    negative.
    """
    given = checks.tensor(H, name, ndim=2)
    if given.shape[0] != given.shape[1] or given.shape[0] == 0:
        raise ShapeError(f"{name}: shape {tuple(given.shape)}; it must be square and not empty")
    checks.check_finite(given, name)
    moment = given.to(torch.float64)
    pieces = range(0, len(moment), _PIECE)  # so that temporaries stay small
    apart = torch.tensor([_skew(moment, i).amax() for i in pieces])
    if float(apart.max()) > 1e-4 * max(float(moment.max()), -float(moment.min())):
        first = pieces[int(apart.argmax())]
        i, j = divmod(int(_skew(moment, first).argmax()), len(moment))
        i += first
        raise ArgumentError(
            f"{name}: not symmetric: {float(moment[i, j])} at ({i}, {j}) but "
            f"{float(moment[j, i])} at ({j}, {i}); pass both triangles"
        )
    negative = torch.nonzero(moment.diagonal() < 0)
    if len(negative):
        q = int(negative[0])
        raise NotPositiveDefiniteError(
            f"{name}: {float(moment[q, q])} at ({q}, {q}); a second moment has no negative diagonal"
        )
    if float(apart.max()) == 0:
        return moment.contiguous()
    return (moment + moment.T).div_(2).contiguous()


def _skew(moment: Tensor, first: int, rows: int = _PIECE) -> Tensor:
    """|M - M^T| for some rows of M."""
    return (moment[first : first + rows] - moment[:, first : first + rows].T).abs()


def few_rows(rows: float, columns: int) -> str:
    """The note for a second moment that cannot have full rank."""
    return (
        f"fewer rows ({rows:g}) than columns ({columns}): the damping decides along the unseen "
        f"directions"
    )
