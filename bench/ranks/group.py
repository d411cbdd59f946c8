"""The group of processes on this computer, what they are compared by, and the file of results, for
benches and tests."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import lobs_native as lobs

__all__ = ["bits_of", "joined", "keep"]


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


def bits_of(model: nn.Module, report: lobs.Report) -> str:
    """A hash of all bits of a network, and of what the report says of layers and output."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    digest.update(repr([(x.name, x.error, x.notes) for x in report.layers]).encode())
    digest.update(repr(report.error_bound).encode())
    return digest.hexdigest()


def keep(file: Path, part: str, found: Any) -> None:
    """Write what one bench found, and where, into its part of the file; the others stay."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[part] = {
        "cores": os.cpu_count(),
        "threads of a rank": 1,
        "processor level": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "lobs_native": lobs.__version__,
        "found": found,
    }
    file.write_text(json.dumps(results, indent=1) + "\n")
