"""The version of this package, and those of the software it runs on."""

from __future__ import annotations

import platform

import numpy as np
import torch

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """The versions that a report records."""
    return {
        "lobs_native": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
