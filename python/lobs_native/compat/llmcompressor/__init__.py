"""llm-compressor: a modifier for this package's pruning, and its SparseGPT on our kernels."""

from lobs_native.compat.llmcompressor.functions import (
    HOST,
    __getattr__,  # noqa: F401  (imports LOBSModifier on first use)
    accumulate_hessian,
    make_empty_hessian,
    sparsify_weight,
)

__all__ = ["HOST", "LOBSModifier", "accumulate_hessian", "make_empty_hessian", "sparsify_weight"]
