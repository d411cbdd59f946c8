"""SparseGPT, and wanda's copy of it: drop-in replacements of their classes."""

from lobs_native.compat.sparsegpt.solver import HOST, SparseGPT, SparseGPTOfWanda

__all__ = ["HOST", "SparseGPT", "SparseGPTOfWanda"]
