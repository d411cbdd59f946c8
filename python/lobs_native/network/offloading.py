"""Whether, and for how long, the parameters of a network are offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from lobs_native.calibration.offload import Offload
from lobs_native.files.mapped import check_system
from lobs_native.files.shelf import Place
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.whole_modules import refuse_pieces

__all__ = ["offloaded"]


@contextlib.contextmanager
def offloaded(
    model: nn.Module,
    settings: NetworkSettings,
    places: Mapping[str, Place],
    known: Offload | None = None,
) -> Iterator[Offload | None]:
    """What offloads the parameters if the settings ask for it: what is ``known`` already, or
    something for as long as the context lasts."""
    refuse_pieces(model)
    if known is not None or settings.offload is None or not isinstance(model, nn.Module):
        yield known
        return
    check_system("offload")
    offload = Offload(model, Path(settings.offload), places)
    try:
        yield offload
    finally:
        offload.close()
