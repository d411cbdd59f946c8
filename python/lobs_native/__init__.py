"""Second-order, layer-wise pruning of trained PyTorch networks, with native kernels.

>>> import torch, lobs_native as lobs
>>> x, w = torch.randn(1000, 64), torch.randn(32, 64)
>>> h = lobs.Hessian(64).update(x)
>>> out = lobs.prune_weight(w, h, sparsity=0.5)
>>> int((out.weight == 0).sum())
1024
"""

import torch as _torch  # noqa: F401  (first: its OpenMP runtime is the one the kernels then share)

from lobs_native import compat
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
    RankError,
    ShapeError,
)
from lobs_native.files.compressed import load_compressed, save_compressed
from lobs_native.layers import Layer, register_layer
from lobs_native.network.batch_norm import reestimate_batch_norm
from lobs_native.network.folding import fold_weights
from lobs_native.network.inference.sparse_linear import (
    SparseLayers,
    SparseLinear,
    from_sparse,
    sparse_linear,
    to_sparse,
)
from lobs_native.network.inference.speed import compare_speed, measure_speed
from lobs_native.network.inference.speed_report import (
    EngineSpeed,
    LayerSpeed,
    SpeedComparison,
    SpeedReport,
)
from lobs_native.network.masks import (
    KeptMasks,
    apply_masks,
    as_torch_prune,
    keep_masks,
    pack_masks,
)
from lobs_native.network.planning import plan_prune
from lobs_native.network.pruner import prune
from lobs_native.network.resources import RunPlan
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shrinking.comparison import ShrinkTimes
from lobs_native.network.shrinking.shrink import shrink
from lobs_native.network.shrinking.shrink_report import ShrinkReport, Shrunk
from lobs_native.ops import backends
from lobs_native.ops import library as _library  # noqa: F401  (torch.ops.lobs_native)
from lobs_native.report.records import Coverage, ErrorBound, LayerReport, Skipped
from lobs_native.report.report import Report
from lobs_native.solvers.hessian import Hessian
from lobs_native.solvers.memory import MemoryPlan, plan_memory
from lobs_native.solvers.streaming_inverse import StreamingInverse
from lobs_native.solvers.trace import WeightTrace, trace_weight
from lobs_native.solvers.weight import PrunedWeight, prune_weight
from lobs_native.version import __version__

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "Coverage",
    "DtypeError",
    "EngineSpeed",
    "ErrorBound",
    "Hessian",
    "HostError",
    "KeptMasks",
    "Layer",
    "LayerReport",
    "LayerSpeed",
    "LobsError",
    "MemoryPlan",
    "NetworkSettings",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "PatternError",
    "PrunedWeight",
    "RankError",
    "Report",
    "RunPlan",
    "ShapeError",
    "ShrinkReport",
    "ShrinkTimes",
    "Shrunk",
    "Skipped",
    "SparseLayers",
    "SparseLinear",
    "SpeedComparison",
    "SpeedReport",
    "StreamingInverse",
    "WeightTrace",
    "__version__",
    "apply_masks",
    "as_torch_prune",
    "backends",
    "compare_speed",
    "compat",
    "fold_weights",
    "from_sparse",
    "keep_masks",
    "load_compressed",
    "measure_speed",
    "pack_masks",
    "plan_memory",
    "plan_prune",
    "prune",
    "prune_weight",
    "reestimate_batch_norm",
    "register_layer",
    "save_compressed",
    "shrink",
    "sparse_linear",
    "to_sparse",
    "trace_weight",
]
