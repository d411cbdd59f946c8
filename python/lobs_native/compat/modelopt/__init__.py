"""NVIDIA Model-Optimizer: our pruning as one of its sparsity modes."""

from lobs_native.compat.modelopt.registration import register

__all__ = ["register"]
