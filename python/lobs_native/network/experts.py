"""Experts of a layer, some of which saw few rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native.solvers.measurement import quadratic_form
from lobs_native.solvers.problem import nearest_count
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import PrunedWeight, prune_groups

__all__ = ["error_of_each", "prune_experts", "zeros_of_each"]


def prune_experts(
    weight: Tensor,
    moments: Sequence[Tensor],
    settings: LayerSettings,
    *,
    rare: Collection[int],
    bias: Tensor | None,
    mask: Tensor | None,
    importance: Tensor | None,
    **options: Any,
) -> PrunedWeight:
    """Prune a layer of G experts so that those in ``rare`` lose the requested share of their
    weights each, and the others the rest of the layer's share together. Whatever the scope, weights
    are then not compared with those of experts whose second moments are little known.

    With a mask, or a target that is no share, all are pruned as usual.

    ``weight`` (G, R, C), ``bias`` (G, R), ``importance`` (G, R), and the rest as in
    :func:`lobs_native.solvers.weight.prune_groups`.
    """
    G, R, C = weight.shape
    share, unit = settings.target.sparsity, settings.resolved_pattern.unit
    by_itself = settings.scope == "row" or settings.resolved_pattern.is_grouped
    if share is None or by_itself or mask is not None:
        return prune_groups(
            weight, moments, settings, bias=bias, mask=mask, importance=importance, **options
        )
    of_each = R * (C + settings.prune_bias) // unit
    parts = [[g for g in range(G) if g not in rare], *([g] for g in sorted(rare))]
    parts = [part for part in parts if part]
    counts = [nearest_count(share, of_each * len(part)) for part in parts]
    counts[0] += nearest_count(share, of_each * G) - sum(counts)
    outs = [
        prune_groups(
            weight[part],
            [moments[g] for g in part],
            dataclasses.replace(settings, sparsity=count / (of_each * len(part))),
            bias=None if bias is None else bias[part],
            importance=None if importance is None else importance[part],
            **options,
        )
        for part, count in zip(parts, counts, strict=True)
    ]
    return _joined(parts, outs, R * (C + settings.prune_bias))


def _joined(
    parts: Sequence[Sequence[int]], outs: Sequence[PrunedWeight], of_each: int
) -> PrunedWeight:
    """One result for a layer whose groups, of so many weights each, were pruned in parts."""
    order = torch.tensor([g for part in parts for g in part]).argsort()

    def whole(name: str) -> Any:
        tensors = [getattr(out, name) for out in outs]
        return None if tensors[0] is None else torch.cat(tensors)[order.to(tensors[0].device)]

    def total(name: str) -> float | None:
        values = [getattr(out, name) for out in outs]
        return None if None in values else sum(values)

    error, energy = total("error") or 0.0, total("energy") or 0.0
    raised = [out for out in outs if out.status != "ok"]
    conditions = [out.condition for out in outs if out.condition is not None]
    sizes = [of_each * len(part) for part in parts]
    removed = sum(round(n * out.sparsity) for n, out in zip(sizes, outs, strict=True))
    return dataclasses.replace(
        outs[0],
        weight=whole("weight"),
        bias=whole("bias"),
        mask=whole("mask"),
        bias_mask=whole("bias_mask"),
        error=error,
        relative_error=error / energy if energy > 0 else (0.0 if error == 0 else math.inf),
        sparsity=removed / sum(sizes),
        damping=max(out.damping for out in outs),
        status=raised[0].status if raised else "ok",
        notes=tuple(dict.fromkeys(note for out in outs for note in out.notes)),
        dead_columns=sum(out.dead_columns for out in outs),
        optimality=max(out.optimality for out in outs),
        swaps=sum(out.swaps for out in outs),
        seconds=sum(out.seconds for out in outs),
        predicted=total("predicted"),
        curve_sparsity=None,  # the experts' shares differ
        curve_error=None,
        energy=energy,
        condition=max(conditions, default=None),
    )


def error_of_each(
    before: Tensor, bias: Tensor | None, out: PrunedWeight, moments: Sequence[Tensor]
) -> tuple[float, ...]:
    """``tr(dW H dW^T)`` of every expert: weights ``before`` (G, R, C) and bias (G, R)."""
    errors = []
    for g, H in enumerate(moments):
        change = out.weight[g].double() - before[g]
        if bias is not None and out.bias is not None:
            column = out.bias[g].double() - bias[g]
            change = torch.cat([change, column[:, None]], 1)
        errors.append(max(0.0, quadratic_form(change, H)))
    return tuple(errors)


def zeros_of_each(out: PrunedWeight) -> tuple[float, ...]:
    """The share of removed weights of every expert."""
    return tuple((~out.mask).flatten(1).double().mean(1).tolist())
