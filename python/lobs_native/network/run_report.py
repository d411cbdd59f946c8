"""The report of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from lobs_native import ops
from lobs_native.calibration.offload import put_away
from lobs_native.network.layerwise import LayerLoop
from lobs_native.network.peak import Peak
from lobs_native.network.selection import LayerJob
from lobs_native.network.shared import SharedLedger
from lobs_native.report.records import Coverage, ErrorBound, Skipped
from lobs_native.report.report import Report
from lobs_native.rundir.ledger import Ledger
from lobs_native.version import versions

__all__ = ["report_of"]


def report_of(
    loop: LayerLoop,
    error_bound: ErrorBound,
    *,
    jobs: list[LayerJob],
    skipped: list[Skipped],
    coverage: Coverage,
    peak: Peak,
    ledger: Ledger | SharedLedger | None,
    searched: dict[str, float] | None,
    ranks: list[dict[str, float]] | None,
) -> Report:
    """What :func:`lobs_native.prune` returns; it takes the masks out of the loop."""
    masks, session = loop.masks, loop.session
    seconds, of_stages = loop.context.stages.total()
    weights = sum(mask.shape.numel() for mask in masks.values())
    removed = sum(mask.removed for mask in masks.values())
    measured = bool(loop.context.sensitivity) or session.weights is not None
    settings: dict[str, Any] = {
        **loop.context.settings.arguments(),
        "threads": ops.threads(),
        "batches": len(session.batches),
        "batches held back": len(session.held_back),
        **loop.structure.summary(),
        "plan": loop.context.plan.to_dict(),
        "search for a division": searched,
        "seconds": of_stages,
        "peak memory": peak.bytes(),
        "peak memory of sensitivities": peak.before_reset if measured else None,
    }
    if session.differing:
        settings["parameters unlike the original's"] = len(session.differing)
    if ranks is not None:
        settings["ranks"] = ranks
    if loop.context.tuner is not None:
        settings["tuned"] = [dataclasses.asdict(x) for x in loop.context.tuner.done]
    if ledger is not None:
        settings |= ledger.summary()
    return Report(
        layers=tuple(loop.done.values()),
        skipped=tuple(skipped),
        error_bound=error_bound,
        sparsity=removed / weights,
        removed=removed,
        weights=weights,
        seconds=seconds,
        settings=settings,
        versions=versions(),
        coverage=dataclasses.replace(coverage, removed=removed),
        masks={
            job.layer.name: put_away(
                session.offload, job.layer.unpack(masks.pop(job.layer.name).unpacked())
            )
            for job in jobs
        },
    )
