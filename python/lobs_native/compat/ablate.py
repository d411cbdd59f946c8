"""``AblateGPT``, importable as ``lobs_native.compat.ablate.AblateGPT``."""

from lobs_native.compat.sparsegpt.ablate import AblateGPT

__all__ = ["AblateGPT"]
