"""Our solvers under the names of other pruning programs ("hosts"), and the means to put them there.

``patch`` replaces a host's own classes and functions while a ``with`` block lasts; the modules of
this package hold what it puts in their place, and can also be imported by name. No host is imported
here: each module is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from lobs_native.compat.hosts import HOSTS
from lobs_native.compat.patching import patch
from lobs_native.compat.record import Record

__all__ = ["HOSTS", "Record", "patch"]

_BY_NAME = {  # what a patch can put into hosts, and what is used by its name only
    **HOSTS,
    "modelopt": "lobs_native.compat.modelopt",
    "torch_prune": "lobs_native.compat.torch_prune",
}


def __getattr__(name: str) -> Any:
    """Load ``lobs_native.compat.sparsegpt`` and the like on first use."""
    if name in _BY_NAME:
        return importlib.import_module(_BY_NAME[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
