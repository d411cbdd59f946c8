"""The rivals, one file per operation: what has been published, and the best that torch can do.

All are written here. A published method keeps its slow habits, except where noted; a tuned one may
use anything that torch offers. None of them checks its inputs; the native operations do. Block
sizes were chosen by timing on two cores with AVX-512.
"""
