"""``AblateGPT`` of wanda (``lib/ablate.py``): SparseGPT's repair for any mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.compat.sparsegpt import sweep as host_sweep
from lobs_native.compat.sparsegpt.collected import Collected
from lobs_native.errors import ArgumentError, ShapeError

__all__ = ["AblateGPT"]


class AblateGPT(Collected):
    """Prunes by a given mask, by magnitude or by Wanda's score, and repairs as SparseGPT does.

    See :class:`Collected`. ``scaler_row`` (C,) float32 is the host's statistic for Wanda's score: a
    sum of ``2 / n_k * |x|^2 / n_k`` over the batches k, where n_k samples have been seen with batch
    k, scaled by ``n_(k-1) / n_k`` at each. Later batches count less than earlier ones, as in the
    host.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.scaler_row = torch.zeros(self.columns, dtype=torch.float32, device=self.dev)

    @torch.no_grad()
    def add_batch(self, inp: Tensor, out: Any = None, blocksize: int = 1024) -> None:
        """Add a batch of the layer's inputs; see :meth:`Collected.add_batch`."""
        before = self.nsamples
        super().add_batch(inp, out, blocksize)
        self.scaler_row *= before / self.nsamples
        squares = self._layout.tokens(inp.detach()).float().square().sum(0)
        self.scaler_row += squares * (2 / self.nsamples**2)

    def get_wanda_mask(self, sparsity: float, prunen: int, prunem: int) -> Tensor:
        """(R, C) bool, True = removed: the lowest ``|w| sqrt(scaler_row)`` of each row.

        ``int(C * sparsity)`` of each row, or with prunen > 0, prunen of every prunem.
        """
        score = self._layout.matrix().abs() * self.scaler_row.sqrt()
        if prunen:
            return _in_groups(score, prunen, prunem)
        lowest = score.sort(dim=1, stable=True).indices[:, : int(self.columns * sparsity)]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)

    def get_mag_mask(self, sparsity: float, prunen: int, prunem: int) -> Tensor:
        """(R, C) bool, True = removed: the lowest ``|w|`` of the whole layer, with all ties, or
        with prunen > 0, prunen of every prunem."""
        score = self._layout.matrix().abs()
        if prunen:
            return _in_groups(score, prunen, prunem)
        host_sweep.check_target(sparsity)
        return host_sweep.by_threshold(score.float(), sparsity)

    @torch.no_grad()
    def fasterprune(
        self,
        args: Any,
        sparsity: float,
        mask: Tensor | None = None,
        prune_n: int = 0,
        prune_m: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
    ) -> None:
        """Prune the layer. This consumes ``H``.

        Parameters
        ----------
        args : object with ``prune_method``, a str
            Used without a mask: it contains ``"wanda"`` or ``"mag"``, the score by which weights
            are removed. Scores are computed from the weights as they are when the sweep arrives.
        mask : (R, C) bool, optional
            Exactly the weights where it is True are removed. Not modified.
        sparsity, prune_n, prune_m, blocksize, percdamp
            As in ``SparseGPT.fasterprune``. The first three are used only without a mask.

        Raises
        ------
        ArgumentError, PatternError, ShapeError
            An argument does not fit. Whichever error is raised, nothing is consumed or written.
        NotPositiveDefiniteError
            H cannot be inverted.
        NonFiniteError
            The weight has a NaN or an infinity, or a repaired weight overflowed the layer's dtype.
        """
        n = 0 if mask is not None else checks.count(prune_n, "prune_n")
        m = checks.count(prune_m, "prune_m")
        host_sweep.check_target(sparsity if mask is None else 0.0, n, m, blocksize, percdamp)
        if n:
            host_sweep.check_groups(self.columns, blocksize, n, m)
        choose = self._by_score(args, sparsity, n) if mask is None else _by_mask(mask, self)
        step = m if n else None
        _, _, pruned = self._by_host_rules(choose, (n, m), blocksize, percdamp, step=step)
        self._finish(pruned)

    def _by_score(self, args: Any, sparsity: float, n: int) -> host_sweep.Choose:
        method = str(getattr(args, "prune_method", ""))
        if "wanda" in method:
            scale = self.scaler_row.sqrt()
        elif "mag" in method:
            scale = torch.ones_like(self.scaler_row)
        else:
            raise ArgumentError(
                f"args.prune_method: {method!r} contains neither 'wanda' nor 'mag'; pass one of "
                "them, or a mask"
            )

        def choose(W: Tensor, columns: slice, _: Tensor) -> Tensor:
            score = W.abs() * scale[columns]
            if n:
                return host_sweep.lowest_in_row(score, n)
            return host_sweep.by_threshold(score, sparsity)

        return choose


def _by_mask(mask: Tensor, solver: AblateGPT) -> host_sweep.Choose:
    mask = checks.tensor(mask, "mask", ndim=2, dtypes=(torch.bool,))
    if mask.shape != (solver.rows, solver.columns) or mask.device != solver.dev:
        raise ShapeError(
            f"mask: {tuple(mask.shape)} on {mask.device}, but the weight is ({solver.rows}, "
            f"{solver.columns}) on {solver.dev}"
        )
    return lambda _, columns, __: mask[:, columns]


def _in_groups(score: Tensor, n: int, m: int) -> Tensor:
    """The n lowest of every m columns. The last group may be smaller."""
    host_sweep.check_groups(score.shape[1], score.shape[1], n, m)
    parts = [host_sweep.lowest_in_row(part, n) for part in score.float().split(m, dim=1)]
    return torch.cat(parts, 1)
