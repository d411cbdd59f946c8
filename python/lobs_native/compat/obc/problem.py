"""How ``TrueOBS`` sees a layer: its layout, and its second moment damped as OBC or as we do it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lobs_native.errors import DtypeError, NotPositiveDefiniteError
from lobs_native.layers.base import Layer
from lobs_native.layers.conv import Conv
from lobs_native.layers.linear import Linear
from lobs_native.solvers.inversion import Inverse
from lobs_native.solvers.patterns import Blocks, Pattern
from lobs_native.solvers.problem import Problem

__all__ = ["layout_of", "problem_of"]

_FLOAT32_UNTIL = 1e5  # condition: costs then keep four digits, weights five
# Sums of float32 products are right to about one eps: what is smaller, relative to the rest, is no
# information, and whether Cholesky takes it for positive is luck.
_SINGULAR_FROM = 10 / torch.finfo(torch.float32).eps
_CALLER = 7  # frames from the warning to whoever called prepare_unstr or nmprune


def layout_of(layer: Any) -> Layer:
    """How the layer's weight and inputs are laid out. DtypeError for a type that is not taken,
    ArgumentError for a layer that cannot be written to."""
    if not isinstance(layer, nn.Module):
        raise DtypeError(f"layer: expected a torch.nn.Module, got {type(layer).__name__}")
    made: Layer
    if Linear.base_of(layer) is not None:
        made = Linear("layer", cast(nn.Linear, layer))
    elif Conv.base_of(layer) is not None:
        made = Conv("layer", cast(nn.Conv2d, layer))
    else:
        raise DtypeError(
            f"layer: {type(layer).__name__}; TrueOBS takes Linear and Conv1d to Conv3d. "
            "lobs_native.prune takes more"
        )
    made.check()
    return made


def problem_of(
    weight: Tensor,
    moments: Sequence[Tensor],
    pattern: Pattern,
    *,
    rel_damp: float,
    as_host: bool,
    backend: str,
    memory: int | None,
) -> tuple[Problem, list[str]]:
    """The problem for weight (G, R, C) and moments G times (C, C), and what was done differently.

    ``moments`` are written to. With ``as_host``, damping is added to the diagonal, dead columns get
    1 there and lose their weights, and what float32 finds singular gets the identity on top.
    """
    notes: list[str] = []
    double = weight.dtype == torch.float64
    weight = weight.to(torch.float64 if double else torch.float32, copy=True).contiguous()
    moments = [one.contiguous() for one in moments]
    if as_host:
        for w, H in zip(weight, moments, strict=True):
            dead = H.diagonal() == 0
            H.diagonal().add_(rel_damp * H.diagonal().mean()).masked_fill_(dead, 1.0)
            w[:, dead] = 0.0

    def made() -> Problem:
        try:
            return Problem.of(
                weight,
                None,
                moments,
                damping=0.0 if as_host else rel_damp,
                inverted=True,
                prune_bias=False,
                mask=_kept(weight, pattern, notes),
                backend=backend,
                memory=memory,
            )
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"rel_damp: {rel_damp:g}: {error}") from error

    if not as_host:
        return made(), notes
    _make_regular([H for H in moments if _fails(H)], rel_damp, notes)
    problem = made()
    conditions = [_condition(H, A) for H, A in zip(moments, problem.inverses, strict=True)]
    lost = [
        H for H, condition in zip(moments, conditions, strict=True) if condition > _SINGULAR_FROM
    ]
    if lost:
        _make_regular(lost, rel_damp, notes)
        problem = made()
        conditions = [_condition(H, A) for H, A in zip(moments, problem.inverses, strict=True)]
    problem.precise = double or max(conditions) > _FLOAT32_UNTIL
    problem.said.clear()  # of the precision that was set aside
    if problem.precise and not double:
        notes.append(f"computed in float64: the condition number of H is {max(conditions):.1e}")
    return problem, notes


def _kept(weight: Tensor, pattern: Pattern, notes: list[str]) -> Tensor | None:
    """(G, R, C) bool, False for weights that are zero already; None where there are none.

    Blocks go, and are repaired, as a whole: only those of zeros alone count.
    """
    kept = weight != 0
    if isinstance(pattern, Blocks):
        blocks = kept.unflatten(2, (-1, pattern.size))
        whole = blocks.any(3, keepdim=True).expand_as(blocks).flatten(2)
        if count := int((whole & ~kept).sum()):
            note = f"{count} zeros stand in blocks with other weights: they may be repaired"
            notes.extend([note] if note not in notes else [])
        kept = whole
    return None if bool(kept.all()) else kept


def _fails(H: Tensor) -> bool:
    """Whether Cholesky fails in float32, which OBC computes in, or in float64."""
    return any(
        int(torch.linalg.cholesky_ex(H.to(dtype)).info) for dtype in (torch.float32, torch.float64)
    )


def _make_regular(singular: Sequence[Tensor], rel_damp: float, notes: list[str]) -> None:
    """Add the identity to these second moments, and say so."""
    if not singular:
        return
    for H in singular:
        H.diagonal().add_(1.0)
    said = (
        f"H is not positive definite with rel_damp={rel_damp:g}; the identity was added to it, as "
        "OBC does. Pass rel_damp=0.01, or more inputs"
    )
    notes.append(said)
    warnings.warn(f"lobs_native: {said}", RuntimeWarning, stacklevel=_CALLER)


def _condition(H: Tensor, inverse: Inverse) -> float:
    """In the norm of the largest column sum."""
    return float(H.abs().sum(0).max()) * float(inverse.A.abs().sum(0).max()) / inverse.scale
