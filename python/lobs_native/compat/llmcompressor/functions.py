"""Drop-in replacements for the functions of llm-compressor's ``SparseGPTModifier``.

``patch("llmcompressor")`` installs them. They have the host's numerics, and so its masks, in less
time.

Intended differences: Conv2d and the Conv1D of transformers get a second moment of the right size
(the host fails on both); inputs that are not finite and second moments that cannot be inverted are
errors, where the host prunes by magnitude with a warning.

Written for llm-compressor 0.14.0.1, which is not needed here. ``LOBSModifier``, which is imported
on first use, needs it.
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
    """Import ``LOBSModifier`` on first use, since it derives from a class of the host."""
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
    """(C, C) float32 zeros for a module's second moment, on ``device`` or the weight's device."""
    layout = Layout(module)
    where = layout.weight.device if device is None else device
    return torch.zeros((layout.columns, layout.columns), device=where, dtype=torch.float32)


@torch.no_grad()
def accumulate_hessian(
    inp: Tensor, module: nn.Module, H: Tensor, num_samples: int
) -> tuple[Tensor, int]:
    """Add a batch to the mean second moment, ``2 / num_samples * sum(x x^T)``.

    Only the lower triangle is updated; ``sparsify_weight``, ours and the host's, reads no more.

    Parameters
    ----------
    inp : (B, ..., C) or (T, C); for Conv2d (B, C_in, h, w) or (C_in, h, w)
        Any float dtype, any device. Not modified. Counts as B samples, or as one.
    module : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
    H : (C, C) float32, contiguous
        Written in place.
    num_samples : int
        The number of samples in H.

    Returns
    -------
    (Tensor, int)
        H, and the new number of samples.

    Raises
    ------
    NonFiniteError
        ``inp`` has a NaN or an infinity; H is unchanged.
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
    """Prune a module's weight by SparseGPT's rules, as in the host.

    Parameters
    ----------
    module : nn.Linear, nn.Conv2d (groups = 1) or transformers' Conv1D
        Not modified: the caller stores the result.
    hessians_dict : {module: (C, C) float32}
        The module's entry is removed, unless an error is raised. Its lower triangle is read.
    sparsity : float, 0 <= sparsity < 1
        ``int(numel * sparsity) + 1`` weights of each block are removed, and all ties. Not used with
        ``prune_n``.
    prune_n, prune_m : int
        prune_n > 0: remove prune_n of every prune_m weights of a row.
    block_size : int
        The number of columns in a block.
    dampening_frac : float
        Damping, as a fraction of the mean of the diagonal.
    preserve_sparsity_mask : bool
        Weights that are zero stay zero, and count as removed.

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
        The weight has a NaN or an infinity, or overflowed its dtype.
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
            f"sparsity: {sparsity:g}, but {float(zeros.float().mean()):g} of the weights are "
            "already zero; raise it, or pass preserve_sparsity_mask=False"
        )
    try:
        U, _ = host_sweep.upper_factor(H, dampening_frac)
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(
            f"hessian ({len(H)} columns): could not be inverted with dampening_frac="
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
    weight = stored.to(layout.weight.dtype).contiguous()
    if not bool(torch.isfinite(weight).all()):
        kind = str(weight.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"module.weight: a repaired weight overflowed {kind}; use a wider type, raise "
            "dampening_frac, or remove less"
        )
    del hessians_dict[module]
    return loss, weight


def _by_threshold(sparsity: float) -> host_sweep.Choose:
    def choose(part: Tensor, _: slice, diagonal: Tensor) -> Tensor:
        return host_sweep.by_threshold(host_sweep.saliency(part, diagonal), sparsity)

    return choose


def _extending(
    W: Tensor, zeros: Tensor, sparsity: float, n: int, block_size: int
) -> host_sweep.Choose:
    """Also remove the weights that are already zero, at no cost. As in the host, repairs of earlier
    blocks leave them zero, but those of their own block do not."""

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
    """Repeat with the host's own function on a copy of H."""
    arguments = _named(call, accumulate_hessian)
    if not isinstance(arguments["module"], nn.Linear):
        raise ArgumentError("the host's own H does not have the shape that this layer needs")
    arguments["H"] = arguments["H"].clone()

    def compare(result: tuple[Tensor, int]) -> Difference:
        theirs, _ = call.original(**arguments)
        largest = float(theirs.abs().max())
        gap = float((result[0] - theirs).tril().abs().max())
        return Difference(values=gap / largest if largest else gap, entries=theirs.numel())

    return compare


def _verify_weights(call: Call) -> Compare:
    """Repeat with the host's own function on copies of the module and of H."""
    arguments = _named(call, sparsify_weight)
    module = arguments["module"]
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(module.weight.detach().clone(), requires_grad=False)}
    arguments["module"] = twin
    arguments["hessians_dict"] = {twin: arguments["hessians_dict"][module].clone()}

    def compare(result: tuple[float, Tensor]) -> Difference:
        _, theirs = call.original(**arguments)
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
