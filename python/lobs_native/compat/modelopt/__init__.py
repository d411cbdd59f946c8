"""NVIDIA Model-Optimizer: this package's pruning as a sparsity mode."""

from lobs_native.compat.modelopt.registration import register

__all__ = ["register"]
