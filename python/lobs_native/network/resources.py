"""Estimates of the memory, disk and time that pruning a network takes, and the division of a limit
on memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lobs_native.calibration.differences import AT_ONCE, Gap
from lobs_native.calibration.ranks import ALONE, Ranks
from lobs_native.layers.conv import PATCH_BYTES, Conv
from lobs_native.network.packed import packed_bytes
from lobs_native.network.selection import LayerJob, weights_of
from lobs_native.network.settings import NetworkSettings
from lobs_native.solvers.extent import Flops
from lobs_native.solvers.measurement import measuring_bytes
from lobs_native.solvers.method import Method
from lobs_native.solvers.methods import method_of

__all__ = ["RunPlan", "Workload", "in_products", "plan_run", "waiting_limit"]

STATISTICS = 4 << 30  # the most bytes of second moments from one pass without a limit
_WAITING = 4 << 20  # bytes of outputs that wait in memory without a limit
_REMOVAL, _DOUBLE = 0.4, 0.4  # speed of exact removal and of float64 relative to float32 products
_BETWEEN = 16  # the part of a limit that is left for what lies between tensors in memory
_MEASURED = 512  # order of the products that are timed
_SHORT, _BRIEFLY, _LONG = 2.0, 0.002, 0.2  # seconds: of a short job, and of measuring the speed


def waiting_limit(memory: int | None) -> int:
    """Bytes of the original network's outputs that wait in memory, given a run's limit on it; the
    rest is on disk."""
    return _WAITING if memory is None else 0


@dataclass(frozen=True)
class Workload:
    """Measurements of the model and the data: a forward pass, and what flows between blocks."""

    batches: float  # size of all batches relative to the first
    forward: float  # seconds of one forward pass over all batches
    rows: dict[str, float]  # rows of the first batch for each layer
    sets: int = 1  # of sums at a time: over the chunk at hand, and over those before it
    states: int = 0  # bytes of hidden states between blocks, of all batches
    repeated: int = 0  # bytes of outputs of finished parts of a block, which a limit does not allow
    put_aside: int = 0  # more of them, on disk
    others: int = 0  # bytes of everything else that blocks are called with
    token_weights: int = 0  # bytes
    tuning: int = 0  # bytes that tuning a block, or the network, takes
    targets: int = 0  # bytes of the original outputs that the network is tuned towards, on disk
    passes: float = 0.0  # forward passes over all batches
    backward: bool = False  # whether there is a backward pass too
    norms: float = 0.0  # float64 operations of the norms of Theorem 3.2
    output: int = 0  # bytes of the model's output for a batch
    sample: int = 0  # of the original outputs for a sample, which wait for the end
    measuring: int = 0  # bytes that measuring it, or the norms of Theorem 3.2, takes besides
    idle: int = 0  # ranks without batches
    network: int = 0  # bytes of the model's parameters in memory at a time
    pieces: int = 0  # and those of this rank's pieces, where the parameters were gathered


@dataclass(frozen=True)
class RunPlan:
    """Bytes besides the network, its data, and its own forward pass, or forward and ``backward``
    pass, whose peak the report has ("peak memory of sensitivities"). ``str()`` gives a line to
    read."""

    largest: str  # the layer that needs the most
    layer: int  # bytes that pruning it takes: second moment, inverse, trace, scratch; or tuning
    statistics: int  # sums for second moments of other layers at the same time
    states: int  # hidden states between blocks
    kept: int  # original weights and outputs, results that wait or weights that are swapped
    masks: int  # as bits; those of the report come last, and take a byte for each weight
    token_weights: int  # one for each row of each layer
    output: int  # measuring the output at the end, with the original network's for a batch
    disk: int  # states, weights and outputs that do not fit into memory
    backward: bool  # for sensitivities, or to tune the network: it takes memory as well
    seconds: float  # an estimate; expect half to twice of it
    limit: int | None
    scratch: int | None  # limit on the scratch of one layer
    statistics_limit: int  # limits on what can be divided: second moments from one pass
    states_limit: int | None
    kept_limit: int | None  # of original weights; the same again of results or swapped weights
    swapped_limit: int | None
    output_limit: int | None
    network: int  # the model's parameters in memory at a time, which come on top
    offloaded: int  # in the folder of offloaded weights: pruned ones, and masks
    pieces: int = 0  # this rank's pieces of gathered parameters (DTensor), beside the network
    idle: int = 0  # ranks that only prune layers: there are more of them than chunks of batches

    @property
    def memory(self) -> int:
        """The most bytes in memory at a time."""
        most = max(self.layer + self.statistics + self.states, self.output)
        return most + self.kept + self.masks + self.token_weights

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for the report."""
        return {"memory": self.memory, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        def mb(size: int) -> str:
            return f"{size / 1e6:,.0f} MB"

        model = "the model"
        if self.offloaded:
            model = f"{mb(self.network)} of the model at a time"
        elif self.pieces:
            model = f"{mb(self.network)} of the gathered model"
        if self.pieces:
            model += f" and {mb(self.pieces)} of pieces of it"
        limit = "" if self.limit is None else f" of {mb(self.limit)} allowed"
        minutes, seconds = divmod(round(self.seconds), 60)
        about = f"{minutes} min {seconds} s" if minutes else f"{max(1, seconds)} s"
        passes = "a forward and a backward pass" if self.backward else "a forward pass"
        idle = f"; {self.idle} ranks have no batches to run" if self.idle else ""
        return (
            f"plan: {mb(self.memory)}{limit} besides {model}, the data and {passes} "
            f"({mb(self.layer)} for {self.largest}, {mb(self.statistics)} other second moments, "
            f"{mb(self.states)} states, {mb(self.kept + self.token_weights)} weights, "
            f"{mb(self.masks)} masks; then {mb(self.output)} to measure the output); "
            f"{mb(self.disk)} on disk; about {about}{idle}"
        )


def _method(job: LayerJob) -> type[Method]:
    return method_of(job.settings.method, job.settings.resolved_pattern)


def _scratch_limit(jobs: Sequence[LayerJob], settings: NetworkSettings) -> int | None:
    """The part of the memory that kernels may take for one layer: a quarter, but at least what one
    thread needs."""
    if settings.memory is None:
        return None
    least = [_method(job).least_scratch(job.extent, settings.backend) for job in jobs]
    return max([settings.memory // 4, *least])


def _layer_memory(
    job: LayerJob, scratch: int | None, settings: NetworkSettings, rows: float, work: Workload
) -> int:
    """Bytes that pruning one layer takes: its second moments, of so many rows in so many batches,
    and all that is needed to sum them, and then by its method."""
    corrected = settings.inputs == "corrected"
    method, extent = _method(job), job.extent
    extent = dataclasses.replace(
        extent,
        inverted=extent.inverted or corrected,
        samples=math.inf if job.layer.routed else rows * work.batches,
    )
    removing = method.memory(extent, limit=scratch, backend=settings.backend).total
    sums = 8 * extent.weights if corrected else 0
    changed = (8 + 4) * extent.weights if corrected else 0  # and the weights as they were
    if corrected and Gap.pays([job.layer]):
        sums += 3 * job.moment_bytes
    elsewhere = job.moment_bytes + sums + changed if settings.held_back else 0
    # At the end, when scratch is free again: beside the result, and the inverse.
    measuring = measuring_bytes(extent) + (extent.kernel.itemsize + 1) * extent.weights
    measuring += 8 * extent.squares if method.inverts and not method.factor_alone else 0
    solving = max(removing, measuring) + changed
    summing = _summing_bytes(job, rows, corrected)
    summing += (work.sets - 1) * (job.moment_bytes + sums)
    return job.moment_bytes + sums + max(solving, summing) + elsewhere


def _summing_bytes(job: LayerJob, rows: float, corrected: bool) -> int:
    """Bytes of copies while the rows of a batch are added to the sums of a layer."""
    layer = job.layer
    R, C, size = layer.rows, layer.width, max(4, layer.weight().dtype.itemsize)
    inputs = round(rows) * C * size
    copied, kept = 0, inputs
    if isinstance(layer, Conv):  # patches, of images that are smaller
        copied = min(PATCH_BYTES, inputs * layer.groups)
        kept = round(inputs * layer.groups / math.prod(layer.kernel))
    if not corrected:
        return copied
    at_once = min(round(rows), AT_ONCE)
    outputs = 0 if Gap.pays([layer]) else R
    compared = at_once * (C + 2 * outputs) * size
    product = C * (outputs or C) * (size + 8)
    return 2 * copied + kept + compared + product


def plan_run(
    jobs: Sequence[LayerJob], work: Workload, settings: NetworkSettings, ranks: Ranks = ALONE
) -> RunPlan:
    """Divide ``settings.memory`` among all that pruning needs memory for. Of several ``ranks``, the
    first measures how fast arithmetic is.

    Raises MemoryError, with the layer and the bytes that it needs, if the limit is too small.
    """
    memory = settings.memory
    scratch = _scratch_limit(jobs, settings)
    corrected = settings.inputs == "corrected"
    rows = {job.layer.name: work.rows.get(job.layer.name, 0.0) for job in jobs}
    needs = {
        name: _layer_memory(job, scratch, settings, rows[name], work)
        for job in jobs
        for name in [job.layer.name]
    }
    largest = max(needs, key=lambda name: needs[name])
    weights = sum(
        p.numel() * p.element_size() for job in jobs for p in job.layer.parameters.values()
    )
    masks = sum(packed_bytes(weights_of(job.layer)) for job in jobs)
    most = max(needs[largest], work.measuring, work.tuning)
    fixed = most + masks + work.others + work.token_weights
    if memory is not None and fixed > memory:
        measured = most > max(needs[largest], work.tuning)
        what = "measuring the output" if measured else f"layer {largest!r}"
        if not measured and most > needs[largest]:
            what = f"tuning ({settings.tune!r})"
        raise MemoryError(
            f"memory: {what} needs {most:,} bytes, and masks, weights of tokens and what blocks "
            f"are called with {fixed - most:,}: {fixed:,} together, more than the {memory:,} "
            f"allowed; allow more, or {'pass smaller batches' if measured else 'exclude it'}"
            + (", or use inputs='pruned', which takes less" if corrected else "")
        )
    moments = {job.layer.name: job.moment_bytes * work.sets for job in jobs}
    together = settings.inputs == "dense" or any(job.shared for job in jobs)
    more = max(0, sum(moments.values()) - moments[largest]) if together else 0
    more = min(more, STATISTICS * work.sets)
    times = (
        1 if settings.inputs == "pruned" else 2
    )  # results wait until the end, or weights are swapped
    offloaded = 0
    if settings.offload is not None:  # nothing is copied to be swapped
        waiting_too = 2 if settings.inputs == "dense" else 1
        offloaded = weights * waiting_too + masks + sum(weights_of(job.layer) for job in jobs)
        weights = 0
    keeping = weights * times
    states_limit = kept_limit = swapped_limit = output_limit = None
    kept, statistics, output = keeping, more, work.output
    states = work.states + work.repeated
    waiting = min(work.sample, waiting_limit(memory))
    if memory is not None:
        left = max(0, memory - fixed - memory // _BETWEEN)
        statistics = min(more, left // 2)
        left -= statistics
        states_limit = states = min(work.states, max(left // 2, left - keeping))
        kept = min(keeping, left - states)
        kept_limit = kept // times
        swapped_limit = kept_limit if corrected else needs[largest]
        output_limit = most - work.measuring
        output = min(output, output_limit)
    elsewhere = work.put_aside if memory is None else work.states + keeping - states - kept
    return RunPlan(
        largest=largest,
        layer=max(needs[largest], work.tuning),
        statistics=statistics,
        states=states + work.others,
        kept=kept + waiting,
        masks=0 if offloaded else masks,
        token_weights=work.token_weights,
        output=output + work.measuring,
        disk=elsewhere + work.sample - waiting + work.targets + offloaded,
        backward=work.backward,
        seconds=_searching(_seconds(jobs, work, corrected, ranks), settings),
        limit=memory,
        scratch=scratch,
        statistics_limit=(statistics + moments[largest]) // work.sets,
        states_limit=states_limit,
        kept_limit=kept_limit,
        swapped_limit=swapped_limit,
        output_limit=output_limit,
        idle=work.idle,
        pieces=work.pieces,
        network=work.network,
        offloaded=offloaded,
    )


def _searching(once: float, settings: NetworkSettings) -> float:
    """The seconds of a run with its search, where a run without one takes ``once``."""
    if not settings.search:
        return once
    searching = once * (settings.search + 1)
    if settings.search_seconds is not None:  # the first division is always evaluated
        searching = min(searching, max(once, settings.search_seconds))
    return once + searching


def _seconds(jobs: Sequence[LayerJob], work: Workload, corrected: bool, ranks: Ranks) -> float:
    """From the time of one forward pass, the arithmetic to come, and the speed of a product."""
    products, doubles = 0.0, work.norms
    for job in jobs:
        extent, N = job.extent, work.rows.get(job.layer.name, 0.0) * work.batches
        products += N * extent.squares
        method = _method(job)
        if corrected:
            products += 6 * N * extent.weights
            doubles += 0.0 if method.inverts else 2.0 * extent.order * extent.squares
        products += in_products(method.flops(extent))
    operations = products + doubles / _DOUBLE
    spent = operations / _rate(_BRIEFLY, ranks)
    if spent > _SHORT:
        spent = operations / _rate(_LONG, ranks)
    return spent + work.forward * work.passes


def in_products(flops: Flops) -> float:
    """How many operations of float32 products take as long."""
    return flops.single + flops.double / _DOUBLE + flops.removal / _REMOVAL


def _rate(measuring: float, ranks: Ranks) -> float:
    """Floating-point operations per second of torch's float32 product here and now, on rank 0: the
    median over so many seconds, since another program may have the cores for some of them."""
    if not ranks.first:
        return float(ranks.value("the speed of a product", None))
    x = torch.ones(_MEASURED, _MEASURED)
    x @ x  # its library starts its threads
    seconds: list[float] = []
    while sum(seconds) < measuring:
        begun = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - begun)
    return float(ranks.value("the speed of a product", 2.0 * _MEASURED**3 / median(seconds)))
