"""The originals that compat stands for, where ``LOBS_HOSTS=FOLDER`` names a folder of their clones:
OBC/trueobs.py, sparseml/src/sparseml/... Tests without it say so and are skipped."""

from __future__ import annotations

import ast
import importlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FISHER = "sparseml/src/sparseml/pytorch/sparsification/pruning/modifier_pruning_obs.py"


def file_of(path: str) -> Path:
    """A file below the folder of hosts; the test is skipped where there is none."""
    folder = os.environ.get("LOBS_HOSTS")
    if folder is None:
        pytest.skip("LOBS_HOSTS names no folder with the original programs")
    found = Path(folder) / path
    if not found.is_file():
        pytest.skip(f"LOBS_HOSTS has no {path}")
    return found


@contextmanager
def trueobs() -> Iterator[ModuleType]:
    """OBC's module, which waits for CUDA and imports its neighbour ``quant`` by name."""
    folder = str(file_of("OBC/trueobs.py").parent)
    wait = torch.cuda.synchronize
    before = {name: sys.modules.pop(name, None) for name in ("trueobs", "quant")}
    sys.path.insert(0, folder)
    try:
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda device=None: None
        yield importlib.import_module("trueobs")
    finally:
        torch.cuda.synchronize = wait
        sys.path.remove(folder)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def fisher_class() -> Any:
    """SparseML's ``EmpiricalBlockFisherInverse``, without the rest of SparseML."""
    path = file_of(FISHER)
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    chosen = [node for node in classes if node.name == "EmpiricalBlockFisherInverse"]
    names: dict[str, Any] = {"torch": torch, "math": math, "Tensor": torch.Tensor}
    exec(compile(ast.Module(chosen, []), str(path), "exec"), names)
    return names["EmpiricalBlockFisherInverse"]
