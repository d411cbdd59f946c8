"""SparseGPT's AblateGPT under the name it has had here."""

from lobs_native.compat.sparsegpt.ablate import AblateGPT

__all__ = ["AblateGPT"]
