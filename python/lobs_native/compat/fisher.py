"""A drop-in replacement for ``EmpiricalBlockFisherInverse`` of oBERT (SparseML, CAP) that applies
many gradients at a time.

The original passes over the whole inverse three times for every gradient. Here gradients are
buffered until the inverse is read or the buffer is full, and then applied in one pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lobs_native import checks, ops
from lobs_native.compat.hosts import Call, Compare, Difference, Host, Replacement, Tolerance
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    LobsError,
    NotPositiveDefiniteError,
    ShapeError,
)

__all__ = ["HOST", "EmpiricalBlockFisherInverse"]

_MOST = 64  # gradients in the buffer; beyond it, the pass over the inverse costs next to nothing
_TILE = 16  # gradients that the kernels process together


class EmpiricalBlockFisherInverse:
    """Diagonal blocks of the inverse of ``damp * I + mean of g g^T``, updated by gradients.

    Each block starts as ``F = I / damp``, and each gradient changes it to
    ``F - F g g^T F / (m + g^T F g)``. After ``num_grads`` gradients, F is the inverse of the damped
    empirical Fisher matrix.

    Parameters
    ----------
    num_grads : int
        m, the divisor of the mean. More or fewer gradients may be added.
    fisher_block_size : int
        B. The last block is padded with weights whose gradients are zero.
    num_weights : int
        d.
    damp : float > 0
    device : torch.device or str
        The device of the inverse.
    dtype : torch.float32 or torch.float64
        The dtype of the inverse. The original's is float32, in which entries below ``1e-7 / damp``
        are rounding errors.
    buffer : int, optional
        The largest number of gradients that are buffered. By default at most 64 and at most B / 2,
        which take half the memory of the inverse, but at least one, and a multiple of 16 if
        possible. 1 applies each gradient at once.
    backend : str, optional
        A name from ``lobs_native.backends()``.

    Attributes
    ----------
    f_inv, F_inv : (num_blocks, B, B)
        The up-to-date inverse. Reading it, or calling ``diag`` or ``mul``, applies the buffered
        gradients and releases the buffer. It may be written to, as long as it stays symmetric.
    m, B, d, damp, dev, num_blocks
        The arguments, and ceil(d / B).

    Raises
    ------
    ArgumentError, DtypeError, BackendError
        An argument is invalid.
    MemoryError
        There is not enough memory for the inverse.

    Notes
    -----
    Source: Singh & Alistarh 2020 (WoodFisher), Kurtic et al. 2022 (oBERT); names and behaviour of
    the class in SparseML, ``modifier_pruning_obs.py``, commit 1c04a01 (Apache-2.0).
    """

    def __init__(
        self,
        num_grads: int,
        fisher_block_size: int,
        num_weights: int,
        damp: float,
        device: torch.device | str,
        *,
        dtype: torch.dtype = torch.float32,
        buffer: int | None = None,
        backend: str | None = None,
    ) -> None:
        self.m = checks.positive_int(num_grads, "num_grads")
        self.B = checks.positive_int(fisher_block_size, "fisher_block_size")
        self.d = checks.positive_int(num_weights, "num_weights")
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"dtype: {dtype}; the inverse must be float32 or float64")
        self.damp = checks.real(damp, "damp")
        largest = torch.finfo(dtype).max
        if not 1 / largest < self.damp < math.inf:
            raise ArgumentError(
                f"damp: {self.damp:g}; it must be positive, and 1 / damp must fit {dtype}"
            )
        self.num_blocks = -(-self.d // self.B)
        shape = (self.num_blocks, self.B, self.B)
        self._inverse = checks.zeros(shape, dtype, device, "num_weights")
        self._inverse.diagonal(dim1=1, dim2=2).fill_(1 / self.damp)
        self.dev = device
        self._backend = ops.select_backend(backend, self._inverse.device)
        self._most = _rows_of(self.B) if buffer is None else checks.positive_int(buffer, "buffer")
        self._buffer: Tensor | None = None  # (self._most, d)
        self._count = 0  # gradients in the buffer
        self._valid = True

    def add_grad(self, g: Any) -> None:
        """Add one gradient.

        Parameters
        ----------
        g : d entries in any shape, any float dtype
            On the inverse's device. Copied, not modified. ``num_blocks * B`` entries are accepted
            if those past d are zero.

        Raises
        ------
        ShapeError, DtypeError
            ``g`` does not fit.
        NonFiniteError
            ``g`` has a NaN or an infinity; nothing was changed.
        NotPositiveDefiniteError
            Rounding made the inverse indefinite; this object refuses further use.
        """
        self._check_valid()
        flat = self._vector(g, "g").to(self._inverse.dtype)
        if not math.isfinite(float(flat.sum())):  # the sum of finite entries may overflow
            checks.check_finite(flat, "g")
        if self._buffer is None:
            shape = (min(self._most, self.m), self.d)
            self._buffer = self._inverse.new_empty(shape)
        self._buffer[self._count] = flat
        self._count += 1
        if self._count == len(self._buffer):
            self._apply()

    def diag(self) -> Tensor:
        """The diagonal of the inverse (d,), a copy."""
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.d]

    def mul(self, v: Any) -> Tensor:
        """The inverse times a vector: (d,). ``v`` has d entries in any shape, on the inverse's
        device. Raises ShapeError or DtypeError if it does not fit."""
        self._check_valid()
        flat = self._vector(v, "v").to(self._inverse.dtype)
        if missing := self.num_blocks * self.B - self.d:
            flat = torch.nn.functional.pad(flat, (0, missing))
        # Blocks are symmetric, and rows times matrices take half the time.
        rows = flat.reshape(self.num_blocks, 1, self.B)
        with ops.full_precision():
            return torch.bmm(rows, self.f_inv).flatten()[: self.d]

    @property
    def f_inv(self) -> Tensor:
        """See the class."""
        self._check_valid()
        self._apply()
        self._buffer = None
        return self._inverse

    @property
    def F_inv(self) -> Tensor:
        """``f_inv`` in the spelling of CAP and the oBERT tutorial."""
        return self.f_inv

    def _apply(self) -> None:
        """Apply the gradients in the buffer and empty it."""
        if not self._count:
            return
        assert self._buffer is not None
        self._valid = False
        try:
            ops.inverse_update_(
                self._inverse, self._buffer[: self._count], float(self.m), backend=self._backend
            )
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(
                f"damp: {self.damp:g}: {error} (alpha is 1 / damp)"
            ) from error
        self._valid = True
        self._count = 0

    def _vector(self, x: Any, name: str) -> Tensor:
        checked = checks.tensor(x, name)
        checks.same_device(checked, name, self._inverse, "the inverse")
        padded = self.num_blocks * self.B
        if checked.numel() not in (self.d, padded):
            raise ShapeError(
                f"{name}: {checked.numel()} entries, expected {self.d}, one per weight"
            )
        flat = checked.reshape(-1)
        if bool(flat[self.d :].any()):
            raise ArgumentError(
                f"{name}: entries past the {self.d} weights are not zero; pass {name}[:{self.d}]"
            )
        return flat[: self.d]

    def _check_valid(self) -> None:
        if not self._valid:
            raise LobsError("f_inv: an update was interrupted or failed half-way; start again")


def _rows_of(B: int) -> int:
    """The number of gradients in a buffer half the size of the inverse."""
    rows = max(1, min(_MOST, B // 2))
    return rows - rows % _TILE if rows > _TILE else rows


# ---- the host ------------------------------------------------------------------------------------


def _verify(call: Call) -> Compare | None:
    """Repeat a product or a diagonal with the host's own code on the same inverse."""
    ours: EmpiricalBlockFisherInverse = call.instance
    host = call.original(ours.m, 1, 1, ours.damp, ours.dev)  # gets the same inverse below
    host.B, host.d, host.num_blocks = ours.B, ours.d, ours.num_blocks
    if call.method == "add_grad":
        return _verify_gradient(call, host)

    def compare(result: Any) -> Difference:
        host.f_inv = host.F_inv = ours.f_inv
        return _difference(result, getattr(host, call.method)(*call.args, **call.kwargs))

    return compare


