"""The operations: each checks its tensors, chooses a backend, calls it, and raises what failed."""

from lobs_native.ops.admm import AdmmStep, admm_step_
from lobs_native.ops.columns import ColumnLayer, ColumnsTrace, columns_trace
from lobs_native.ops.conjugate import conjugate_step_
from lobs_native.ops.dispatch import backends, levels, select_backend
from lobs_native.ops.exact import MAX_BLOCK, Trace, affordable_threads, exact_bytes, exact_trace
from lobs_native.ops.exchange import exchange_
from lobs_native.ops.hessian import hessian_accumulate_
from lobs_native.ops.inverse import inverse_update_
from lobs_native.ops.native import (
    WeightState,
    full_precision,
    on_device,
    one_thread,
    parallel_runtime,
    threads,
)
from lobs_native.ops.native import core as _core
from lobs_native.ops.ranking import rank_lowest, rank_rows
from lobs_native.ops.saliency import saliency_argmin
from lobs_native.ops.sliced import SlicedWeight, sliced_linear
from lobs_native.ops.solve import support_solve_
from lobs_native.ops.static_order import static_order_prune_
from lobs_native.ops.sweep import sweep_block_

__all__ = [
    "MAX_BLOCK",
    "AdmmStep",
    "ColumnLayer",
    "ColumnsTrace",
    "SlicedWeight",
    "Trace",
    "WeightState",
    "_core",
    "admm_step_",
    "affordable_threads",
    "backends",
    "columns_trace",
    "conjugate_step_",
    "exact_bytes",
    "exact_trace",
    "exchange_",
    "full_precision",
    "hessian_accumulate_",
    "inverse_update_",
    "levels",
    "on_device",
    "one_thread",
    "parallel_runtime",
    "rank_lowest",
    "rank_rows",
    "saliency_argmin",
    "select_backend",
    "sliced_linear",
    "static_order_prune_",
    "support_solve_",
    "sweep_block_",
    "threads",
]
