"""The inverse of a second moment, kept up to date sample by sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.errors import ArgumentError, DtypeError, LobsError, NonFiniteError, ShapeError

__all__ = ["StreamingInverse"]


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
        Number of samples that the mean is over; constant, as in the authors' code.
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
        """Add samples.

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
            Rounding made the inverse indefinite; the object refuses further use.
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
            raise LobsError("inverse: an update was interrupted or failed halfway; start again")
