"""llm-compressor: our pruning as a modifier of its own, and its SparseGPT on our kernels.

``LOBSModifier`` prunes with all that ``lobs_native.prune`` knows, inside ``oneshot``. The three
functions here stand in for those of ``SparseGPTModifier`` under ``patch("llmcompressor")``: the
host's numerics, so the host's masks, in less time.

Different from the host's functions on purpose: Conv2d and the Conv1D of transformers get a second
moment of their width (the host fails on both); inputs that are not finite and second moments that
cannot be inverted are errors, where the host prunes by magnitude with a warning.

Read at llm-compressor 0.14.0.1. Nothing here needs it until ``LOBSModifier`` is asked for.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lobs_native import checks, ops
from lobs_native.compat.hosts import Call, Compare, Difference, Host, Replacement
from lobs_native.compat.sparsegpt import sweep as host_sweep
from lobs_native.compat.sparsegpt.layout import Layout
from lobs_native.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError

if TYPE_CHECKING:
    from lobs_native.compat.llmcompressor.modifier import LOBSModifier

__all__ = ["HOST", "LOBSModifier", "accumulate_hessian", "make_empty_hessian", "sparsify_weight"]

_NAMES = ("prune_n", "prune_m", "block_size", "dampening_frac")


def __getattr__(name: str) -> Any:
    """``LOBSModifier`` is a class of the host's, so it is made when it is first asked for."""
    if name != "LOBSModifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lobs_native.compat.llmcompressor.modifier import LOBSModifier
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("llmcompressor", "compressed_tensors"):
            raise
        raise ImportError(
            f"LOBSModifier needs llm-compressor: pip install llmcompressor ({error})"
        ) from error
    return LOBSModifier


def make_empty_hessian(module: nn.Module, device: torch.device | None = None) -> Tensor:
    """(C, C) float32 zeros for a module's second moment, on ``device`` or where its weight is."""
    layout = Layout(module)
    where = layout.weight.device if device is None else device
    return torch.zeros((layout.columns, layout.columns), device=where, dtype=torch.float32)


@torch.no_grad()
def accumulate_hessian(
    inp: Tensor, module: nn.Module, H: Tensor, num_samples: int
) -> tuple[Tensor, int]:
    """Add a batch to the mean second moment, ``2 / num_samples * sum(x x^T)``.

    Only the lower triangle is kept: all that ``sparsify_weight``, ours or the host's, reads.

    Parameters
    ----------
    inp : (B, ..., C) or (T, C); for Conv2d (B, C_in, h, w) or (C_in, h, w)
        Any float dtype, any device. Not modified. Counts as B samples, or as one.
    module : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
    H : (C, C) float32, contiguous
        Written in place.
    num_samples : int
        Samples that H is the mean of.

    Returns
    -------
    (Tensor, int)
        H, and the new number of samples.

    Raises
    ------
    NonFiniteError
        A NaN or an infinity in ``inp``; H is as it was.
    """
    layout = Layout(module)
    inp = inp.detach().to(H.device)
    tokens = layout.tokens(inp)
    total = num_samples + layout.samples(inp)
    each = torch.full((len(tokens),), 2 / max(1, num_samples), dtype=torch.float64, device=H.device)
    ops.hessian_accumulate_(H, tokens, each)
    return H.mul_(max(1, num_samples) / total), total


