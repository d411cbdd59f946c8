"""Whole blocks: which of them a network can do without, and what that costs.

A block is an entry of a list of modules that is called once and returns a tensor of the shape that
it reads: a layer of a transformer, a residual block. Left out, the next one reads what it would
have read. Whether that works, and what it costs, is not derived but tried: the network runs without
the block, and its output is compared with the original one's.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.hooks import attached
from lobs_native.calibration.outputs import (
    SAMPLE,
    Sample,
    floating_tensors,
    measure_change,
    sample_outputs,
    vocabulary_of,
)
from lobs_native.calibration.session import Session
from lobs_native.files.shelf import Shelf
from lobs_native.network.shrinking.families import counts_around, held_lists
from lobs_native.network.shrinking.surgery import new_counts, replace, take_out
from lobs_native.network.shrinking.units import Family, Slot
from lobs_native.solvers.joint import Removal

__all__ = ["block_families", "block_removals", "output_loss", "without"]

_FIELDS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)


def block_families(session: Session, batch: Any) -> Iterator[Family]:
    """A family for every list of modules of which at least two, of one class, are blocks; its other
    entries are ``fixed``. None is inside another. Inside :meth:`Session.evaluating`."""
    model = session.model
    lists = {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    shapes: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read, made = (next(floating_tensors(x), None) for x in ([args, kwargs], output))
        seen = [None if x is None else (x.shape, x.dtype) for x in (read, made)]
        shapes.setdefault(module, []).append((seen[0], seen[1]))

    deep = {
        child
        for children in lists.values()
        for child in children
        if next(child.children(), None) is not None and next(child.parameters(), None) is not None
    }
    with attached(child.register_forward_hook(see, with_kwargs=True) for child in deep):
        session.call(model, batch)
    chosen: list[str] = []
    for name, children in lists.items():
        blocks = [
            i
            for i, child in enumerate(children)
            if len(seen := shapes.get(child, [])) == 1 and seen[0][0] == seen[0][1] is not None
        ]
        classes = collections.Counter(type(children[i]) for i in blocks)
        inside = any(name.startswith(f"{outer}.") or not outer for outer in chosen)
        if inside or max(classes.values(), default=0) < 2:
            continue
        chosen.append(name)
        yield _family(model, name, children, blocks)


def _family(
    model: nn.Module, name: str, children: Sequence[nn.Module], blocks: Sequence[int]
) -> Family:
    count = len(children)
    slots = [
        Slot(f"{f'{name}.' if name else ''}{key}.{part}", 0, torch.full((len(x),), i))
        for i, (key, child) in enumerate(model.get_submodule(name).named_children())
        for part, x in child.named_parameters()
        if x.ndim > 0
    ]
    return Family(
        kind="blocks",
        units=count,
        readers=(),
        producers=(name,),
        slots=tuple(slots),
        counts=tuple(counts_around(model, name, dict.fromkeys(_FIELDS, count), count)),
        lists=tuple(held_lists(model, name, count)),
        fixed=frozenset(range(count)) - set(blocks),
    )


@contextlib.contextmanager
def without(model: nn.Module, families: Sequence[Family], kept: Sequence[Tensor]) -> Iterator[None]:
    """The model with these blocks of some lists alone, for a while."""
    with contextlib.ExitStack() as undo:
        for family, units in zip(families, kept, strict=True):
            take_out(model, family, units, undo)
        for owner, name, value in new_counts(families, [len(units) for units in kept]):
            replace(owner, name, value, undo)
        yield


def output_loss(session: Session, sample: Sample) -> float:
    """How far the output is from a sample of the original network's: the mean Kullback-Leibler
    divergence of logits over the vocabulary of the model's configuration, or the squared change of
    other outputs over their square; infinite if it is another kind of output, or not finite."""
    vocabulary = vocabulary_of(session)
    change = measure_change(session, sample=sample, vocabulary=vocabulary)
    if change is None:
        return math.inf
    loss = change.difference / (change.size or 1.0)
    return loss if math.isfinite(loss) else math.inf


def block_removals(
    families: Sequence[Family],
    fewest: Sequence[int],
    session: Session,
    limit: int,
    notes: list[str],
) -> list[Removal]:
    """In which order the blocks of some lists go, and what each removal adds to the
    :func:`output_loss`; inside :meth:`Session.evaluating`. At each step that one goes, of all
    lists, without which the loss is least.

    ``fewest`` is how many entries of a list stay at least (one in any case). What is not fixed but
    what the network does not run without stays as well, with a note. ``limit``: bytes of the
    original outputs that are kept in memory.
    """
    model = session.model
    every = [torch.arange(family.units) for family in families]
    orders: list[list[int]] = [[] for _ in families]
    spent: list[list[float]] = [[] for _ in families]
    left = {(f, unit) for f, x in enumerate(families) for unit in set(range(x.units)) - x.fixed}
    last = 0.0
    with Shelf(limit) as shelf:
        sample = sample_outputs(session, shelf, SAMPLE)
        while True:
            left -= {
                (f, unit)
                for f, unit in left
                if families[f].units - len(orders[f]) <= max(1, fewest[f])
            }
            losses = []
            for f, unit in sorted(left):
                gone = [*orders[:f], [*orders[f], unit], *orders[f + 1 :]]
                kept = [
                    units[~torch.isin(units, torch.tensor(some, dtype=torch.int64))]
                    for units, some in zip(every, gone, strict=True)
                ]
                loss, why = math.inf, "its output is another one then, or not finite"
                with without(model, families, kept):
                    try:
                        loss = output_loss(session, sample)
                    except Exception as error:  # whatever depends on it
                        why = str(error).partition("\n")[0] or type(error).__name__
                if math.isfinite(loss):
                    losses.append((loss, f, unit))
                else:
                    left.discard((f, unit))
                    name = families[f].producers[0]
                    notes.append(f"{name}: block {unit} stays: the network does not work ({why})")
            if not losses:
                return [Removal(order, costs) for order, costs in zip(orders, spent, strict=True)]
            loss, f, unit = min(losses)
            left.discard((f, unit))
            orders[f].append(unit)
            spent[f].append(loss - last)
            last = loss
