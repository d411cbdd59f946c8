"""The report of one layer."""

from __future__ import annotations

from lobs_native.network.peak import LayerPeak
from lobs_native.network.selection import LayerJob
from lobs_native.report.records import LayerReport
from lobs_native.solvers.weight import PrunedWeight

__all__ = ["layer_report"]


def layer_report(
    job: LayerJob,
    out: PrunedWeight,
    *,
    rows: float,
    calibrating: float = 0.0,
    inherited: float | None = None,
    peak: LayerPeak | None = None,
) -> LayerReport:
    """The report of a layer: its settings and its result."""
    layer, settings = job.layer, job.settings
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        method=settings.method,
        scope=job.scope,
        asked=settings.target.label,
        sparsity=out.sparsity,
        error=out.error,
        relative_error=out.relative_error,
        damping=out.damping,
        damping_asked=settings.damping,
        optimality=out.optimality,
        swaps=out.swaps,
        rows=rows,
        columns=layer.width,
        dead_columns=out.dead_columns,
        backend=out.backend,
        status=out.status,
        notes=out.notes,
        seconds_calibrating=calibrating,
        seconds_pruning=out.seconds,
        inherited=inherited,
        pattern=settings.resolved_pattern.name,
        dtype=str(out.weight.dtype).removeprefix("torch."),
        predicted=out.predicted,
        energy=out.energy,
        condition=out.condition,
        curve_sparsity=out.curve_sparsity,
        curve_error=out.curve_error,
        peak_memory=None if peak is None else peak.bytes(),
        peak_memory_device=None if peak is None else peak.device_bytes(),
    )
