"""The pruning problem of ``TrueOBS``: a layer's layout, and its second moment with OBC's damping or
ours."""

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
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.workspace import Workspace

__all__ = ["layout_of", "problem_of"]

_FLOAT32_UNTIL = 1e5  # condition number at which costs keep four digits, and weights five
# Sums of float32 products are accurate to about one eps. Eigenvalues that are relatively smaller
# hold no information, and whether Cholesky finds them positive is a matter of luck.
_SINGULAR_FROM = 10 / torch.finfo(torch.float32).eps
_CALLER = 7  # frames from the warning to the caller of prepare_unstr or nmprune


def layout_of(layer: Any) -> Layer:
    """The layout of a layer's weight and inputs. Raises DtypeError for an unsupported type, and
    ArgumentError for a layer that cannot be written to."""
    if not isinstance(layer, nn.Module):
        raise DtypeError(f"layer: expected a torch.nn.Module, got {type(layer).__name__}")
    layout: Layer
    if Linear.base_of(layer) is not None:
        layout = Linear("layer", cast(nn.Linear, layer))
    elif Conv.base_of(layer) is not None:
        layout = Conv("layer", cast(nn.Conv2d, layer))
    else:
        raise DtypeError(
            f"layer: {type(layer).__name__}; TrueOBS takes Linear and Conv1d to Conv3d; "
            "lobs_native.prune takes more types"
        )
    layout.check()
    return layout


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
    """The problem for weight (G, R, C) and moments G times (C, C), and notes about it.

    ``moments`` are written to. With ``as_host``, damping is added to the diagonal, dead inputs get
    a 1 there and lose their weights, and the identity is added to a matrix that is singular in
    float32.
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

    def problem_for_weight() -> Problem:
        try:
            return Problem.of(
                weight,
                None,
                moments,
                damping=0.0 if as_host else rel_damp,
                inverted=True,
                prune_bias=False,
                mask=_kept(weight, pattern, notes),
                workspace=Workspace(backend, memory),
            )
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"rel_damp: {rel_damp:g}: {error}") from error

    if not as_host:
        return problem_for_weight(), notes
    _make_regular([H for H in moments if _fails(H)], rel_damp, notes)
    problem = problem_for_weight()
    conditions = [_condition(H, A) for H, A in zip(moments, problem.inverses, strict=True)]
    singular = [
        H for H, condition in zip(moments, conditions, strict=True) if condition > _SINGULAR_FROM
    ]
    if singular:
        _make_regular(singular, rel_damp, notes)
        problem = problem_for_weight()
        conditions = [_condition(H, A) for H, A in zip(moments, problem.inverses, strict=True)]
    problem.precise = double or max(conditions) > _FLOAT32_UNTIL
    problem.workspace.notes.clear()  # notes about the precision that was just overridden
    if problem.precise and not double:
        notes.append(f"computed in float64: the condition number of H is {max(conditions):.1e}")
    return problem, notes


def _kept(weight: Tensor, pattern: Pattern, notes: list[str]) -> Tensor | None:
    """(G, R, C) bool, False for weights that are already zero; None if there are none.

    Blocks are removed and repaired as a whole, so only blocks that are all zeros count.
    """
    kept = weight != 0
    if pattern.unit > 1:
        blocks = kept.unflatten(2, (-1, pattern.unit))
        whole = blocks.any(3, keepdim=True).expand_as(blocks).flatten(2)
        if count := int((whole & ~kept).sum()):
            note = f"{count} zeros are in blocks with other weights, and may become nonzero"
            notes.extend([note] if note not in notes else [])
        kept = whole
    return None if bool(kept.all()) else kept


def _fails(H: Tensor) -> bool:
    """Whether Cholesky fails in float32, OBC's precision, or in float64."""
    return any(
        int(torch.linalg.cholesky_ex(H.to(dtype)).info) for dtype in (torch.float32, torch.float64)
    )


def _make_regular(singular: Sequence[Tensor], rel_damp: float, notes: list[str]) -> None:
    """Add the identity to these second moments, with a note and a warning."""
    if not singular:
        return
    for H in singular:
        H.diagonal().add_(1.0)
    note = (
        f"H is not positive definite with rel_damp={rel_damp:g}; the identity was added to it, as "
        "in OBC. Pass rel_damp=0.01, or more inputs"
    )
    notes.append(note)
    warnings.warn(f"lobs_native: {note}", RuntimeWarning, stacklevel=_CALLER)


def _condition(H: Tensor, inverse: Inverse) -> float:
    """The condition number in the 1-norm (largest column sum)."""
    return float(H.abs().sum(0).max()) * float(inverse.A.abs().sum(0).max()) / inverse.scale
