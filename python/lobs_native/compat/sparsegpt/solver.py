"""A drop-in replacement for ``SparseGPT`` of the published program and its copies.

Names, arguments, printed lines and numerics are the host's (github.com/IST-DASLab/sparsegpt at
147d215; github.com/locuslab/wanda at 8e8fc87, ``lib/sparsegpt.py``); our kernels do the work, also
on machines without CUDA, where the host's own class raises an error.

Intended differences: convolutions work on their patches (the host's ``add_batch`` fails on images);
inputs that are not finite are refused at once, not by a failed factorisation later; a weight that
overflows its dtype is an error, not an infinity; and ``H`` is kept after a failure.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.compat.hosts import Call, Compare, Difference, Host, Replacement
from lobs_native.compat.sparsegpt import sweep as host_sweep
from lobs_native.compat.sparsegpt.ablate import AblateGPT
from lobs_native.compat.sparsegpt.collected import Collected
from lobs_native.compat.sparsegpt.layout import Layout
from lobs_native.errors import ArgumentError
from lobs_native.solvers.hessian import Hessian
from lobs_native.solvers.weight import PrunedWeight, prune_weight

__all__ = ["HOST", "SparseGPT", "SparseGPTOfWanda"]

_NUMERICS = ("host", "ours")
_METHODS = ("exact", "sweep")


class SparseGPT(Collected):
    """Prunes one layer by the second moment of its inputs, see :class:`Collected`.

    Attributes
    ----------
    quantizer : optional
        Set by the caller, with the host's interface (``ready``, ``find_params``, ``scale``,
        ``zero``, ``maxq``). Kept weights are then quantised in the same sweep, in plain torch and
        no faster than in the host.
    numerics : str
        ``"host"``: the host's rules, which give its masks and weights (see ``sweep.py``).
        ``"ours"``: the rules of ``lobs_native.prune_weight``: exact counts, float64 inverse, error
        measured on the final weights. For all objects: ``SparseGPT.numerics = "ours"``, or
        ``patch("sparsegpt", numerics="ours")``.
    method : str
        ``"exact"`` or ``"sweep"``, with ``numerics="ours"``.
    result : PrunedWeight or None
        With ``numerics="ours"``, the result of ``prune_weight``, notes included.
    """

    OPTIONS = ("numerics", "method")
    numerics = "host"
    method = "exact"
    prints = True  # the host's two lines; wanda's copy prints nothing
    quantizer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.result: PrunedWeight | None = None

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
        """Prune the layer. This consumes ``H``.

        Parameters
        ----------
        sparsity : float, 0 <= sparsity < 1
            The share of each block's weights to remove, counted as in the host: one more than
            ``int(numel * sparsity)``, and all ties. Not used with ``prunen``.
        prunen, prunem : int
            prunen > 0: remove prunen of every prunem weights of a row (2 and 4 for 2:4). Also
            spelled ``prune_n`` and ``prune_m``, as in wanda.
        blocksize : int
            The number of columns in a block.
        percdamp : float
            Damping, as a fraction of the mean of H's diagonal.

        Raises
        ------
        ArgumentError, PatternError
            An argument is out of range. Whichever error is raised, ``H`` and the weight are
            unchanged.
        NotPositiveDefiniteError
            H cannot be inverted.
        NonFiniteError
            The weight has a NaN or an infinity, or a repaired weight overflowed the layer's dtype.
        """
        n = _spelling("prunen", prunen, "prune_n", prune_n)
        m = _spelling("prunem", prunem, "prune_m", prune_m)
        self.check_options(self.numerics, self.method)
        if self.numerics == "ours":
            seconds, error, pruned = self._by_our_rules(sparsity, n, m, percdamp)
        else:
            host_sweep.check_target(sparsity, n, m, blocksize, percdamp)
            if n:
                host_sweep.check_groups(self.columns, blocksize, n, m)
            seconds, error, pruned = self._by_host_rules(
                None if n else _by_saliency(sparsity),
                (n, m),
                blocksize,
                percdamp,
                quantizer=getattr(self, "quantizer", None),
            )
        self._finish(pruned)
        if self.prints:
            print(f"time {seconds:.2f}")
            print("error", error)

    def _by_our_rules(
        self, sparsity: float, n: int, m: int, percdamp: float
    ) -> tuple[float, float, Tensor]:
        if hasattr(self, "quantizer"):
            raise ArgumentError("quantizer: numerics='ours' does not quantise; use 'host'")
        H = self.peek()
        target: dict[str, Any] = {"pattern": f"{m - n}:{m}"} if n else {"sparsity": sparsity}
        result = prune_weight(
            self._layout.matrix().contiguous(),
            Hessian.from_matrix(H),
            method=self.method,
            damping=percdamp,
            **target,
        )
        for note in result.notes:
            warnings.warn(f"lobs_native: {note}", RuntimeWarning, stacklevel=4)
        self.result = result
        return result.seconds, result.error / 2, result.weight  # the host's error is half of ours

    @staticmethod
    def check_options(numerics: str = "host", method: str = "exact") -> None:
        """Raise ArgumentError for an unknown value."""
        if numerics not in _NUMERICS:
            raise ArgumentError(f"numerics: {numerics!r}; use one of {', '.join(_NUMERICS)}")
        if method not in _METHODS:
            raise ArgumentError(f"method: {method!r}; use one of {', '.join(_METHODS)}")


class SparseGPTOfWanda(SparseGPT):
    """:class:`SparseGPT` as in wanda's copy, which prints nothing."""

    prints = False


def _by_saliency(sparsity: float) -> host_sweep.Choose:
    def choose(W: Tensor, _: slice, diagonal: Tensor) -> Tensor:
        return host_sweep.by_threshold(host_sweep.saliency(W, diagonal), sparsity)

    return choose


def _spelling(name: str, value: int, other: str, other_value: int | None) -> int:
    """The value of an argument with two spellings."""
    if other_value is None:
        return checks.count(value, name)
    if value not in (0, other_value):
        raise ArgumentError(
            f"{name}={value} and {other}={other_value} contradict: pass one of them"
        )
    return checks.count(other_value, other)


# ---- the host ------------------------------------------------------------------------------------


def verify(call: Call) -> Compare | None:
    """Repeat ``add_batch`` or ``fasterprune`` with the host's class on copies."""
    ours, args, kwargs = call.instance, call.args, call.kwargs
    if call.method == "add_batch" and ours._layout.conv:
        return None  # the host's method fails on images
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
    """The layer with a copy of the weight; hooks and everything else are shared."""
    copied = copy.copy(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    copied._parameters = dict(layer._parameters)
    copied._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return copied


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
_OF_ABLATE = {
    "__init__": ("(self, layer)",),
    "add_batch": ("(self, inp, out)",),
    "get_wanda_mask": ("(self, sparsity, prunen, prunem)",),
    "get_mag_mask": ("(self, sparsity, prunen, prunem)",),
    "fasterprune": (
        "(self, args, sparsity, mask=None, prune_n=0, prune_m=0, blocksize=128, percdamp=0.01)",
    ),
    "free": ("(self)",),
}
_TIMED = ("add_batch", "fasterprune")

HOST = Host(
    "sparsegpt",
    (
        Replacement(("sparsegpt",), "SparseGPT", SparseGPT, _SIGNATURES, _TIMED, verify),
        Replacement(("lib.sparsegpt",), "SparseGPT", SparseGPTOfWanda, _SIGNATURES, _TIMED, verify),
        Replacement(("lib.ablate",), "AblateGPT", AblateGPT, _OF_ABLATE, _TIMED, verify),
    ),
)
