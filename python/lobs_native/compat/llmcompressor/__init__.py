"""llm-compressor: our pruning as a modifier of its own, and its SparseGPT on our kernels."""

from lobs_native.compat.llmcompressor.functions import (
    HOST,
    __getattr__,  # noqa: F401  (LOBSModifier, when it is first asked for)
    accumulate_hessian,
    make_empty_hessian,
    sparsify_weight,
)

__all__ = ["HOST", "LOBSModifier", "accumulate_hessian", "make_empty_hessian", "sparsify_weight"]
