"""Drop-in replacements for the solvers of other pruning programs ("hosts").

``patch`` replaces a host's own classes and functions inside a ``with`` block. The replacements can
also be imported from the modules of this package. No host is imported here: each module is loaded
on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from lobs_native.compat.hosts import HOSTS
from lobs_native.compat.patching import patch
from lobs_native.compat.record import Record

__all__ = ["HOSTS", "Record", "patch"]

_BY_NAME = {  # hosts that can be patched, and modules that are only imported by name
    **HOSTS,
    "modelopt": "lobs_native.compat.modelopt",
    "torch_prune": "lobs_native.compat.torch_prune",
}


def __getattr__(name: str) -> Any:
    """Load ``lobs_native.compat.sparsegpt`` and the like on first use."""
    if name in _BY_NAME:
        return importlib.import_module(_BY_NAME[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
