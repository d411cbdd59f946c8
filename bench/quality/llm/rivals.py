"""The classes of others, from a folder of clones of their repositories; and llm-compressor."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quality.llm.material import TARGETS

__all__ = ["PRODUCT", "RIVALS", "alps_module", "by_product"]

PRODUCT = "llm-compressor"


def sparsegpt(folder: Path) -> tuple[Any, Callable[[Any, str], None]]:
    """SparseGPT's class, and what its script calls."""
    sys.path.insert(0, str(folder / "sparsegpt"))
    kind = importlib.import_module("sparsegpt").SparseGPT

    def remove(pruner: Any, target: str) -> None:
        setting = TARGETS[target]
        n, m = map(int, setting.get("pattern", "0:0").split(":"))
        share = setting.get("sparsity", 0.0)
        pruner.fasterprune(share, prunen=m - n, prunem=m, percdamp=0.01, blocksize=128)

    return kind, remove


def alps_module(clone: Path) -> types.ModuleType:
    """ALPS's module, on the CPU."""
    source = (clone / "alps.py").read_text(encoding="utf-8")
    source = source.replace("cuda:0", "cpu").replace("torch.cuda.synchronize()", "pass")
    module = types.ModuleType("alps")
    exec(compile(source, "alps.py", "exec"), vars(module))
    return module


def alps(folder: Path) -> tuple[Any, Callable[[Any, str], None]]:
    """ALPS's class on the CPU, and what its script calls."""
    module = alps_module(folder / "ALPS")

    def kind(layer: nn.Module) -> Any:
        return module.ALPS_prune(layer, 1, 1)

    def remove(pruner: Any, target: str) -> None:
        setting = TARGETS[target]
        n, m = map(int, setting.get("pattern", "0:0").split(":"))
        pruner.ALPS_admm(sp=setting.get("sparsity", 0.0), nm_n=n, nm_m=m, rho=0.1)

    return kind, remove


def by_product(model: Any, windows: Tensor, target: str, blocks: int) -> None:
    """llm-compressor's oneshot with its SparseGPTModifier, in place, on the first blocks."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from torch.utils.data import DataLoader

    setting = TARGETS[target]
    n, m = map(int, setting.get("pattern", "0:0").split(":"))
    others = range(blocks, model.config.num_hidden_layers)
    modifier = SparseGPTModifier(
        sparsity=setting.get("sparsity", n / m if m else None),
        mask_structure=f"{m - n}:{m}",
        ignore=["re:.*lm_head", *(rf"re:.*\.layers\.{block}\..*" for block in others)],
    )
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in windows.split(1)]
    oneshot(
        model=model,
        dataset=DataLoader(batches, batch_size=None),
        recipe=[modifier],
        num_calibration_samples=len(batches),
    )


# Folder of clones -> the class that sees a layer's inputs, and what removes to a target by it.
RIVALS = {"sparsegpt": sparsegpt, "alps": alps}
