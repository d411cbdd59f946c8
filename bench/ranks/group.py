"""The group of processes on this computer, for benches and tests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from torch import distributed

__all__ = ["joined"]


def joined(file: str | Path, rank: int, size: int, seconds: float) -> Any:
    """The group, with gloo, of the ``size`` processes that call this with one ``file``, which does
    not exist before. ``seconds``: how long one waits for another. RuntimeError if it waits longer.
    """
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    return distributed.group.WORLD
