"""The tensors in what a model returns, and how far they are from those of the original network."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lobs_native.calibration.distance import PIECE, Distance
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf

__all__ = [
    "MEASURING",
    "SAMPLE",
    "Change",
    "First",
    "Sample",
    "Samples",
    "check_classes",
    "compared",
    "floating_tensors",
    "held_back_loss",
    "keep_output",
    "measure_change",
    "sample_outputs",
    "sizes_of",
    "tokens_in",
    "vocabulary_of",
]

SAMPLE = 512  # rows of output in a sample
MEASURING = 4 * 8 * PIECE  # bytes that measuring takes besides the outputs


@dataclass(frozen=True)
class Change:
    """The distance of outputs from the original network's, over the data."""

    difference: float  # ||output - original||_F^2
    size: float  # ||original||_F^2
    rows: float
    batches: int


def floating_tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output: itself, or those in mappings, tuples, lists and
    dataclasses, however deep. Of a nested tensor, the values."""
    if isinstance(output, Tensor):
        if output.is_nested:
            output = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.unbind()])
        if output.is_floating_point() and output.ndim > 0:
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from floating_tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from floating_tensors(part)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from floating_tensors(getattr(output, field.name))


def sizes_of(output: Any) -> list[tuple[int, int]]:
    """The entries of each floating-point tensor in an output, and the bytes of one."""
    return [(x.numel(), x.element_size()) for x in floating_tensors(output)]


def tokens_in(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """``mask`` (B, T) with a 1 for every further dimension of ``x`` (B, T, ...), on its device;
    None if it does not fit."""
    if mask is None or x.shape[: mask.ndim] != mask.shape:
        return None
    return mask.to(x.device).reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


@dataclass(frozen=True)
class Sample:
    """What the original network returns for a sample of batches."""

    outputs: Shelf  # (number of the batch, number of the tensor, its shape) -> the tensor, flat
    chosen: frozenset[int]  # numbers of batches


@dataclass
class First:
    """What the original network returned for the first batch when it was looked at, if it was kept:
    a sample then need not run it again."""

    outputs: Shelf  # as in Sample
    rows: float | None = None  # of outputs that count; None if they were not kept

    def keep(self, session: Session, batch: Any, output: Any) -> None:
        """Keep a copy of the output for the first batch, if it is the original network's."""
        if session.differing:
            return
        self.rows = keep_output(self.outputs, 0, output, session, batch)


class Samples(NamedTuple):
    """What was kept beforehand, if anything was."""

    calibrated: Sample | None = None
    held_back: Sample | None = None


@torch.no_grad()
def sample_outputs(
    session: Session,
    outputs: Shelf,
    rows: int,
    *,
    held_back: bool = False,
    first: float | None = None,
) -> Sample:
    """Run the model, before it is pruned, on batches that have about so many rows of output
    together: as many as would be enough if all were like the first, evenly spaced. ``held_back``:
    of the batches that nothing is calibrated on. ``first``: the outputs for the first batch are
    there already, and have so many rows.

    The outputs go into ``outputs``. They are few, and having them spares a second copy of all
    pruned weights while :func:`measure_change` would run the original network.
    """
    batches, each = _data(session, held_back)
    chosen = {0} if first is None else _enough(batches, rows, first)
    for number, batch in enumerate(each("outputs")):
        if number not in chosen or (number == 0 and first is not None):
            continue
        found = keep_output(outputs, number, session.call_original(batch), session, batch)
        if number == 0:
            chosen = _enough(batches, rows, found)
    return Sample(outputs, frozenset(chosen))


def keep_output(shelf: Shelf, number: int, output: Any, session: Session, batch: Any) -> float:
    """Put a copy of the output for a batch on a shelf. Returns the number of its rows that
    count."""
    rows, mask = 0.0, session.output_mask(batch)
    for i, x in enumerate(floating_tensors(output)):
        shelf.put_copy((number, i, x.shape), x.reshape(-1))
        if x.numel():
            tokens, width = _counted_rows(x, mask)
            entries = x.numel() if tokens is None else int(tokens.sum()) * width
            rows += entries / x.shape[-1]
    return rows


def _data(
    session: Session, held_back: bool
) -> tuple[Sequence[Any], Callable[[str], Iterator[Any]]]:
    """The batches, and how to go through them."""
    if held_back:
        return session.held_back, session.each_held_back
    return session.batches, session.each


def _enough(batches: Sequence[Any], rows: int, first: float) -> set[int]:
    """The numbers of the batches of a sample of ``rows`` rows, where the first batch has
    ``first``."""
    total = len(batches)
    return _evenly(math.ceil(rows / first), total) if first else set(range(total))


