"""Second-order, layer-wise pruning of trained PyTorch networks, with native kernels.

>>> import torch, lobs_native as lobs
>>> x, w = torch.randn(1000, 64), torch.randn(32, 64)
>>> h = lobs.Hessian(64).update(x)
>>> out = lobs.prune_weight(w, h, sparsity=0.5)
>>> int((out.weight == 0).sum())
1024
"""

import torch as _torch  # noqa: F401  (first: its OpenMP runtime is the one the kernels then share)

import lobs_native.library as _library  # noqa: F401  (torch.ops.lobs_native)
from lobs_native import compat
from lobs_native.batch_norm import reestimate_batch_norm
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    DtypeError,
    HostError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
    ShapeError,
)
from lobs_native.hessian import Hessian, StreamingInverse
from lobs_native.layers import Layer, register_layer
from lobs_native.masks import KeptMasks, apply_masks, as_torch_prune, keep_masks
from lobs_native.ops import backends
from lobs_native.plan import MemoryPlan, plan_memory
from lobs_native.pruner import plan_prune, prune
from lobs_native.report import ErrorBound, LayerReport, Report, Skipped
from lobs_native.run_plan import RunPlan
from lobs_native.trace import WeightTrace, trace_weight
from lobs_native.weight import PrunedWeight, prune_weight

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DtypeError",
    "ErrorBound",
    "Hessian",
    "HostError",
    "KeptMasks",
    "Layer",
    "LayerReport",
    "LobsError",
    "MemoryPlan",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "PatternError",
    "PrunedWeight",
    "Report",
    "RunPlan",
    "ShapeError",
    "Skipped",
    "StreamingInverse",
    "WeightTrace",
    "apply_masks",
    "as_torch_prune",
    "backends",
    "compat",
    "keep_masks",
    "plan_memory",
    "plan_prune",
    "prune",
    "prune_weight",
    "reestimate_batch_norm",
    "register_layer",
    "trace_weight",
]
