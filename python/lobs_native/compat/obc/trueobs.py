"""``TrueOBS`` of OBC (Frantar, Singh & Alistarh 2022) by name and behaviour, on exact removal as a
pivoted Cholesky factorisation.

What is kept for a layer is the order in which its weights go and what each removal costs; weights
at any sparsity, and the snapshots that the original keeps after every removal, follow from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks, ops
from lobs_native.compat.obc.problem import layout_of, problem_of
from lobs_native.compat.obc.snapshots import Snapshots
from lobs_native.errors import (
    ArgumentError,
    LobsError,
    PatternError,
    ShapeError,
)
from lobs_native.layers.conv import Conv
from lobs_native.layers.linear import Linear
from lobs_native.solvers.exact import Greedy
from lobs_native.solvers.hessian import Hessian, second_moment
from lobs_native.solvers.patterns import Blocks, GroupsOf, Pattern, Unstructured, check_fit
from lobs_native.solvers.problem import Problem, nearest_count

__all__ = ["NUMERICS", "TrueOBS"]

NUMERICS = ("host", "ours")


class TrueOBS:
    """Exact Optimal Brain Surgeon for one layer.

    Parameters
    ----------
    layer : torch.nn.Linear, Conv1d, Conv2d or Conv3d
        Read when weights are asked for; only :meth:`nmprune` writes to it. Groups are allowed: each
        has a second moment of its own, and all of them share one budget.
    rel_damp : float >= 0
        Damping as a fraction of the mean diagonal of ``H``.
    numerics : "host" or "ours"
        ``"host"`` (the default) computes what OBC computes: ``H + I`` where the damped H is not
        positive definite (with a RuntimeWarning), ``ceil(share * count)`` removals, taken by their
        own costs. ``numerics`` may also be set on the class.
        ``"ours"`` computes what :func:`lobs_native.trace_weight` computes: 10 and 100 times the
        damping where Cholesky fails and an error after that, the nearest count, taken by the
        running maximum of a row's costs, so that what goes is always the cheapest prefix.
    backend : str, optional
        A name from ``lobs_native.backends()``. Default: the fastest on the layer's device.
    memory : int, optional
        Bytes of scratch for the kernels at most.

    Attributes
    ----------
    H : (C, C) float64, or (groups, C, C)
        ``2 / nsamples`` times the sum of ``x x^T``, on the layer's device. It may be written to and
        assigned.
    nsamples : int
        Length of the first dimension of all inputs together (images or sequences, not rows).
    rows, columns : int
        Shape of the weight as a matrix.
    dev : torch.device
    Losses : (rows, K + 1) float32, after a ``prepare_`` method
        Half of what the k-th removal of a row adds to ``tr(dW H dW^T)``; column 0 is zero. K is the
        number of columns or blocks.
    Traces : sequence of (K + 1, n, columns) float32 on the CPU, n <= parallel
        Weights after 0 to K removals for n rows, made when it is indexed. Not to be written to.
    errors : list of float
        What the last pruning lost, one for each sparsity: half of ``tr(dW H dW^T)`` with the damped
        H (after :meth:`nmprune` with ``"ours"``, without damping). The original prints it.
    notes : list of str
        What was done differently from what was asked.

    Raises
    ------
    DtypeError, ArgumentError
        The layer is of another type or cannot be written to, or an argument does not fit.

    Notes
    -----
    Zero weights go first and stay zero. Removals are computed in float32 where the condition number
    of the damped H is at most 1e5 (with ``"ours"``, where the damping is at least 1e-4), and in
    float64 elsewhere.

    Where the original goes wrong, this does not follow it: weights on inputs that were always zero
    are removed with damping as well; a group of :meth:`nmprune` that has more than ``n`` zeros
    keeps them; groups, padding modes and named padding of convolutions, float16 inputs and inputs
    of any number of dimensions are taken as the layer takes them; without any inputs, and after
    :meth:`free`, pruning is an error; equal costs go by place.

    Source: Frantar, Singh & Alistarh 2022 (ExactOBS); the class of this name in IST-DASLab/OBC,
    commit 9b7979b, of which nothing was copied.
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
        self.layer = layer
        self._layout = layout_of(layer)
        weight = self._layout.weight()  # (G, R, C)
        self.dev = weight.device
        self._groups, R, self.columns = weight.shape
        self.rows = self._groups * R
        self._backend = ops.select_backend(backend, self.dev)
        self._memory = None if memory is None else checks.positive_int(memory, "memory")
        # Columns of the original, one input channel after another, as columns of the layout, whose
        # channels stand next to each other; and the way back.
        places = torch.arange(self.columns, device=self.dev)
        channels = self._layout.neighbours
        self._back = places.reshape(-1, channels).T.reshape(-1)
        self._perm = places.reshape(channels, -1).T.reshape(-1)
        shape = (self.columns, self.columns)
        self._H: Tensor | None = checks.zeros(
            shape if self._groups == 1 else (self._groups, *shape),
            torch.float64,
            self.dev,
            "layer",
        )
        self.nsamples = 0
        self._new: list[Hessian] = []  # what has been seen since H was last looked at
        self._new_samples = 0
        self._given = False
        self._greedy: Greedy | None = None
        self._ordered = False  # columns as in the original, not as in the layout
        self.Losses: Tensor | None = None
        self.Traces: Snapshots | None = None
        self.quantizer: Any = None  # for OBC's own quantize
        self.errors: list[float] = []
        self.notes: list[str] = []

    @staticmethod
    def check_options(numerics: Any = "host") -> None:
        """ArgumentError for numerics that there are not."""
        if numerics not in NUMERICS:
            raise ArgumentError(f"numerics: {numerics!r}; use one of {', '.join(NUMERICS)}")

    # ---- inputs ----------------------------------------------------------------------------------

    def add_batch(self, inp: Any, out: Any = None) -> None:
        """Take what the layer was called with.

        Parameters
        ----------
        inp : (B, ..., C) for a Linear, (B, C_in, *sizes) for a convolution; any float dtype
            On the layer's device. Not modified.
        out : ignored

        Raises
        ------
        ShapeError, DtypeError
            The input does not fit.
        NonFiniteError
            It holds a NaN or an infinity; nothing was taken.
        """
        self._current()
        x = checks.tensor(inp, "inp")
        if x.device != self.dev:
            raise ShapeError(f"inp is on {x.device} but the layer is on {self.dev}: move one")
        if isinstance(self._layout, Linear) and (x.ndim < 2 or x.shape[-1] != self.columns):
            raise ShapeError(f"inp: {tuple(x.shape)}, expected (B, ..., {self.columns})")
        checks.check_finite(x, "inp")
        convolution = isinstance(self._layout, Conv)
        batched = not convolution or x.ndim == len(self._layout.shape)
        samples = x.shape[0] if batched else 1
        if not self._new:
            self._new = [Hessian(self.columns, device=self.dev) for _ in range(self._groups)]
        if x.numel():
            for g, columns in self._layout.columns(x):
                self._new[g].update(columns)
        self.nsamples += samples
        self._new_samples += samples

    @property
    def H(self) -> Tensor | None:
        """See the class; None after :meth:`free`."""
        if self._H is not None and self._new:
            old = self.nsamples - self._new_samples
            self._H *= old / max(1, self.nsamples)
            for H, seen in zip(self._H.view(-1, *self._H.shape[-2:]), self._new, strict=True):
                if seen.rows:
                    total = seen.matrix().mul_(seen.rows * 2 / self.nsamples)
                    H += total[self._back][:, self._back]
            self._new, self._new_samples = [], 0
        return self._H

    @H.setter
    def H(self, value: Any) -> None:
        shape = (self.columns, self.columns)
        wanted = shape if self._groups == 1 else (self._groups, *shape)
        given = checks.tensor(value, "H")
        if given.shape != wanted or given.device != self.dev:
            raise ShapeError(
                f"H: {tuple(given.shape)} on {given.device}, expected {wanted} on {self.dev}"
            )
        self._new, self._new_samples = [], 0
        self._H = given.to(torch.float64)
        self._given = True

    # ---- single weights and blocks ---------------------------------------------------------------

    def prepare_unstr(self, parallel: int = 32) -> None:
        """Remove the weights of every row one by one, to the end, and keep order and costs.

        Parameters
        ----------
        parallel : int
            Rows in one entry of ``Traces``; costs nothing.

        Raises
        ------
        LobsError
            No inputs were given, or :meth:`free` was called.
        NotPositiveDefiniteError
            The second moment cannot be inverted; raise ``rel_damp``.
        """
        self._trace(Unstructured(), parallel)

    def prepare_blocked(self, size: int = 4, parallel: int = 32) -> None:
        """The same for blocks of ``size`` neighbouring inputs (channels at one kernel position).

        Zeros in a block that is not wholly zero may be repaired to something else, as in the
        original. Otherwise like :meth:`prepare_unstr`; raises PatternError where blocks do not
        divide the columns.
        """
        self._trace(Blocks(checks.positive_int(size, "size")), parallel)

    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """The layer at several sparsities, from one :meth:`prepare_unstr`.

        Parameters
        ----------
        sparsities : sequence of float in [0, 1]
            Shares of the layer's weights (blocks) that go.

        Returns
        -------
        list of (rows, columns) float32
            On the layer's device; the layer is not written to. The cheapest removals of the whole
            layer, as ``Losses`` has them; the lowest place goes first among equals.

        Raises
        ------
        ArgumentError
            A sparsity is not in [0, 1].
        LobsError
            No ``prepare_`` method was called before.
        """
        return self._pruned(sparsities)

    def prune_blocked(self, sparsities: Sequence[float]) -> list[Tensor]:
        """:meth:`prune_unstr` after :meth:`prepare_blocked`."""
        return self._pruned(sparsities)

    @ops.full_precision()
    def _pruned(self, sparsities: Sequence[float]) -> list[Tensor]:
        greedy = self._greedy
        if greedy is None or self.Losses is None:
            raise LobsError("sparsities: call prepare_unstr or prepare_blocked first")
        shares = [checks.real(s, "sparsities") for s in sparsities]
        for share in shares:
            if not 0 <= share <= 1:
                raise ArgumentError(f"sparsities: {share:g}; they are fractions from 0 to 1")
        costs = self.Losses[:, 1:].cpu().to(torch.float64)
        upto = self.Losses.cpu().to(torch.float64).cumsum(1)
        self.errors, weights = [], []
        for share in shares:
            counts = self._counts(greedy, costs, share)  # (rows,)
            gone = greedy.cut(counts * greedy.unit)
            after = greedy.problem.best(gone).reshape(self.rows, -1)
            weights.append(self._in_order(after).to(torch.float32))
            self.errors.append(float(upto.gather(1, counts[:, None]).sum()))
        self._tell(greedy.problem)
        return weights

    def _counts(self, greedy: Greedy, costs: Tensor, share: float) -> Tensor:
        """Removals of each row."""
        if self.numerics == "ours":
            ranked, count = greedy.ceilings(), nearest_count(share, costs.numel())
        else:
            ranked, count = costs, min(costs.numel(), math.ceil(costs.numel() * share))
        backend = "reference" if self._backend == "reference" else "cpu"
        chosen = ops.rank_lowest(ranked.reshape(1, -1), count, backend=backend)[0]
        return chosen.view_as(ranked).sum(1)

    # ---- groups ----------------------------------------------------------------------------------

    def nmprune(self, n: int = 2, m: int = 4, parallel: int = 32) -> None:
        """Remove ``n`` of every ``m`` neighbouring inputs, and write the weights into the layer.

        Neighbours are input channels at one kernel position. Weights keep their dtype and memory.

        Parameters
        ----------
        n : int, 0 <= n <= m
            Zeros, not kept weights. A group that has more of them keeps them.
        m : int
        parallel : int
            Ignored; results do not depend on it.

        Raises
        ------
        PatternError
            The pattern does not exist or does not divide the columns.
        LobsError, NotPositiveDefiniteError
            As :meth:`prepare_unstr`. The layer is unchanged.
        """
        m = checks.positive_int(m, "m")
        n = checks.count(n, "n")
        checks.positive_int(parallel, "parallel")
        if n > m:
            raise PatternError(f"n: {n} of {m} weights cannot be zero; n counts zeros, 0 to m")
        self._write_groups(GroupsOf(m - n, m))

    @ops.full_precision()
    def _write_groups(self, pattern: GroupsOf) -> None:
        check_fit(pattern, self.columns, None, False)
        problem = self._problem(pattern)
        greedy = Greedy(problem, pattern)
        gone, after = greedy.prune(greedy.sparsity, "layer")
        if not bool(gone.any()):
            after = problem.before
        weight, _ = problem.rounded(after)
        self.errors = [problem.error(weight, None) / 2]
        self._layout.write_back(weight, None)
        self._tell(problem)

    # ---- the rest --------------------------------------------------------------------------------

    def quantize(self, parallel: int = 32) -> None:
        """Done by OBC's own class, where ``lobs_native.compat.patch`` has put this one into its
        place; LobsError elsewhere, which says how to have it done."""
        host_class = getattr(self, "_lobs_native_replaces", None)  # set by compat.patching
        if host_class is not None:
            host = host_class(self.layer, rel_damp=self.rel_damp)
            host.H, host.nsamples, host.quantizer = self.H, self.nsamples, self.quantizer
            host.quantize(parallel)
            return
        raise LobsError(
            "quantize: this package prunes and does not quantise. Use OBC's class for it: "
            "host = trueobs.TrueOBS(obs.layer, obs.rel_damp); host.H, host.nsamples = obs.H, "
            "obs.nsamples; host.quantizer = quantizer; host.quantize()"
        )

    def free(self) -> None:
        """Give all memory back; only the layer's description stays."""
        self._H = None
        self._new, self._greedy = [], None
        self.Losses = self.Traces = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    def _current(self) -> Tensor:
        if self._H is None:
            raise LobsError("H: free() was called; make a new TrueOBS for this layer")
        return self._H

    @ops.full_precision()
    def _trace(self, pattern: Pattern, parallel: int) -> None:
        parallel = checks.positive_int(parallel, "parallel")
        check_fit(pattern, self.columns, None, False)
        problem = self._problem(pattern)
        greedy = Greedy(problem, pattern)
        rows = greedy.trace_all(self.columns)
        cost = rows.loss.to(torch.float64) * greedy.row_scale * (greedy.unit_cost() / 2)
        units = cost.reshape(self.rows, -1, greedy.unit).sum(2)
        self.Losses = nn.functional.pad(units, (1, 0)).to(self.dev, torch.float32)
        self._greedy, self._ordered = greedy, isinstance(pattern, Unstructured)
        self.Traces = Snapshots(greedy, parallel, None if self._ordered else self._back)
        self._tell(problem)

    def _in_order(self, weight: Tensor) -> Tensor:
        """(rows, columns) with the original's order of columns."""
        return weight if self._ordered else weight[:, self._back]

    def _problem(self, pattern: Pattern) -> Problem:
        """The layer as it is now, with columns as in the original, or as in the layout where it
        matters which are neighbours."""
        self._current()
        H = self.H
        assert H is not None
        if self.nsamples == 0 and not self._given and not bool(H.any()):
            raise LobsError("H: it has seen no inputs; call add_batch first")
        weight = self._layout.weight()
        moments = [second_moment(one, "H") for one in H.view(-1, *H.shape[-2:])]
        if isinstance(pattern, Unstructured):
            weight = weight[:, :, self._back]
            moments = [one.clone() for one in moments]
        else:
            moments = [one[self._perm][:, self._perm] for one in moments]
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

    def _tell(self, problem: Problem) -> None:
        self.notes += [said for said in problem.said if said not in self.notes]
        if problem.widened:
            self.notes.append(f"{len(problem.widened)} rows were redone in float64")
