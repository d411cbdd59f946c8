"""The original programs that compat replaces, from clones in the folder ``LOBS_HOSTS``:
OBC/trueobs.py, sparseml/src/sparseml/... Without it, tests are skipped with a message."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hosts import originals


def _folder_with(path: str) -> Path:
    folder = os.environ.get("LOBS_HOSTS")
    if folder is None:
        pytest.skip("LOBS_HOSTS does not name a folder with the original programs")
    if not (Path(folder) / path).is_file():
        pytest.skip(f"LOBS_HOSTS has no {path}")
    return Path(folder)


def trueobs() -> AbstractContextManager[ModuleType]:
    """OBC's module."""
    return originals.trueobs(_folder_with("OBC/trueobs.py"))


def fisher_class() -> Any:
    """SparseML's ``EmpiricalBlockFisherInverse``."""
    return originals.fisher_class(_folder_with(originals.FISHER))
