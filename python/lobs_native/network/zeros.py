"""Zeros that a layer has before it is pruned."""

from __future__ import annotations

from torch import Tensor

from lobs_native.network.selection import LayerJob
from lobs_native.solvers.problem import nearest_count

__all__ = ["more_zeros", "within"]


def more_zeros(zeros: Tensor, job: LayerJob) -> float | None:
    """The share of the weights (G, R, C) that are zeros, if that is more than the sparsity that was
    requested for a whole layer."""
    settings, pattern = job.settings, job.settings.resolved_pattern
    share, count = settings.target.sparsity, int(zeros.sum())
    single = not pattern.is_grouped and pattern.unit == 1 and not pattern.whole_inputs
    single = single and not job.layer.routed
    if not single or share is None or settings.scope == "row":
        return None
    return count / job.weights if count > nearest_count(share, job.weights) else None


def within(zeros: Tensor, job: LayerJob) -> bool:
    """Whether the pattern or the target removes all of these weights (G, R, C), so that they stay
    zeros when the others are corrected."""
    settings, pattern = job.settings, job.settings.resolved_pattern
    if pattern.is_grouped:
        groups = zeros.reshape(-1, pattern.group)
        return int(groups.sum(1).max()) <= pattern.per_group
    units = zeros.unflatten(2, (-1, pattern.unit))
    whole = units.all(3)  # (G, R, C / unit)
    if bool((units.any(3) & ~whole).any()):
        return False
    share = settings.target.sparsity
    if share is None:
        return settings.target.threshold is not None
    if settings.scope == "row":
        return int(whole.sum(2).max()) <= nearest_count(share, whole.shape[2])
    return int(whole.sum()) <= nearest_count(share, job.weights // pattern.unit)
