"""Pruned networks at work: layers that skip zeros, times in the runtimes that are here, exports."""
