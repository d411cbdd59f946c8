"""Adapters for other programs that prune: their names and habits, this package's kernels."""
