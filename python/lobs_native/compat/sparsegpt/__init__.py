"""Drop-in replacements for the classes of SparseGPT and of wanda's copy of it."""

from lobs_native.compat.sparsegpt.solver import HOST, SparseGPT, SparseGPTOfWanda

__all__ = ["HOST", "SparseGPT", "SparseGPTOfWanda"]
