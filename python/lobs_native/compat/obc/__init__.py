"""A drop-in replacement for the solver of OBC (Optimal Brain Compression)."""

from lobs_native.compat.obc.host import HOST, TrueOBS

__all__ = ["HOST", "TrueOBS"]
