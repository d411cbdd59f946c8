"""The tensors in what a model returns, and how far they are from those of the original network."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Container, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from lobs_native.calibration.session import Session
from lobs_native.files.shelf import Shelf

__all__ = [
    "MEASURING",
    "SAMPLE",
    "Change",
    "floating_tensors",
    "measure_change",
    "sizes_of",
    "tokens_in",
]

SAMPLE = 512  # rows of output in a sample
_PIECE = 1 << 18  # elements converted to float64 at a time
MEASURING = 4 * 8 * _PIECE  # bytes that measuring takes besides the outputs


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


def _keep(shelf: Shelf, output: Any) -> None:
    """Put the tensors of an output on a shelf, flat, by number and shape."""
    for i, x in enumerate(floating_tensors(output)):
        shelf.put((i, x.shape), x.detach().reshape(-1))


@torch.no_grad()
def measure_change(
    session: Session,
    limit: int | None = None,
    rows: int | None = None,
    *,
    held_back: bool = False,
) -> Change | None:
    """How far the outputs are from the original network's; padding does not count. None if there
    are no floating-point tensors, or others than the original network returns.

    ``limit`` bounds the bytes of the original network's output that are in memory while the other
    network runs; the rest waits on disk. ``rows`` is the size of a sample of batches, evenly
    spaced, with as many as would be enough if all were like the first. ``held_back``: on the
    batches that nothing is calibrated on.
    """
    total = Change(0.0, 0.0, 0.0, 0)
    batches = session.held_back if held_back else session.batches
    chosen: Container[int] = range(len(batches))
    each = session.each_held_back if held_back else session.each
    for number, batch in enumerate(each("measure")):
        if number not in chosen:
            continue
        change = _change_of(session, batch, limit)
        if change is None:
            return None
        total = Change(*map(operator.add, astuple(total), astuple(change)))
        if number == 0 and rows is not None and change.rows:
            chosen = _evenly(math.ceil(rows / change.rows), len(batches))
    return total


def _evenly(count: int, total: int) -> set[int]:
    """``count`` of ``total`` numbers from 0, evenly spaced, or all of them."""
    count = min(count, total)
    return {i * total // count for i in range(count)}


def _change_of(session: Session, batch: Any, limit: int | None) -> Change | None:
    """The change on one batch. It is a function of its own so that the outputs are freed before the
    model runs on the next one."""
    difference = size = rows = 0.0
    mask = session.output_mask(batch)
    with Shelf(limit) as before:
        _keep(before, session.call_original(batch))
        now = list(floating_tensors(session.call(session.model, batch)))
        if not now or [(i, x.shape) for i, x in enumerate(now)] != sorted(before):
            return None
        for i, x in enumerate(now):
            if not x.numel():
                continue
            tokens, width = _rows(x, mask)
            step = max(1, _PIECE // width) * width
            parts = zip(x.reshape(-1).split(step), before.parts((i, x.shape), step), strict=True)
            for k, (a, b) in enumerate(parts):
                if tokens is not None:
                    counts = tokens[k * step // width :][: len(a) // width]
                    a, b = a.view(-1, width)[counts], b.view(-1, width)[counts]
                wide = b.double()
                size += float(wide.square().sum())
                difference += float((wide - a).square().sum())
                rows += a.numel() / x.shape[-1]
    return Change(difference, size, rows, 1)


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, int]:
    """Which rows of the flat ``x`` count, and how many entries each has; None if all do."""
    tokens = tokens_in(x, mask)
    if tokens is None:
        return None, 1
    shape = x.shape if tokens.shape == x.shape else torch.Size([*x.shape[:-1], 1])
    return tokens.expand(shape).reshape(-1), x.numel() // shape.numel()