@torch.no_grad()
def measure_change(
    session: Session,
    limit: int | None = None,
    rows: int | None = None,
    sample: Sample | None = None,
    *,
    held_back: bool = False,
    vocabulary: int | None = None,
) -> Change | None:
    """How far the outputs are from the original network's; padding does not count. None if there
    are no floating-point tensors, or others than the original network returns.

    With a ``sample``, that is what is compared. Without one, the original network runs again:
    ``limit`` bounds the bytes of its output that are in memory while the other network runs (the
    rest waits on disk), and ``rows`` is the size of a sample of batches; see
    :func:`sample_outputs`. ``held_back``: on the batches that nothing is calibrated on. If some
    outputs have ``vocabulary`` columns, the change is the sum of the Kullback-Leibler divergences
    of their rows, and its size the number of these.
    """
    total = Change(0.0, 0.0, 0.0, 0)
    batches, each = _data(session, held_back)
    chosen: Container[int] = range(len(batches)) if sample is None else sample.chosen
    for number, batch in enumerate(each("measure")):
        if number not in chosen:
            continue
        change = _change_of(session, batch, limit, number, sample, vocabulary)
        if change is None:
            return None
        total = Change(*map(operator.add, astuple(total), astuple(change)))
        if number == 0 and rows is not None and sample is None:
            chosen = _enough(batches, rows, change.rows)
    return total


def held_back_loss(session: Session, limit: int | None = None) -> float | None:
    """How far the output is from the original network's on the batches held back: the mean
    Kullback-Leibler divergence, in nats, of logits (see :func:`vocabulary_of`); or, for other
    outputs, the squared change over the squared size. ``limit`` as above. None if the outputs
    cannot be compared."""
    vocabulary = vocabulary_of(session)
    change = measure_change(session, limit, held_back=True, vocabulary=vocabulary)
    return None if change is None or not change.size else change.difference / change.size


def vocabulary_of(session: Session) -> int | None:
    """The number of classes that logits of the model are over, in their last dimension, if that was
    said; or of tokens, if its ``config`` says it."""
    if session.classes is not None:
        return session.classes
    found = getattr(getattr(session.model, "config", None), "vocab_size", None)
    return found if isinstance(found, int) else None


def check_classes(session: Session) -> None:
    """Raise ArgumentError if it was said how many classes logits are over, and what the model
    returns for the first batch has no such rows. Inside :meth:`Session.evaluating`."""
    if session.classes is None:
        return
    for batch in session.each("look"):
        shapes = [tuple(x.shape) for x in floating_tensors(session.call(session.model, batch))]
        if not any(len(shape) > 1 and shape[-1] == session.classes for shape in shapes):
            raise ArgumentError(
                f"classes: {session.classes}; the model returns floating-point tensors of the "
                f"shapes {shapes}, and none has rows of so many logits in its last dimension; "
                "leave it out, or pass a forward that returns the logits"
            )
        return


def _evenly(count: int, total: int) -> set[int]:
    """``count`` of ``total`` numbers from 0, evenly spaced, or all of them."""
    count = min(count, total)
    return {i * total // count for i in range(count)}


def _change_of(
    session: Session,
    batch: Any,
    limit: int | None,
    number: int,
    sample: Sample | None,
    vocabulary: int | None,
) -> Change | None:
    """The change on one batch. It is a function of its own so that the outputs are freed before the
    model runs on the next one."""
    rows, mask = 0.0, session.output_mask(batch)
    with Shelf(limit) as again:
        before = again
        if sample is not None:
            before = sample.outputs
        else:
            keep_output(again, number, session.call_original(batch), session, batch)
        now = list(floating_tensors(session.call(session.model, batch)))
        keys = [(number, i, x.shape) for i, x in enumerate(now)]
        if not now or keys != sorted(key for key in before if key[0] == number):
            return None
        logits = any(x.shape[-1] == vocabulary for x in now)
        distance = Distance(logits, torch.float64)
        for x, original, counts, width in compared(
            now, before, number, mask, vocabulary if logits else None
        ):
            entries = distance.entries
            distance.add(x.reshape(-1), original, counts, width)
            rows += (distance.entries - entries) / x.shape[-1]
    return Change(distance.difference, distance.size, rows, 1)


def compared(
    outputs: Sequence[Tensor],
    originals: Shelf,
    number: int,
    mask: Tensor | None,
    vocabulary: int | None,
) -> Iterator[tuple[Tensor, Iterator[Tensor], Tensor | None, int]]:
    """What :meth:`Distance.add` takes for each of the outputs for a batch: it, pieces of the
    original one, which rows count, and the entries of a row. With a ``vocabulary``, those that are
    logits over it."""
    for i, x in enumerate(outputs):
        if x.numel() and vocabulary in (None, x.shape[-1]):
            counts, width = _counted_rows(x, mask, vocabulary or 1)
            step = max(1, PIECE // width) * width
            yield x, originals.parts((number, i, x.shape), step), counts, width


def _counted_rows(x: Tensor, mask: Tensor | None, width: int = 1) -> tuple[Tensor | None, int]:
    """Which rows of the flat ``x`` count, and how many entries each has; None, and ``width``, if
    all do."""
    tokens = tokens_in(x, mask)
    if tokens is None:
        return None, width
    shape = x.shape if tokens.shape == x.shape else torch.Size([*x.shape[:-1], 1])
    return tokens.expand(shape).reshape(-1), x.numel() // shape.numel()