def _verify_gradient(call: Call, host: Any) -> Compare:
    """Add one gradient with both, to the same inverse. Reading it applies the buffer."""
    ours: EmpiricalBlockFisherInverse = call.instance
    host.f_inv = host.F_inv = ours.f_inv.clone()

    def compare(_: Any) -> Difference:
        host.add_grad(*call.args, **call.kwargs)
        return _difference(ours.f_inv, host.f_inv)

    return compare


def _difference(ours: Tensor, theirs: Tensor) -> Difference:
    largest = float(theirs.abs().max())
    gap = float((ours - theirs).abs().max())
    return Difference(values=gap / largest if largest else gap, entries=theirs.numel())


HOST = Host(
    "fisher",
    (
        Replacement(
            modules=("sparseml.pytorch.sparsification.pruning.modifier_pruning_obs",),
            attribute="EmpiricalBlockFisherInverse",
            ours=EmpiricalBlockFisherInverse,
            signatures={
                "__init__": ("(self, num_grads, fisher_block_size, num_weights, damp, device)",),
                "add_grad": ("(self, g)",),
                "diag": ("(self)",),
                "mul": ("(self, v)",),
            },
            methods=("add_grad", "diag", "mul"),
            verify=_verify,
            tolerance=Tolerance(values=1e-3),
        ),
    ),
)
