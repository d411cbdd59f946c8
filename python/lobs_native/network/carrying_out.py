"""A run of :func:`lobs_native.prune` from its settings to its report, on one process or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.offload import Offload
from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.replay import UnlikeError
from lobs_native.files.shelf import Place
from lobs_native.network.gathering import gathered
from lobs_native.network.offloading import offloaded
from lobs_native.network.pruning import Pruning
from lobs_native.network.settings import NetworkSettings
from lobs_native.report.report import Report

__all__ = ["carried_out"]


def carried_out(
    model: nn.Module,
    calibration: Iterable[Any],
    settings: NetworkSettings,
    places: Mapping[str, Place] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    group: Any = None,
    offload: Offload | None = None,
    original: nn.Module | None = None,
) -> Report:
    """:func:`prune`; ``places`` says where parameters lie in files, as far as known, and ``masks``
    (G, R, C) what may stay of some layers, which then lose the rest and nothing else. ``offload``
    is that of the model, where it was made before, and ``original`` as in :func:`prune`."""
    ranks = Ranks(group)
    try:
        with (
            gathered(model, calibration, settings, ranks) as gathering,
            offloaded(model, settings, {**(places or {}), **gathering.places}, offload) as offload,
        ):
            how = (places, masks, ranks, offload, original, gathering.pieces)
            pruning = Pruning(model, gathering.calibration, settings, *how)
            try:
                return _with(pruning.carry_out(), gathering.summary())
            except UnlikeError as error:  # seen at the end: what flows between blocks has changed
                if settings.run_dir is not None:
                    raise
                reason = str(error).removesuffix("; pass blocks=None")
            whole = dataclasses.replace(settings, blocks=None)
            report = Pruning(model, pruning.batches, whole, *how).carry_out()
            return _with(report, {"no blocks": [reason], **gathering.summary()})
    except BaseException as error:
        ranks.tell(error)
        raise


def _with(report: Report, more: Mapping[str, Any]) -> Report:
    """The report with more in its settings."""
    return dataclasses.replace(report, settings={**report.settings, **more}) if more else report
