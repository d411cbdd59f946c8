"""The programs that compat replaces, loaded from a folder of their clones.

A folder holds OBC/trueobs.py and sparseml/src/sparseml/...; this repository contains none of them.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FISHER = "sparseml/src/sparseml/pytorch/sparsification/pruning/modifier_pruning_obs.py"


@contextlib.contextmanager
def trueobs(folder: Path) -> Iterator[ModuleType]:
    """OBC's module, without its output and, on machines without CUDA, its wait for CUDA."""
    place = str(folder / "OBC")
    wait = torch.cuda.synchronize
    before = {name: sys.modules.pop(name, None) for name in ("trueobs", "quant")}
    sys.path.insert(0, place)
    try:
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda device=None: None
        with contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module("trueobs")
        yield module
    finally:
        torch.cuda.synchronize = wait
        sys.path.remove(place)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def fisher_class(folder: Path) -> Any:
    """SparseML's ``EmpiricalBlockFisherInverse``, without the rest of SparseML."""
    path = folder / FISHER
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    chosen = [node for node in classes if node.name == "EmpiricalBlockFisherInverse"]
    names: dict[str, Any] = {"torch": torch, "math": math, "Tensor": torch.Tensor}
    exec(compile(ast.Module(chosen, []), str(path), "exec"), names)
    return names["EmpiricalBlockFisherInverse"]
