"""``SparseGPT`` of the published program of that name, and of the programs that carry a copy of it.

The names, the arguments, the printed lines and the numerics are the host's (github.com/IST-DASLab/
sparsegpt at 147d215; github.com/locuslab/wanda at 8e8fc87, ``lib/sparsegpt.py``); the work is done
by our kernels. Also on machines without CUDA, where the host's own class ends in an error.

Different on purpose: convolutions get their patches (the host's ``add_batch`` fails on images);
inputs that are not finite, weights that outgrow their dtype and second moments that cannot be
inverted are errors before anything is written; the weight of a transformers Conv1D stays
contiguous, so that it can be saved.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks, ops
from lobs_native.compat import host_sweep
from lobs_native.compat.hosts import Call, Compare, Difference, Host, Replacement
from lobs_native.compat.layout import Layout
from lobs_native.errors import ArgumentError, NonFiniteError
from lobs_native.hessian import Hessian
from lobs_native.weight import prune_weight

__all__ = ["HOST", "SparseGPT", "SparseGPTOfWanda"]

_NUMERICS = ("host", "ours")
_METHODS = ("exact", "sweep")


class SparseGPT:
    """Prunes one layer by the second moment of its inputs.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
        float32, float16, bfloat16 or float64, on any device. Its weight is replaced by
        ``fasterprune``; nothing else is modified.

    Attributes
    ----------
    H : (C, C) float32
        ``2 / nsamples * sum(x x^T)``, as the host scales it. Reading it gives the tensor that is
        worked on; it may be changed or replaced. Gone after ``fasterprune``.
    nsamples : int
        Sequences or images seen, not tokens.
    rows, columns : int
        Of the weight as a matrix (R, C).
    quantizer : optional
        Set by the caller, with the host's interface (``ready``, ``find_params``, ``scale``,
        ``zero``, ``maxq``): kept weights are quantised in the same sweep, in plain torch, not
        faster than the host.
    numerics : str
        ``"host"``: the host's rules, whose masks and weights these are (see ``host_sweep``).
        ``"ours"``: those of ``lobs_native.prune_weight``: exact counts, float64 inverse, error
        measured on the final weights. For all: ``SparseGPT.numerics = "ours"``, or
        ``patch("sparsegpt", numerics="ours")``.
    method : str
        With ``numerics="ours"``: ``"exact"`` or ``"sweep"``.
    result : PrunedWeight or None
        With ``numerics="ours"``: what ``prune_weight`` returned, notes included.
    """

    OPTIONS = ("numerics", "method")
    numerics = "host"
    method = "exact"
    prints = True  # the host's two lines; wanda's copy prints nothing
    quantizer: Any

    def __init__(self, layer: nn.Module) -> None:
        self._layout = Layout(layer)
        self.layer = layer
        self.dev = self._layout.matrix().device
        self.rows, self.columns = self._layout.rows, self._layout.columns
        self.nsamples = 0
        self.result: Any = None
        # Either what the host calls H, or the lower triangle of sum(x x^T), which takes a chunk
        # without a pass over the whole matrix.
        self._moment: Tensor | None = torch.zeros(self.columns, self.columns, device=self.dev)
        self._is_sum = True
        self._summed = 0  # nsamples when the sum was last touched

    # ---- the second moment ---------------------------------------------------------------------

    @property
    def H(self) -> Tensor | None:
        """See the class. None after ``free``."""
        if not hasattr(self, "_moment"):
            raise AttributeError("H: used up by fasterprune, as in the host; collect it anew")
        if self._moment is not None and self._is_sum:
            self._moment = _mirrored_(self._moment.mul_(2 / max(1, self._summed)))
            self._is_sum = False
        return self._moment

    @H.setter
    def H(self, value: Tensor | None) -> None:
        self._moment = value
        self._is_sum = False

    @H.deleter
    def H(self) -> None:
        del self._moment

    def peek(self) -> Tensor:
        """A copy of ``H``; leaves everything as it is, to the last bit."""
        held = self._collected()
        if not self._is_sum:
            return held.clone()
        return _mirrored_(held * (2 / max(1, self._summed)))

    def _collected(self) -> Tensor:
        held: Tensor | None = getattr(self, "_moment", None)
        if held is None:
            raise ArgumentError("H: used up by fasterprune or free; make a new object")
        return held

    @torch.no_grad()
    def add_batch(self, inp: Tensor, out: Any = None, blocksize: int = 1024) -> None:
        """Add a batch of the layer's inputs.

        Parameters
        ----------
        inp : (B, T, C), (T, C) or (..., C); for Conv2d (B, C_in, h, w) or (C_in, h, w)
            float16, bfloat16, float32 or float64, on the layer's device; not modified. Counts as B
            samples, or as one.
        out, blocksize
            Not used, as in the host.

        Raises
        ------
        NonFiniteError
            ``inp`` holds a NaN or an infinity; ``H`` is as it was.
        """
        held = self._collected()
        tokens = self._layout.tokens(inp.detach())
        samples = self._layout.samples(inp)
        if self._is_sum and self._summed != self.nsamples:
            self.H  # noqa: B018  (the caller has changed nsamples: H as a mean is what counts)
        if not self._is_sum:
            held = self._moment = held.to(torch.float32).contiguous()
            held.mul_(self.nsamples / 2)
            self._is_sum = True
            self._summed = self.nsamples
        ops.hessian_accumulate_(held, tokens)
        self.nsamples += samples
        self._summed = self.nsamples

    # ---- pruning -------------------------------------------------------------------------------

    @torch.no_grad()
    def fasterprune(
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
        *,
        prune_n: int | None = None,
        prune_m: int | None = None,
    ) -> None:
        """Prune the layer; ``H`` is used up.

        Parameters
        ----------
        sparsity : float, 0 <= sparsity < 1
            Share of the weights of every block that go, in the host's count: one more than
            ``int(numel * sparsity)``, and ties. Not used with ``prunen``.
        prunen, prunem : int
            prunen > 0: of every prunem weights of a row, prunen go (2 and 4 for 2:4). Also as
            ``prune_n`` and ``prune_m``, wanda's spelling.
        blocksize : int
            Columns of a block.
        percdamp : float
            Damping, as a share of the mean of H's diagonal.

        Raises
        ------
        ArgumentError, PatternError
            An argument is out of range; ``H`` and the weight are untouched, here and below.
        NotPositiveDefiniteError
            H cannot be inverted.
        NonFiniteError
            The weight holds a NaN or an infinity, or a repaired weight outgrew the layer's dtype.
        """
        n = _spelling("prunen", prunen, "prune_n", prune_n)
        m = _spelling("prunem", prunem, "prune_m", prune_m)
        self._collected()
        self.check_options(self.numerics, self.method)
        W = self._layout.matrix().to(torch.float32, copy=True)
        checks.check_finite(W, "layer.weight")
        if self.numerics == "ours":
            seconds, error, pruned = self._by_our_rules(sparsity, n, m, percdamp)
        else:
            _check_target(sparsity, n, m, blocksize, percdamp)
            if n:
                host_sweep.check_groups(self.columns, blocksize, n, m)
            seconds, error, pruned = self._by_host_rules(
                W.contiguous(), self._chooser(sparsity, n, m), (n, m), blocksize, percdamp
            )
        self._finish(pruned)
        if self.prints:
            print(f"time {seconds:.2f}")
            print("error", error)

    def _by_host_rules(
        self,
        W: Tensor,
        choose: host_sweep.Choose | None,
        groups: tuple[int, int],
        blocksize: int,
        percdamp: float,
        step: int | None = None,
    ) -> tuple[float, float, Tensor]:
        """(seconds, the host's error, pruned weights); W is written."""
        quantizer = getattr(self, "quantizer", None)
        if quantizer is not None and not quantizer.ready():
            quantizer.find_params(W, weight=True)
        begun = time.time()
        H = self.H
        assert H is not None
        U, dead = host_sweep.upper_factor(H, percdamp)
        W[:, dead] = 0.0
        if quantizer is not None:
            error = host_sweep.sweep_quantized_(
                W, U, _Rounding(quantizer), blocksize=blocksize, choose=choose, groups=groups
            )
        else:
            error = host_sweep.sweep_(
                W, U, blocksize=blocksize, choose=choose, groups=groups, step=step
            )
        return time.time() - begun, error, W

    def _chooser(self, sparsity: float, n: int, m: int) -> host_sweep.Choose | None:
        """None for N:M, where the kernel chooses."""
        if n:
            return None

        def choose(W: Tensor, _: slice, diagonal: Tensor) -> Tensor:
            return host_sweep.by_threshold(host_sweep.saliency(W, diagonal), sparsity)

        return choose

    def _by_our_rules(
        self, sparsity: float, n: int, m: int, percdamp: float
    ) -> tuple[float, float, Tensor]:
        if hasattr(self, "quantizer"):
            raise ArgumentError("quantizer: numerics='ours' does not quantise; use 'host'")
        target: dict[str, Any] = {"pattern": f"{m - n}:{m}"} if n else {"sparsity": sparsity}
        result = prune_weight(
            self._layout.matrix().contiguous(),
            Hessian.from_matrix(self.peek()),
            method=self.method,
            damping=percdamp,
            **target,
        )
        for note in result.notes:
            warnings.warn(f"lobs_native: {note}", RuntimeWarning, stacklevel=4)
        self.result = result
        return result.seconds, result.error / 2, result.weight  # the host's error has a half

    def _finish(self, pruned: Tensor) -> None:
        if not bool(torch.isfinite(pruned.to(self._layout.matrix().dtype)).all()):
            kind = str(self._layout.matrix().dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"layer.weight: a repaired weight outgrew {kind}; convert the layer to a wider "
                "type, raise percdamp, or remove less"
            )
        self._layout.store(pruned)
        del self.H

    def free(self) -> None:
        """Let the second moment go."""
        self.H = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    @staticmethod
    def check_options(numerics: str = "host", method: str = "exact") -> None:
        """ArgumentError for a value that does not exist."""
        if numerics not in _NUMERICS:
            raise ArgumentError(f"numerics: {numerics!r}; use one of {', '.join(_NUMERICS)}")
        if method not in _METHODS:
            raise ArgumentError(f"method: {method!r}; use one of {', '.join(_METHODS)}")


class SparseGPTOfWanda(SparseGPT):
    """:class:`SparseGPT` as wanda's copy of it has it, which prints nothing."""

    prints = False


class _Rounding:
    """The host's quantisation of a column (R, 1): to the nearest level, within range."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, column: Tensor) -> Tensor:
        scale, zero = self.quantizer.scale, self.quantizer.zero
        level = torch.clamp((column / scale).round_().add_(zero), 0, self.quantizer.maxq)
        return scale * (level - zero)  # type: ignore[no-any-return]


def _mirrored_(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle this is, in place."""
    step = 512  # a whole transposed copy would double the peak
    for first in range(0, len(lower), step):
        rows = slice(first, first + step)
        square = lower[rows, rows].tril()
        lower[rows, rows] = square + square.tril(-1).T
        lower[rows, first + step :] = lower[first + step :, rows].T
    return lower


def _spelling(name: str, value: int, other: str, given: int | None) -> int:
    if given is None:
        return checks.count(value, name)
    if value not in (0, given):
        raise ArgumentError(f"{name}={value} and {other}={given} contradict: give one of them")
    return checks.count(given, other)


def _check_target(sparsity: float, n: int, m: int, blocksize: int, percdamp: float) -> None:
    if n and not n <= m:
        raise ArgumentError(f"prunen, prunem: {n} of every {m} weights cannot go")
    if not n and not 0 <= checks.real(sparsity, "sparsity") < 1:
        raise ArgumentError(
            f"sparsity: {sparsity}; the host's rule needs 0 <= sparsity < 1 (a block loses "
            "int(numel * sparsity) + 1 weights)"
        )
    if checks.count(blocksize, "blocksize") == 0:
        raise ArgumentError("blocksize: 0; it is a number of columns, 128 as published")
    if checks.real(percdamp, "percdamp") < 0:
        raise ArgumentError(f"percdamp: {percdamp}; it must be >= 0")


# ---- the host ------------------------------------------------------------------------------------


def verify(call: Call) -> Compare | None:
    """Repeat ``add_batch`` or ``fasterprune`` with the host's class on copies."""
    ours, args, kwargs = call.instance, call.args, call.kwargs
    if call.method == "add_batch" and ours._layout.conv:
        return None  # the host's cannot take images
    theirs = call.original(_bare_copy(ours.layer))
    theirs.H, theirs.nsamples = ours.peek(), ours.nsamples
    if hasattr(ours, "quantizer"):
        theirs.quantizer = copy.deepcopy(ours.quantizer)
    if hasattr(ours, "scaler_row"):
        theirs.scaler_row = ours.scaler_row.clone()

    def compare_moments(_: Any) -> Difference:
        theirs.add_batch(*args, **kwargs)
        largest = float(theirs.H.abs().max())
        gap = float((ours.peek() - theirs.H).abs().max())
        return Difference(values=gap / largest if largest else gap, entries=theirs.H.numel())

    def compare_weights(_: Any) -> Difference:
        theirs.fasterprune(*args, **kwargs)
        return Difference.between(ours._layout.matrix(), Layout(theirs.layer).matrix())

    return compare_moments if call.method == "add_batch" else compare_weights


def _bare_copy(layer: nn.Module) -> nn.Module:
    """The layer with a weight of its own; hooks and all else are shared."""
    made = copy.copy(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    made._parameters = dict(layer._parameters)
    made._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return made


_ADD_BATCH = ("(self, inp, out, blocksize=1024)", "(self, inp, out)")
_FASTERPRUNE = (
    "(self, sparsity, prunen=0, prunem=0, blocksize=128, percdamp=0.01)",
    "(self, sparsity, prune_n=0, prune_m=0, blocksize=128, percdamp=0.01)",
)
_SIGNATURES = {
    "__init__": ("(self, layer)",),
    "add_batch": _ADD_BATCH,
    "fasterprune": _FASTERPRUNE,
    "free": ("(self)",),
}
_TIMED = ("add_batch", "fasterprune")

HOST = Host(
    "sparsegpt",
    (
        Replacement(("sparsegpt",), "SparseGPT", SparseGPT, _SIGNATURES, _TIMED, verify),
        Replacement(("lib.sparsegpt",), "SparseGPT", SparseGPTOfWanda, _SIGNATURES, _TIMED, verify),
    ),
)