@torch.no_grad()
def sparsify_weight(
    module: nn.Module,
    hessians_dict: dict[nn.Module, Tensor],
    sparsity: float,
    prune_n: int,
    prune_m: int,
    block_size: int,
    dampening_frac: float,
    preserve_sparsity_mask: bool,
) -> tuple[float, Tensor]:
    """Prune a module's weight by SparseGPT's rules, as the host has them.

    Parameters
    ----------
    module : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
        Not modified: the caller stores the result.
    hessians_dict : {module: (C, C) float32}
        The module's entry is taken out. Where this raises, it stays. Its lower triangle is read.
    sparsity : float, 0 <= sparsity < 1
        Of each block ``int(numel * sparsity) + 1`` weights go, and ties. Not used with ``prune_n``.
    prune_n, prune_m : int
        prune_n > 0: of every prune_m weights of a row, prune_n go.
    block_size : int
        Columns of a block.
    dampening_frac : float
        Damping, as a share of the mean of the diagonal.
    preserve_sparsity_mask : bool
        Weights that are zero stay zero, and count.

    Returns
    -------
    (float, Tensor)
        The host's loss, ``sum(e^2) / 2``; the weight, in the shape and dtype of the old one.

    Raises
    ------
    ArgumentError, PatternError
        An argument is out of range.
    NotPositiveDefiniteError
        The second moment cannot be inverted.
    NonFiniteError
        The weight holds a NaN or an infinity, or outgrew its dtype.
    """
    layout = Layout(module)
    H = hessians_dict[module]
    W = layout.matrix().to(torch.float32, copy=True).contiguous()
    checks.check_finite(W, "module.weight")
    host_sweep.check_target(sparsity, prune_n, prune_m, block_size, dampening_frac, names=_NAMES)
    if prune_n:
        host_sweep.check_groups(layout.columns, block_size, prune_n, prune_m)
    W[:, H.diagonal() == 0] = 0.0
    zeros = W == 0 if preserve_sparsity_mask else None
    if zeros is not None and int(zeros.sum()) > sparsity * W.numel():
        raise ArgumentError(
            f"sparsity: {sparsity:g}, but {float(zeros.float().mean()):g} of the weights are zero "
            "already; ask for more, or pass preserve_sparsity_mask=False"
        )
    try:
        U, _ = host_sweep.upper_factor(H, dampening_frac)
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(
            f"hessian ({len(H)} columns): it could not be inverted with dampening_frac="
            f"{dampening_frac:g}; raise it, or calibrate with more data"
        ) from error
    choose: host_sweep.Choose | None = None
    if zeros is not None:
        choose = _extending(W, zeros, sparsity, prune_n, block_size)
    elif not prune_n:
        choose = _by_threshold(sparsity)
    loss = host_sweep.sweep_(
        W,
        U,
        blocksize=block_size,
        choose=choose,
        groups=(prune_n, prune_m),
        step=prune_m if prune_n else None,
    )
    stored = (W.T if layout.transposed else W).reshape(layout.weight.shape)
    made = stored.to(layout.weight.dtype).contiguous()
    if not bool(torch.isfinite(made).all()):
        kind = str(made.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"module.weight: a repaired weight outgrew {kind}; use a wider type, raise "
            "dampening_frac, or remove less"
        )
    del hessians_dict[module]
    return loss, made


def _by_threshold(sparsity: float) -> host_sweep.Choose:
    def choose(part: Tensor, _: slice, diagonal: Tensor) -> Tensor:
        return host_sweep.by_threshold(host_sweep.saliency(part, diagonal), sparsity)

    return choose


def _extending(
    W: Tensor, zeros: Tensor, sparsity: float, n: int, block_size: int
) -> host_sweep.Choose:
    """What is zero already costs nothing and goes in any case; as in the host, repairs of earlier
    blocks leave it zero, and those of its own block do not."""

    def choose(part: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
        if columns.start % block_size == 0:
            block = slice(columns.start, columns.start + block_size)
            W[:, block].masked_fill_(zeros[:, block], 0.0)
        gone = zeros[:, columns]
        score = host_sweep.saliency(part, diagonal).masked_fill_(gone, 0.0)
        if n:
            return gone | host_sweep.lowest_in_row(score, n)
        if int(score.numel() * sparsity) > int(gone.sum()):
            return host_sweep.by_threshold(score, sparsity)
        return gone

    return choose


# ---- the host ------------------------------------------------------------------------------------


def _named(call: Call, function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.signature(function).bind(*call.args, **call.kwargs).arguments)


def _verify_moments(call: Call) -> Compare:
    """The host's own function on a copy of H."""
    given = _named(call, accumulate_hessian)
    if not isinstance(given["module"], nn.Linear):
        raise ArgumentError("the host's own H has another shape than this layer needs")
    given["H"] = given["H"].clone()

    def compare(result: tuple[Tensor, int]) -> Difference:
        theirs, _ = call.original(**given)
        largest = float(theirs.abs().max())
        gap = float((result[0] - theirs).tril().abs().max())
        return Difference(values=gap / largest if largest else gap, entries=theirs.numel())

    return compare


def _verify_weights(call: Call) -> Compare:
    """The host's own function on copies of the module and of H."""
    given = _named(call, sparsify_weight)
    module = given["module"]
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(module.weight.detach().clone(), requires_grad=False)}
    given["module"] = twin
    given["hessians_dict"] = {twin: given["hessians_dict"][module].clone()}

    def compare(result: tuple[float, Tensor]) -> Difference:
        _, theirs = call.original(**given)
        return Difference.between(result[1], theirs)

    return compare


_MODULES = ("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify",)

HOST = Host(
    "llmcompressor",
    (
        Replacement(
            _MODULES,
            "make_empty_hessian",
            make_empty_hessian,
            {"": ("(module, device=None)",)},
        ),
        Replacement(
            _MODULES,
            "accumulate_hessian",
            accumulate_hessian,
            {"": ("(inp, module, H, num_samples)",)},
            verify=_verify_moments,
        ),
        Replacement(
            _MODULES,
            "sparsify_weight",
            sparsify_weight,
            {
                "": (
                    "(module, hessians_dict, sparsity, prune_n, prune_m, block_size, "
                    "dampening_frac, preserve_sparsity_mask)",
                )
            },
            verify=_verify_weights,
        ),
    ),
)
