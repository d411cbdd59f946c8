"""The exceptions of this package. Nothing has been written when one of them is raised."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DtypeError",
    "HostError",
    "LobsError",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "PatternError",
    "ShapeError",
]


class LobsError(Exception):
    """Base of all of them. The message names the argument, its value, and the way out."""


class ArgumentError(LobsError, ValueError):
    """A value is outside its range, or arguments contradict each other: see the message."""


class DtypeError(LobsError, TypeError):
    """Something of the wrong kind: convert it as the message says."""


class ShapeError(LobsError, ValueError):
    """Sizes, layouts or devices disagree: the message names both."""


class NonFiniteError(LobsError, ValueError):
    """A NaN or an infinity in an input: find where it comes from before you prune."""

    flat: int | None = None  # flat index in the tensor, where it is known


class PatternError(LobsError, ValueError):
    """A sparsity pattern that does not exist or does not fit the layer."""


class NotPositiveDefiniteError(LobsError):
    """The second moment could not be inverted at any step of the ladder: raise ``damping``."""


class BackendError(LobsError):
    """The backend is unknown, not usable here, or lacks the operation: see ``backends()``."""


class CheckpointError(LobsError):
    """A file could not be written or is not what it claims to be."""


class HostError(LobsError):
    """A host's code is not what ``lobs_native.compat`` replaces: see the message."""
