"""What pruning a network will take, before it is pruned: ``plan_prune``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from lobs_native.calibration.ranks import Ranks
from lobs_native.errors import ArgumentError
from lobs_native.network.gathering import gathered
from lobs_native.network.offloading import offloaded
from lobs_native.network.pruning import Pruning
from lobs_native.network.resources import RunPlan
from lobs_native.network.settings import NetworkSettings, chosen_of

__all__ = ["plan_prune"]


def plan_prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    settings: NetworkSettings | None = None,
    group: Any = None,
    original: nn.Module | None = None,
    **arguments: Any,
) -> RunPlan:
    """Estimate the memory, disk and time that :func:`lobs_native.prune` takes with the same
    arguments.

    Runs the model on the first and on the largest batch a few times. Changes nothing but the
    device of the model, if one is passed, and shows no progress bars unless ``progress`` is passed.
    With ``group``, all of its ranks call it; parameters in pieces (DTensor) are gathered meanwhile.

    Returns
    -------
    RunPlan
        Bytes and seconds; ``str()`` gives a line to read.

    Raises
    ------
    MemoryError
        ``memory`` is too small; the message says for which layer, and what it needs.
    LobsError
        Everything that prune raises before it starts.
    """
    known = [field.name for field in dataclasses.fields(NetworkSettings)]
    for name in arguments:
        if name not in known:
            raise ArgumentError(
                f"{name}: prune has no such argument; it has model, calibration, settings, "
                f"group, original, {', '.join(known)}"
            )
    chosen = chosen_of(settings, NetworkSettings(**arguments))
    if settings is None and "progress" not in arguments:
        chosen = dataclasses.replace(chosen, progress=False)
    ranks = Ranks(group)
    try:
        with (
            gathered(model, calibration, chosen, ranks) as gathering,
            offloaded(model, chosen, gathering.places) as offload,
        ):
            how = (gathering.places, None, ranks, offload, original, gathering.pieces)
            return Pruning(model, gathering.calibration, chosen, *how).plan(stacklevel=2)
    except BaseException as error:
        ranks.tell(error)
        raise
