"""What a host module declares, and the table of known hosts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lobs_native.errors import ArgumentError

__all__ = ["HOSTS", "Call", "Difference", "Host", "Replacement", "Tolerance", "find_host"]

# Name of a host -> the module of ours whose HOST describes it; imported when asked for.
HOSTS: dict[str, str] = {
    "sparsegpt": "lobs_native.compat.sparsegpt",
    "llmcompressor": "lobs_native.compat.llmcompressor",
}


@dataclass(frozen=True)
class Difference:
    """How far a result of ours lies from the host's own on the same input."""

    values: float  # largest |ours - theirs| over largest |theirs|, rows of equal mask only
    mask: int = 0  # entries that are zero on one side only
    entries: int = 0  # entries compared
    rounding: float = 0.0  # machine epsilon of the dtype that both were stored in

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Difference:
        """Compare two weights (R, ...) of the same shape, with zeros where weights were removed.

        A row whose masks differ has other repairs as well, so values are compared in the other
        rows; if there are none, in all.
        """
        a, b = (x.detach().reshape(len(x), -1).to(torch.float64) for x in (ours, theirs))
        apart = (a == 0) != (b == 0)
        rows = ~apart.any(dim=1)
        if not bool(rows.any()):
            rows = ~rows
        largest = float(b.abs().max()) if b.numel() else 0.0
        gap = float((a - b)[rows].abs().max()) if b.numel() else 0.0
        return cls(
            values=gap / largest if largest else gap,
            mask=int(apart.sum()),
            entries=b.numel(),
            rounding=torch.finfo(ours.dtype).eps if ours.dtype.itemsize < 4 else 0.0,
        )


@dataclass(frozen=True)
class Tolerance:
    """What a host module promises: beyond it, a verified call warns."""

    values: float = 1e-4  # of ``Difference.values``, besides the rounding of the dtype
    mask: float = 1e-3  # share of entries whose masks may differ, after ties of scores

    def exceeded_by(self, found: Difference) -> bool:
        """Whether a difference is larger than promised; a NaN is."""
        within = found.values <= self.values + found.rounding
        return not (within and found.mask <= self.mask * found.entries)


@dataclass(frozen=True)
class Call:
    """A call that is about to happen, for ``Replacement.verify``."""

    original: Any  # the host's class or function
    instance: Any  # our object, whose method is called; None for a function
    method: str  # "" for a function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Compare = Callable[[Any], Difference]


@dataclass(frozen=True)
class Replacement:
    """One class or function of a host and what takes its place.

    ``signatures`` says what the host's must look like, annotations left out: for a class, method ->
    the texts that are accepted; for a function, the key is ``""``. Anything else is refused.

    ``verify(call)`` is called before ours, to copy what is about to be changed, and returns
    ``compare(result)``, which runs the host's own code on the copies and compares.
    """

    modules: tuple[str, ...]  # importable names under which the host's module is known
    attribute: str  # "SparseGPT"; "Class.method" replaces a method alone
    ours: Any  # a class or a function
    signatures: Mapping[str, tuple[str, ...]]
    methods: tuple[str, ...] = ()  # of a class: those that are timed and verified
    verify: Callable[[Call], Compare | None] | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class Host:
    """A host: its name here and what of it is replaced."""

    name: str
    replacements: tuple[Replacement, ...]


def find_host(name: str | Host) -> Host:
    """The host of that name; a ``Host`` is returned as it is."""
    if isinstance(name, Host):
        return name
    if name not in HOSTS:
        raise ArgumentError(f"hosts: there is none called {name!r}; known: {', '.join(HOSTS)}")
    host = importlib.import_module(HOSTS[name]).HOST
    assert isinstance(host, Host)
    return host
