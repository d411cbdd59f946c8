"""A drop-in replacement for ``TrueOBS`` of OBC (Frantar, Singh & Alistarh 2022), with exact removal
as a pivoted Cholesky factorisation.

It stores the order of removal of a layer's weights and the cost of each removal. The weights at any
sparsity, and the snapshots that the original stores after every removal, are computed from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks, ops
from lobs_native.compat.obc.collected import Collected
from lobs_native.compat.obc.problem import problem_of
from lobs_native.compat.obc.snapshots import Snapshots
from lobs_native.errors import (
    ArgumentError,
    LobsError,
    PatternError,
)
from lobs_native.solvers.exact import Exact
from lobs_native.solvers.hessian import second_moment
from lobs_native.solvers.measurement import error
from lobs_native.solvers.patterns import Blocks, GroupsOf, Pattern, Unstructured
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.pruning import repaired
from lobs_native.solvers.removals import Removals
from lobs_native.solvers.repair import repair

__all__ = ["NUMERICS", "TrueOBS"]

NUMERICS = ("host", "ours")


class TrueOBS(Collected):
    """Exact Optimal Brain Surgeon for one layer.

    Parameters
    ----------
    layer : torch.nn.Linear, Conv1d, Conv2d or Conv3d
        Its weight is read when it is needed; only :meth:`nmprune` writes to it. A layer may have
        groups: each has its own second moment, and all share one budget.
    rel_damp : float >= 0
        Damping as a fraction of the mean diagonal of ``H``.
    numerics : "host" or "ours"
        ``"host"`` (the default) computes what OBC computes: ``H + I`` if the damped H is not
        positive definite (with a RuntimeWarning), and ``ceil(share * count)`` removals, ranked by
        their own costs. ``numerics`` may also be set on the class.
        ``"ours"`` computes what :func:`lobs_native.trace_weight` computes: 10 and 100 times the
        damping if Cholesky fails, then an error; and the nearest count, ranked by the running
        maximum of a row's costs, so that the removals are always the cheapest prefix.
    backend : str, optional
        A name from ``lobs_native.backends()``. Default: the fastest on the layer's device.
    memory : int, optional
        The largest number of bytes of scratch memory for the kernels.

    Attributes
    ----------
    H : (C, C) float64, or (groups, C, C)
        ``2 / nsamples`` times the sum of ``x x^T``, on the layer's device. It may be written to and
        assigned.
    nsamples : int
        The total length of the first dimension of all inputs (images or sequences, not rows).
    rows, columns : int
        The shape of the weight as a matrix.
    dev : torch.device
    Losses : (rows, K + 1) float32, after a ``prepare_`` method
        Half of what the k-th removal of a row adds to ``tr(dW H dW^T)``; column 0 is zero. K is the
        number of columns or blocks.
    Traces : sequence of (K + 1, n, columns) float32 on the CPU, n <= parallel
        The weights of n rows after 0 to K removals, computed on access. Do not write to them.
    errors : list of float
        The errors of the last pruning, one for each sparsity: half of ``tr(dW H dW^T)`` with the
        damped H (after :meth:`nmprune` with ``"ours"``, without damping). The original prints it.
    notes : list of str
        Deviations from what was asked for.

    Raises
    ------
    DtypeError, ArgumentError
        The layer has another type or cannot be written to, or an argument is invalid.

    Notes
    -----
    Zero weights are removed first and stay zero. Removals are computed in float32 if the condition
    number of the damped H is at most 1e5 (with ``"ours"``, if the damping is at least 1e-4), and
    otherwise in float64.

    It does not reproduce the original's faults. Weights on inputs that were always zero are removed
    even with damping; a group of :meth:`nmprune` with more than ``n`` zeros keeps them; groups,
    padding modes and named padding of convolutions, float16 inputs and inputs of any number of
    dimensions are handled as the layer does; pruning without inputs or after :meth:`free` is an
    error; equal costs are ranked by position.

    Source: Frantar, Singh & Alistarh 2022 (ExactOBS); the class of this name in IST-DASLab/OBC,
    commit 9b7979b, from which no code was copied.
    """

    OPTIONS = ("numerics",)
    numerics = "host"

    def __init__(
        self,
        layer: nn.Module,
        rel_damp: float = 0,
        *,
        numerics: str | None = None,
        backend: str | None = None,
        memory: int | None = None,
    ) -> None:
        if numerics is not None:
            self.numerics = numerics
        self.check_options(self.numerics)
        self.rel_damp = checks.real(rel_damp, "rel_damp")
        if not 0 <= self.rel_damp < math.inf:
            raise ArgumentError(f"rel_damp: {self.rel_damp:g}; it must be >= 0 and finite")
        super().__init__(layer)
        self._backend = ops.select_backend(backend, self.dev)
        self._memory = None if memory is None else checks.positive_int(memory, "memory")
        self._removals: Removals | None = None
        self._original_order = False  # whether the trace has OBC's order of columns
        self.Losses: Tensor | None = None
        self.Traces: Snapshots | None = None
        self.quantizer: Any = None  # used by OBC's own quantize
        self.errors: list[float] = []
        self.notes: list[str] = []

    @staticmethod
    def check_options(numerics: Any = "host") -> None:
        """Raise ArgumentError for unknown numerics."""
        if numerics not in NUMERICS:
            raise ArgumentError(f"numerics: {numerics!r}; use one of {', '.join(NUMERICS)}")

    # ---- single weights and blocks ---------------------------------------------------------------

    def prepare_unstr(self, parallel: int = 32) -> None:
        """Remove all weights of every row one by one, and store the order and the costs.

        Parameters
        ----------
        parallel : int
            The number of rows in an entry of ``Traces``. It does not affect the cost.

        Raises
        ------
        LobsError
            No inputs were added, or :meth:`free` was called.
        NotPositiveDefiniteError
            The second moment cannot be inverted; raise ``rel_damp``.
        """
        self._trace(Unstructured(), parallel)

    def prepare_blocked(self, size: int = 4, parallel: int = 32) -> None:
        """:meth:`prepare_unstr` for blocks of ``size`` neighbouring inputs (channels at one kernel
        position).

        Zeros in a block with other weights may be repaired to nonzero values, as in the original.
        Raises PatternError if ``size`` does not divide the columns.
        """
        self._trace(Blocks(checks.positive_int(size, "size")), parallel)

    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """The layer at several sparsities, from one :meth:`prepare_unstr`.

        Parameters
        ----------
        sparsities : sequence of float in [0, 1]
            The fractions of the layer's weights (or blocks) to remove.

        Returns
        -------
        list of (rows, columns) float32
            On the layer's device; the layer is not written to. The removals are the cheapest of the
            whole layer according to ``Losses``; among equals, the lowest position is first.

        Raises
        ------
        ArgumentError
            A sparsity is not in [0, 1].
        LobsError
            No ``prepare_`` method has been called.
        """
        return self._pruned(sparsities)

    def prune_blocked(self, sparsities: Sequence[float]) -> list[Tensor]:
        """:meth:`prune_unstr` after :meth:`prepare_blocked`."""
        return self._pruned(sparsities)

    @ops.full_precision()
    def _pruned(self, sparsities: Sequence[float]) -> list[Tensor]:
        removals = self._removals
        if removals is None or self.Losses is None:
            raise LobsError("sparsities: call prepare_unstr or prepare_blocked first")
        shares = [checks.real(s, "sparsities") for s in sparsities]
        for share in shares:
            if not 0 <= share <= 1:
                raise ArgumentError(f"sparsities: {share:g}; they are fractions from 0 to 1")
        costs = self.Losses[:, 1:].cpu().to(torch.float64)
        upto = self.Losses.cpu().to(torch.float64).cumsum(1)
        self.errors, weights = [], []
        for share in shares:
            counts = self._counts(removals, costs, share)  # (rows,)
            removed = removals.cut(counts * removals.pattern.unit)
            after = repair(removals.problem, removed).reshape(self.rows, -1)
            weights.append(self._in_original_order(after).to(torch.float32))
            self.errors.append(float(upto.gather(1, counts[:, None]).sum()))
        self._add_notes(removals.problem)
        return weights

    def _counts(self, removals: Removals, costs: Tensor, share: float) -> Tensor:
        """The number of removals of each row (rows,)."""
        if self.numerics == "ours":
            ranked, count = removals.ceilings(), nearest_count(share, costs.numel())
        else:
            ranked, count = costs, min(costs.numel(), math.ceil(costs.numel() * share))
        backend = "reference" if self._backend == "reference" else "cpu"
        chosen = ops.rank_lowest(ranked.reshape(1, -1), count, backend=backend)[0]
        return chosen.view_as(ranked).sum(1)

    # ---- groups ----------------------------------------------------------------------------------

    def nmprune(self, n: int = 2, m: int = 4, parallel: int = 32) -> None:
        """Remove ``n`` of every ``m`` neighbouring inputs, and write the weights into the layer.

        Neighbours are input channels at one kernel position. The weight tensor keeps its dtype and
        its memory.

        Parameters
        ----------
        n : int, 0 <= n <= m
            The number of zeros, not of kept weights. A group with more zeros keeps them.
        m : int
        parallel : int
            Ignored; results do not depend on it.

        Raises
        ------
        PatternError
            The pattern does not exist, or does not divide the columns.
        LobsError, NotPositiveDefiniteError
            As in :meth:`prepare_unstr`. The layer is unchanged.
        """
        m = checks.positive_int(m, "m")
        n = checks.count(n, "n")
        checks.positive_int(parallel, "parallel")
        if n > m:
            raise PatternError(f"n: {n} of {m} weights cannot be zero; n counts zeros, 0 to m")
        self._write_groups(GroupsOf(m - n, m))

    @ops.full_precision()
    def _write_groups(self, pattern: GroupsOf) -> None:
        pattern.check_fit(self.columns, None, prune_bias=False)
        problem = self._problem(pattern)
        removed, after = repaired(
            problem, Exact(problem, pattern).choose(pattern.sparsity, "layer")
        )
        if not bool(removed.any()):
            after = problem.before
        weight, _ = problem.rounded(after)
        self.errors = [error(problem, weight, None) / 2]
        self._layout.write_back(weight, None)
        self._add_notes(problem)

    # ---- the rest --------------------------------------------------------------------------------

    def quantize(self, parallel: int = 32) -> None:
        """Quantise with OBC's own class, if this one replaces it in ``lobs_native.compat.patch``.
        Otherwise raises LobsError, which tells how to call OBC's class."""
        host_class = getattr(self, "_lobs_native_replaces", None)  # set by compat.patching
        if host_class is not None:
            host = host_class(self.layer, rel_damp=self.rel_damp)
            host.H, host.nsamples, host.quantizer = self.H, self.nsamples, self.quantizer
            host.quantize(parallel)
            return
        raise LobsError(
            "quantize: this package does not quantise. Use OBC's class: "
            "host = trueobs.TrueOBS(obs.layer, obs.rel_damp); host.H, host.nsamples = obs.H, "
            "obs.nsamples; host.quantizer = quantizer; host.quantize()"
        )

    def free(self) -> None:
        """Release all memory except the layer's description."""
        self._H = None
        self._pending, self._removals = [], None
        self.Losses = self.Traces = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    @ops.full_precision()
    def _trace(self, pattern: Pattern, parallel: int) -> None:
        parallel = checks.positive_int(parallel, "parallel")
        pattern.check_fit(self.columns, None, prune_bias=False)
        problem = self._problem(pattern)
        removals = Removals(problem, pattern)
        removals.trace_all(self.columns)
        cost = removals.loss.to(torch.float64) * removals.row_scale * (removals.unit_cost() / 2)
        units = cost.reshape(self.rows, -1, pattern.unit).sum(2)
        self.Losses = nn.functional.pad(units, (1, 0)).to(self.dev, torch.float32)
        self._removals, self._original_order = removals, pattern.is_unstructured
        columns = None if self._original_order else self._to_layout
        self.Traces = Snapshots(removals, parallel, columns)
        self._add_notes(problem)

    def _in_original_order(self, weight: Tensor) -> Tensor:
        """(rows, columns) with OBC's order of columns."""
        return weight if self._original_order else weight[:, self._to_layout]

    def _problem(self, pattern: Pattern) -> Problem:
        """The problem for the present weight. Columns are in OBC's order, or in the layout's if
        the pattern needs to know neighbours."""
        H = self._existing_H()
        weight = self._layout.weight()
        moments = [second_moment(one, "H") for one in H.view(-1, *H.shape[-2:])]
        if pattern.is_unstructured:
            weight = weight[:, :, self._to_layout]
            moments = [one.clone() for one in moments]
        else:
            moments = [one[self._to_original][:, self._to_original] for one in moments]
        problem, self.notes = problem_of(
            weight,
            moments,
            pattern,
            rel_damp=self.rel_damp,
            as_host=self.numerics == "host",
            backend=self._backend,
            memory=self._memory,
        )
        return problem

    def _add_notes(self, problem: Problem) -> None:
        self.notes += [note for note in problem.workspace.notes if note not in self.notes]
        if problem.workspace.widened:
            self.notes.append(f"{len(problem.workspace.widened)} rows were recomputed in float64")
