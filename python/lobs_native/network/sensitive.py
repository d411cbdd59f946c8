"""Which layers are weighted by how much the network's output depends on them."""

from __future__ import annotations

from collections.abc import Sequence

from lobs_native.errors import ArgumentError
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.solvers.methods import TABLE

__all__ = ["sensitive_of", "weighted_of"]


def sensitive_of(selected: Sequence[LayerJob], settings: NetworkSettings) -> list[LayerJob]:
    """The layers whose rows are weighted by their sensitivity."""
    sensitivity = settings.sensitivity
    sharing = [job for job in selected if job.shared]
    if not sharing:
        settings.check_apart()
    measured = sensitivity == "auto" and settings.token_weights is not None
    if sensitivity != "output" and not measured:
        return [] if sensitivity is None else sharing
    sensitive = [job for job in selected if _compares_rows(job)]
    if not sensitive and not measured:
        raise ArgumentError(
            "sensitivity: 'output' weighs rows against each other, which needs method "
            "'auto', 'exact' or 'admm', no N:M pattern, and scope 'layer' or 'model'; use "
            "'auto' or None"
        )
    return sensitive


def weighted_of(selected: Sequence[LayerJob], settings: NetworkSettings) -> list[LayerJob]:
    """The layers whose tokens are weighted by the output's sensitivity."""
    if settings.token_weights is None:
        return []
    weighted = [job for job in selected if not job.layer.watched]
    if not weighted:
        raise ArgumentError(
            "token_weights: 'output' needs the gradient at the output of a layer, and none of "
            "the layers has one of its own (attention and experts have not); use None"
        )
    return weighted


def _compares_rows(job: LayerJob) -> bool:
    """Whether a layer is pruned differently with the sensitivity of its rows."""
    settings = job.settings
    compares = TABLE[settings.method].compares_layers and not settings.resolved_pattern.is_grouped
    return compares and settings.scope == "layer"
