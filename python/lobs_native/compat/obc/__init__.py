"""OBC (Optimal Brain Compression): a drop-in replacement of its solver."""

from lobs_native.compat.obc.host import HOST, TrueOBS

__all__ = ["HOST", "TrueOBS"]
