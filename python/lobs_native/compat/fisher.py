"""``EmpiricalBlockFisherInverse`` of oBERT (SparseML, CAP) by name and behaviour, many gradients
at a time.

The original goes through the whole inverse three times for every gradient. Here gradients are kept
until the inverse is looked at, or until there are as many as the buffer holds, and then applied in
one pass.
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

_MOST = 64  # gradients in the buffer; with more, the pass over the inverse no longer counts
_TILE = 16  # gradients that the kernels take together


class EmpiricalBlockFisherInverse:
    """Diagonal blocks of the inverse of ``damp * I + mean of g g^T``, gradient by gradient.

    Every gradient changes each block by ``F <- F - F g g^T F / (m + g^T F g)``, from
    ``F = I / damp``; after ``num_grads`` of them F is the inverse of the damped empirical Fisher
    matrix.

    Parameters
    ----------
    num_grads : int
        m, the number of gradients that the mean is taken over. More or fewer may be given.
    fisher_block_size : int
        B. The last block is filled up with weights whose gradients are zero.
    num_weights : int
        d.
    damp : float > 0
    device : torch.device or str
        Where the inverse lives.
    dtype : torch.float32 or torch.float64
        Of the inverse. The original's is float32, in which entries below ``1e-7 / damp`` are
        rounding errors.
    buffer : int, optional
        Gradients that may wait. By default at most 64, and not more than take half the memory of
        the inverse (but always one): B / 2, a multiple of 16 where it can be. 1 applies each
        gradient at once.
    backend : str, optional
        A name from ``lobs_native.backends()``.

    Attributes
    ----------
    f_inv, F_inv : (num_blocks, B, B)
        The inverse, up to date: reading it, or calling ``diag`` or ``mul``, applies what waits and
        gives the buffer back. May be written to, if it stays symmetric.
    m, B, d, damp, dev, num_blocks
        As given, and ceil(d / B).

    Raises
    ------
    ArgumentError, DtypeError, BackendError
        An argument does not fit.
    MemoryError
        There is no room for the inverse.

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
            raise DtypeError(f"dtype: {dtype}; the inverse is kept in float32 or float64")
        self.damp = checks.real(damp, "damp")
        largest = torch.finfo(dtype).max
        if not 1 / largest < self.damp < math.inf:
            raise ArgumentError(
                f"damp: {self.damp:g}; it must be positive, and 1 / damp fit {dtype}"
            )
        self.num_blocks = -(-self.d // self.B)
        shape = (self.num_blocks, self.B, self.B)
        self._inverse = checks.zeros(shape, dtype, device, "num_weights")
        self._inverse.diagonal(dim1=1, dim2=2).fill_(1 / self.damp)
        self.dev = device
        self._backend = ops.select_backend(backend, self._inverse.device)
        self._most = _rows_of(self.B) if buffer is None else checks.positive_int(buffer, "buffer")
        self._waiting: Tensor | None = None  # (self._most, d)
        self._count = 0
        self._whole = True

    def add_grad(self, g: Any) -> None:
        """Take one gradient.

        Parameters
        ----------
        g : d entries in any shape, any float dtype
            On the inverse's device. Copied, not modified. ``num_blocks * B`` entries are accepted
            where those past d are zero.

        Raises
        ------
        ShapeError, DtypeError
            It does not fit.
        NonFiniteError
            It holds a NaN or an infinity; nothing changed.
        NotPositiveDefiniteError
            Rounding has cost the inverse its definiteness; this object refuses further use.
        """
        self._check_whole()
        flat = self._vector(g, "g").to(self._inverse.dtype)
        if not math.isfinite(float(flat.sum())):  # a finite sum may overflow: look closely then
            checks.check_finite(flat, "g")
        if self._waiting is None:
            shape = (min(self._most, self.m), self.d)
            self._waiting = self._inverse.new_empty(shape)
        self._waiting[self._count] = flat
        self._count += 1
        if self._count == len(self._waiting):
            self._apply()

    def diag(self) -> Tensor:
        """(d,): the diagonal of the inverse, a copy."""
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.d]

    def mul(self, v: Any) -> Tensor:
        """(d,): the inverse times a vector of d entries in any shape, on the inverse's device.

        Raises ShapeError or DtypeError where it does not fit.
        """
        self._check_whole()
        flat = self._vector(v, "v").to(self._inverse.dtype)
        if missing := self.num_blocks * self.B - self.d:
            flat = torch.nn.functional.pad(flat, (0, missing))
        # Blocks are symmetric; as rows times matrices the product takes half the time.
        rows = flat.reshape(self.num_blocks, 1, self.B)
        with ops.full_precision():
            return torch.bmm(rows, self.f_inv).flatten()[: self.d]

    @property
    def f_inv(self) -> Tensor:
        """See the class."""
        self._check_whole()
        self._apply()
        self._waiting = None
        return self._inverse

    @property
    def F_inv(self) -> Tensor:
        """``f_inv`` as CAP and the oBERT tutorial spell it."""
        return self.f_inv

    def _apply(self) -> None:
        """Bring the inverse up to date and empty the buffer."""
        if not self._count:
            return
        assert self._waiting is not None
        self._whole = False
        try:
            ops.inverse_update_(
                self._inverse, self._waiting[: self._count], float(self.m), backend=self._backend
            )
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(
                f"damp: {self.damp:g}: {error} (alpha is 1 / damp)"
            ) from error
        self._whole = True
        self._count = 0

    def _vector(self, x: Any, name: str) -> Tensor:
        given = checks.tensor(x, name)
        if given.device != self._inverse.device:
            raise ShapeError(
                f"{name} is on {given.device} but the inverse is on {self._inverse.device}: move "
                "one of them"
            )
        padded = self.num_blocks * self.B
        if given.numel() not in (self.d, padded):
            raise ShapeError(f"{name}: {given.numel()} entries, expected {self.d}, one a weight")
        flat = given.reshape(-1)
        if bool(flat[self.d :].any()):
            raise ArgumentError(
                f"{name}: entries past the {self.d} weights are not zero; pass {name}[:{self.d}]"
            )
        return flat[: self.d]

    def _check_whole(self) -> None:
        if not self._whole:
            raise LobsError("f_inv: an update was interrupted or failed half-way; start again")


def _rows_of(B: int) -> int:
    """Gradients that take half as much memory as blocks of B."""
    rows = max(1, min(_MOST, B // 2))
    return rows - rows % _TILE if rows > _TILE else rows


# ---- under the hosts' own name -------------------------------------------------------------------


def _verify(call: Call) -> Compare | None:
    """Repeat a product or a diagonal with the host's own code on the same inverse."""
    ours: EmpiricalBlockFisherInverse = call.instance
    host = call.original(ours.m, 1, 1, ours.damp, ours.dev)  # and then the same inverse
    host.B, host.d, host.num_blocks = ours.B, ours.d, ours.num_blocks
    if call.method == "add_grad":
        return _verify_gradient(call, host)

    def compare(result: Any) -> Difference:
        host.f_inv = host.F_inv = ours.f_inv
        return _apart(result, getattr(host, call.method)(*call.args, **call.kwargs))

    return compare


def _verify_gradient(call: Call, host: Any) -> Compare:
    """One gradient more, by both, from the same inverse; reading it applies what waits."""
    ours: EmpiricalBlockFisherInverse = call.instance
    host.f_inv = host.F_inv = ours.f_inv.clone()

    def compare(_: Any) -> Difference:
        host.add_grad(*call.args, **call.kwargs)
        return _apart(ours.f_inv, host.f_inv)

    return compare


def _apart(ours: Tensor, theirs: Tensor) -> Difference:
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
