"""The exceptions of this package. When one of them is raised, nothing has been written."""

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
    "RankError",
    "ShapeError",
]


class LobsError(Exception):
    """Base class. The message names the argument, its value, and what to do about it."""

    rank: int | None = None  # which of several ranks it comes from; None if that is this process


class ArgumentError(LobsError, ValueError):
    """A value is out of range, or arguments contradict each other."""


class DtypeError(LobsError, TypeError):
    """An argument has the wrong type or dtype: convert it as the message says."""


class ShapeError(LobsError, ValueError):
    """Sizes, layouts or devices disagree: the message names both."""


class NonFiniteError(LobsError, ValueError):
    """An input contains a NaN or an infinity: find out where it comes from before pruning."""

    flat: int | None = None  # flat index in the tensor, if known


class PatternError(LobsError, ValueError):
    """The sparsity pattern does not exist, or does not fit the layer."""


class NotPositiveDefiniteError(LobsError):
    """The second moment could not be inverted, even with the most damping that is tried
    automatically: raise ``damping``."""


class BackendError(LobsError):
    """The backend or device is unknown, unusable on this machine, or lacks the operation: see
    ``backends()``."""


class CheckpointError(LobsError):
    """A file could not be written, or its contents are not what they claim to be."""


class HostError(LobsError):
    """A host's code is not the code that ``lobs_native.compat`` replaces."""


class RankError(LobsError):
    """Another process of a run on several has ended, failed or gone another way: see ``group`` of
    :func:`lobs_native.prune`."""
