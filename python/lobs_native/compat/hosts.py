"""The declarations of a host module, and the table of known hosts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lobs_native.errors import ArgumentError

__all__ = ["HOSTS", "Call", "Difference", "Host", "Replacement", "Tolerance", "find_host"]

# Name of a host -> our module whose HOST describes it. It is imported on first use.
HOSTS: dict[str, str] = {
    "fisher": "lobs_native.compat.fisher",
    "obc": "lobs_native.compat.obc",
    "sparsegpt": "lobs_native.compat.sparsegpt",
    "llmcompressor": "lobs_native.compat.llmcompressor",
}


@dataclass(frozen=True)
class Difference:
    """The difference between our result and the host's own on the same input."""

    values: float  # largest |ours - theirs| over largest |theirs|, in rows with equal masks
    mask: int = 0  # number of entries that are zero on one side only
    entries: int = 0  # number of entries compared
    rounding: float = 0.0  # machine epsilon of the dtype in which both are stored

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Difference:
        """Compare two weights (R, ...) of the same shape, which are zero where pruned.

        Where the masks of a row differ, so do its repaired values. Values are therefore compared in
        rows with equal masks, or in all rows if there are none.
        """
        a, b = (x.detach().reshape(len(x), -1).to(torch.float64) for x in (ours, theirs))
        different = (a == 0) != (b == 0)
        rows = ~different.any(dim=1)
        if not bool(rows.any()):
            rows = ~rows
        largest = float(b.abs().max()) if b.numel() else 0.0
        gap = float((a - b)[rows].abs().max()) if b.numel() else 0.0
        return cls(
            values=gap / largest if largest else gap,
            mask=int(different.sum()),
            entries=b.numel(),
            rounding=torch.finfo(ours.dtype).eps if ours.dtype.itemsize < 4 else 0.0,
        )


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that a host module allows. A verified call beyond it warns."""

    values: float = 1e-4  # of ``Difference.values``, besides the rounding of the dtype
    mask: float = 1e-3  # share of entries whose masks may differ, because of tied scores

    def exceeded_by(self, difference: Difference) -> bool:
        """Whether a difference is larger than allowed; a NaN is."""
        within = difference.values <= self.values + difference.rounding
        return not (within and difference.mask <= self.mask * difference.entries)


@dataclass(frozen=True)
class Call:
    """A call that is about to be made, for ``Replacement.verify``."""

    original: Any  # the host's class or function
    instance: Any  # our object, whose method is called; None for a function
    method: str  # "" for a function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Compare = Callable[[Any], Difference]


@dataclass(frozen=True)
class Replacement:
    """A class or function of a host and its replacement.

    ``signatures`` has the accepted signatures of the host's object, as text without annotations:
    for a class by method, for a function under the key ``""``. Anything else is refused.

    ``verify(call)`` runs before our code, to copy what that is about to change. It returns
    ``compare(result)``, which runs the host's own code on the copies and compares the results.
    """

    modules: tuple[str, ...]  # names under which the host's module may be imported
    attribute: str  # "SparseGPT"; "Class.method" replaces a method alone
    ours: Any  # a class or a function
    signatures: Mapping[str, tuple[str, ...]]
    methods: tuple[str, ...] = ()  # methods of a class that are timed and verified
    verify: Callable[[Call], Compare | None] | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class Host:
    """A host: its name in this package, and its replacements."""

    name: str
    replacements: tuple[Replacement, ...]


def find_host(name: str | Host) -> Host:
    """The host of that name. A ``Host`` is returned unchanged."""
    if isinstance(name, Host):
        return name
    if name not in HOSTS:
        raise ArgumentError(f"hosts: unknown host {name!r}; known: {', '.join(HOSTS)}")
    host = importlib.import_module(HOSTS[name]).HOST
    assert isinstance(host, Host)
    return host
