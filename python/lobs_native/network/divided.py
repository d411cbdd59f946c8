"""How the layers that are pruned at the same time are divided among ranks: some by their rows, on
all ranks together, the others whole, each on one rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lobs_native.calibration.ranks import Ranks
from lobs_native.network.resources import in_products
from lobs_native.network.selection import LayerJob
from lobs_native.solvers.extent import Flops
from lobs_native.solvers.methods import method_of
from lobs_native.solvers.rows import Rows, blocks

__all__ = ["SharedRows", "Work", "divided", "owners"]

_GAIN = 1.25  # by which the time of all layers must fall if the rows of some are shared
_WORTH = 1e10  # operations that it must save as well: exchanges take some time


class SharedRows(Rows):
    """The rows of a layer, shared by the ranks of a run."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size

    def joined(self, own: Tensor, count: int, *, whole_blocks: bool = False) -> Tensor:
        """See :class:`Rows`."""
        ends = self.ends(count, whole_blocks=whole_blocks)
        counts = [stop - start for start, stop in itertools.pairwise(ends)]
        return self.ranks.joined("rows of a layer", own, counts)

    def values(self, own: Sequence[int]) -> list[list[int]]:
        """See :class:`Rows`."""
        return self.ranks.all_values("numbers of the rows of a layer", list(own))


@dataclass(frozen=True)
class Work:
    """The arithmetic of pruning a layer, in operations of float32 products."""

    whole: float
    shared: float  # of each rank, if they share the rows

    @classmethod
    def of(cls, job: LayerJob, size: int) -> Work:
        extent = job.extent
        method = method_of(job.settings.method, job.settings.resolved_pattern)
        refining = _refining(job)
        whole = in_products(method.flops(extent) + refining)
        if extent.groups > 1:
            return cls(whole, whole)
        by_row = in_products(method.flops_by_row(extent) + refining)
        parts = len(blocks(extent.rows)) if method.in_blocks else extent.rows
        return cls(whole, whole - by_row * (1 - 1 / min(size, parts)))


def _refining(job: LayerJob) -> Flops:
    """The arithmetic of ``refine``, without exchanges, whose number is not known before."""
    extent = job.extent
    kept, D = 1 - extent.share, extent.order
    each = {None: 0.0, "solve": kept**3 * D / 3, "exchange": extent.share * D}
    return Flops(double=each[job.settings.refine] * D * extent.weights)


def divided(jobs: Sequence[LayerJob], size: int) -> list[LayerJob]:
    """Those of the jobs whose rows are shared by ``size`` ranks: the largest ones, and only where
    that makes the whole faster, as far as arithmetic tells."""
    works = [Work.of(job, size) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda i: (-works[i].whole, i))
    fair = sum(work.whole for work in works) / max(1, size)
    large = [i for i in order if works[i].whole > fair and works[i].shared < works[i].whole]

    def span(some: Sequence[int]) -> float:
        """How long it takes if these are shared."""
        loads = [0.0] * size
        for i in order:
            if i not in some:
                loads[loads.index(min(loads))] += works[i].whole
        return max(loads) + sum(works[i].shared for i in some)

    choices = [large[:n] for n in range(len(large) + 1)]
    best = min(choices, key=span)
    gained = span([]) - span(best)
    worth = gained >= _WORTH and span([]) >= _GAIN * span(best)
    return [jobs[i] for i in sorted(best)] if worth else []


def owners(ranks: Ranks, jobs: Sequence[LayerJob]) -> dict[str, int]:
    """By name, the rank that prunes each layer, or computes its costs. The next largest one goes to
    the rank that has the least to do of these, or of all layers so far."""
    works = {job.layer.name: Work.of(job, 1).whole for job in jobs}
    here = [0.0] * ranks.size
    found = {}
    for name in sorted(works, key=lambda name: -works[name]):
        found[name] = owner = ranks.owner_of(works[name], here)
        here[owner] += works[name]
    return found
