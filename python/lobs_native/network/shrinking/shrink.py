"""Shrinking: neurons, attention heads and channels are removed, what reads them is repaired, and
the layers get smaller."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.calibration.held_back import divided
from lobs_native.calibration.session import Forward, Session, batches_of
from lobs_native.errors import ArgumentError
from lobs_native.layers import overwrite
from lobs_native.network.batch_norm import reestimate_batch_norm, statistics_of
from lobs_native.network.carrying_out import carried_out
from lobs_native.network.resources import waiting_limit
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shrinking.alike import alike, apart, output_of
from lobs_native.network.shrinking.block_repair import gaps_filled
from lobs_native.network.shrinking.comparison import (
    Outputs,
    bytes_of,
    memory_of,
    same_sizes,
    times_of,
)
from lobs_native.network.shrinking.configured import agreed_attributes, fits_its_class
from lobs_native.network.shrinking.shrink_plan import Goal, ShrinkPlan, plan_shrinking
from lobs_native.network.shrinking.shrink_report import ShrinkReport, Shrunk
from lobs_native.network.shrinking.surgery import new_counts, renaming, replace, take_out
from lobs_native.network.shrinking.units import BY_DEFAULT, KINDS, Family, inputs_axis
from lobs_native.solvers.methods import COLUMNS

__all__ = ["shrink"]

_DEPENDS = (
    "model: without the removed units it does not compute what it does with them set to zero, so "
    "something else depends on them; it was left as it was"
)


def shrink(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep: float | Mapping[str, float] | None = None,
    parameters: float | None = None,
    multiplications: float | None = None,
    latency: float | None = None,
    latency_table: str | os.PathLike[str] | None = None,
    kinds: Sequence[str] = BY_DEFAULT,
    multiple: int = 8,
    method: str = "exact",
    refine: str | None = None,
    inputs: str = "corrected",
    damping: float = 0.01,
    token_weights: str | None = None,
    configured: bool = True,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    held_back: float = 0.0,
    pairs: int = 5,
    run_dir: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool = True,
    seed: int = 0,
) -> ShrinkReport:
    """Make a network smaller in place, without retraining: remove neurons of the feed-forward
    layers and heads of the attention of a transformer, or channels of a convolutional network, and
    repair the layers that read them; on request, remove whole blocks.

    A unit (a neuron with its gate; the heads that share keys and values; a channel with all that is
    tied to it by residual connections) costs what the layers that read it lose when all their other
    inputs make up for it as well as they can. The cheapest one is removed, the others are repaired,
    and so on, as in :func:`prune` with pattern "columns". Then the removed units leave the weights.

    Parameters
    ----------
    model : nn.Module
        Changed in place: parameters are replaced by smaller ones, and its configuration is brought
        up to date. On any error it is as it was.
    calibration : iterable of batches
        As in :func:`prune`.
    keep : float in (0, 1], or {"neurons": float, "heads": float, "channels": float, ...}
        The share of the units that stays, the same everywhere. Kinds that are left out of a mapping
        stay whole.
    parameters, multiplications, latency : float in (0, 1]
        Instead of ``keep``: the share of the weights of the layers concerned, or of their
        multiplications, or of the time that their calls take here on the first batch, that stays at
        most. Where the class of a model has one number for all
        layers, it is reached by one share for all units. Otherwise, again and again those units go
        that cost least for what they save, relative to the outputs of their readers, so that layers
        get sizes of their own.
    latency_table : path, optional
        With ``latency``: a JSON file of the times of layers by their sizes. What it does not have
        is measured, and it is written again. Without it, all is measured.
    kinds : of "neurons", "heads", "channels", "experts" and "blocks"
        What may be removed; blocks only if they are named here or in ``keep``. Experts are those
        of mixtures with stacked weights, as in transformers; they go with their rows of the
        router, and never so many that fewer stay than a row is routed to. What that changes is
        measured exactly, but nothing is repaired for it; all other units are chosen and repaired
        on the network without these experts. Channels are outputs of convolutions and linear
        layers, found by running the first batch: what adds them, normalises, pools, flattens or
        concatenates them loses them as well. Where something else reads them, they stay, and
        ``notes`` says why. Blocks are entries of a list of modules that are called once and return
        a tensor of the shape they read, such as the layers of a transformer. That goes without
        which the output of the network changes least, one after another; the last linear layer
        before a gap that adds to what its block passes on is fitted to what the blocks that went
        passed on. All other units are chosen and repaired on the network without these blocks.
    multiple : int
        Numbers of neurons and channels are rounded to a multiple of this, as hardware likes it, and
        are at least this (or all there are).
    method : "exact", "magnitude" or "wanda"
        How units are chosen: by what they cost with repair, or by the norms of the reading layers'
        columns, without repair. Channels are chosen on the original network, for all their readers
        together; neurons and heads on the network as pruned so far, if ``inputs`` says so.
    refine : None or "solve"
        "solve" repairs what "magnitude" and "wanda" leave.
    damping : float >= 0
        As in :func:`prune`; what is left is repaired with more where rows are few, as generalised
        cross-validation finds it. The report has the damping used.
    token_weights : "output" or None
        "output": neurons and heads are chosen, and all readers repaired, with the rows of inputs
        and outputs weighted by how much the network's output depends on them, as in :func:`prune`.
        It needs gradients, and a forward and backward pass over the data.
    inputs, forward, device, memory, held_back, progress, seed
        As in :func:`prune`.
    pairs : int >= 0
        At the end, time forward passes of the first batch with a network of the old sizes and with
        the smaller one, in so many pairs. 0: measure no times.
    run_dir, resume
        As in :func:`prune`: repaired layers are checkpointed. What is removed is decided again,
        from the original model, and must come out the same: with ``latency``, pass the same
        ``latency_table``.
    configured : bool
        Leave out a kind for which the model's own class, made from its configuration, would not
        have the new sizes; that holds for all channels of a model with a configuration. With False,
        such a model can be saved only as a whole.

    Returns
    -------
    ShrinkReport
        What stayed; sizes, times and the change of the output, before and after; and the report of
        the repair.

    Raises
    ------
    ArgumentError
        An argument does not fit, nothing can be removed, or the smaller network does not compute
        what the repaired one does, because something else depends on a unit.
    LobsError
        All that :func:`prune` raises.

    Notes
    -----
    Where channels were removed, the statistics of batch normalisation are re-estimated at the end,
    as by :func:`reestimate_batch_norm`; the old ones come back unless that brings the output for
    the first batch closer to the original network's.

    Sources: Hassibi & Stork 1993 for the cost of a group with repair; Kurtic et al. 2023 (ZipLM)
    for using it on structures of transformers; Shopkhoev et al. 2025 (ReplaceMe) for a linear
    transform in the place of blocks. Corrected inputs are those of :func:`prune`.
    """
    checks.check_choice(method, "method", tuple(COLUMNS))
    for kind in kinds:
        checks.check_choice(kind, "kinds", KINDS)
    if isinstance(keep, Mapping) and "blocks" in keep:
        kinds = tuple(dict.fromkeys([*kinds, "blocks"]))
    multiple = checks.positive_int(multiple, "multiple")
    pairs = checks.count(pairs, "pairs")
    settings = NetworkSettings(
        sparsity=0.5,
        method=method,
        refine=refine,
        pattern="columns",
        inputs=inputs,
        damping=damping,
        token_weights=token_weights,
        forward=forward,
        device=device,
        memory=memory,
        held_back=held_back,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
        seed=seed,
        strict=True,
    )
    goal = Goal(
        keep=keep,
        parameters=parameters,
        multiplications=multiplications,
        latency=latency,
        latency_table=latency_table,
        kinds=kinds,
        multiple=multiple,
        configured=configured,
    )
    every = batches_of(calibration)
    if settings.held_back:
        every = list(every)  # which may come in another order each time
    batches, others = divided(every, settings.held_back)
    if device is not None:
        model.to(device)
    notes: list[str] = []
    session = Session(
        model, batches, forward, device, seed, progress, token_mask=True, held_back=others
    )
    blocks, plan = plan_shrinking(session, goal, settings, notes).parted()
    before = _size(model), bytes_of(model)
    with contextlib.ExitStack() as kept, contextlib.ExitStack() as undo:
        with session.evaluating():
            first = next(iter(session.each("output")))
            original = output_of(session, first)
            took = memory_of(session, first)
            outputs = Outputs(session, waiting_limit(memory), kept)
        agreed = agreed_attributes(model) if blocks.families else frozenset()
        larger = _same_sizes(model, notes) if pairs or blocks.families else None
        with session.evaluating():
            plan = _take_out_blocks(model, blocks, plan, undo)
            gaps = gaps_filled(session, larger, blocks, outputs.calibrated, damping, notes, undo)
        settings = dataclasses.replace(
            settings,
            include=[name for f in plan.families for name in f.readers],
            overrides=dict(_overrides(plan)),
        )
        stay = {i: plan.kept(i) for i in range(len(plan.families))}
        experts = [i for i, family in enumerate(plan.families) if not family.readers]
        _take_out(model, plan, {i: stay[i] for i in experts}, undo)
        for name in settings.include or ():
            for parameter in model.get_submodule(name).parameters(recurse=False):
                undo.callback(overwrite, parameter, parameter.detach().clone())
        report = None
        if settings.include:
            report = carried_out(model, every, settings, masks=plan.masks(model))
            for i, family in enumerate(plan.families):
                stay[i] = _kept_units(model, family, report.masks) if stay[i] is None else stay[i]
        with session.evaluating():
            wanted = output_of(session, first)
        _take_out(model, plan, {i: x for i, x in stay.items() if i not in experts}, undo)
        found = _check_same(session, first, wanted)
        normed = 0
        if any(family.kind == "channels" for family in plan.families):
            normed = _renormed(session, first, original, found)
        with session.evaluating():
            change, held_back_change = outputs.changes(session)
            takes = memory_of(session, first)
        times = times_of(larger, session, first, pairs) if larger is not None and pairs else None
        undo.pop_all()
    configured_now = fits_its_class(model, agreed)
    if goal.for_class_of(model) and not configured_now:
        notes.append(
            f"a {type(model).__name__} is not made from this configuration: it refuses one of the "
            "new numbers, or makes other layers of them; keep another share of the units"
        )
    return ShrinkReport(
        layers=(
            *gaps,
            *(
                Shrunk(f.kind, f.readers, f.producers, f.units, _listed(stay[i]), plan.spent(i))
                for i, f in enumerate(plan.families)
            ),
        ),
        parameters=(before[0], _size(model)),
        bytes=(before[1], bytes_of(model)),
        multiplications=plan.multiplications,
        memory=None if took is None or takes is None else (took, takes),
        change=change,
        held_back_change=held_back_change,
        times=times,
        batch_norm=normed,
        configured=configured_now,
        notes=tuple(dict.fromkeys(notes)),
        pruning=report,
    )


def _same_sizes(model: nn.Module, notes: list[str]) -> nn.Module | None:
    """A network to compare times with; or None, and a note."""
    try:
        return same_sizes(model)
    except ArgumentError as error:
        notes.append(f"no times, and no repair of blocks: {error}")
        return None


def _take_out_blocks(
    model: nn.Module, blocks: ShrinkPlan, others: ShrinkPlan, undo: contextlib.ExitStack
) -> ShrinkPlan:
    """Leave the blocks that stay by a plan; that of other units under their new names."""
    for i, family in enumerate(blocks.families):
        kept = blocks.kept(i)
        assert kept is not None
        others = others.renamed(renaming(model, family, kept))
        _take_out(model, blocks, {i: kept}, undo)
    return others


def _overrides(plan: ShrinkPlan) -> Iterable[tuple[str, dict[str, Any]]]:
    """What each reader is to lose: so many units, or (by a mask) those that are chosen already."""
    for family, count in zip(plan.families, plan.counts, strict=True):
        for name in family.readers:
            settings: dict[str, Any] = {"sparsity": 1 - count / family.units}
            if family.single:
                columns = len(family.read_at(name).units) // family.units
                settings["pattern"] = f"{columns} columns"
            yield name, settings


def _take_out(
    model: nn.Module,
    plan: ShrinkPlan,
    stay: Mapping[int, Tensor | None],
    undo: contextlib.ExitStack,
) -> None:
    """Leave these units of these families of a plan, and count them."""
    for i, units in stay.items():
        assert units is not None
        take_out(model, plan.families[i], units, undo)
    some = [plan.families[i] for i in stay]
    for owner, name, value in new_counts(some, [plan.counts[i] for i in stay]):
        replace(owner, name, value, undo)


def _listed(units: Tensor | None) -> tuple[int, ...]:
    return () if units is None else tuple(units.tolist())


def _kept_units(model: nn.Module, family: Family, masks: Mapping[str, Tensor]) -> Tensor:
    """The units that stay, by the mask of the only reader in the layout of its weight."""
    (reader,) = family.readers
    columns = masks[reader].any(1 - inputs_axis(model.get_submodule(reader)))
    units: Tensor = family.read_at(reader).units[columns.cpu()].unique()
    return units


def _check_same(session: Session, batch: Any, wanted: Sequence[Tensor]) -> list[Tensor]:
    """What the model returns for a batch; ArgumentError if it is not this any more, but for
    rounding."""
    try:
        with session.evaluating():
            found = output_of(session, batch)
    except Exception as error:  # sizes that do not fit any more
        raise ArgumentError(_DEPENDS) from error
    if not alike(wanted, found):
        raise ArgumentError(_DEPENDS)
    return found


def _renormed(
    session: Session, batch: Any, original: Sequence[Tensor], present: Sequence[Tensor]
) -> int:
    """Re-estimate batch normalisation if that brings the output for a batch closer to the original
    one than the present one is; how many layers then have new statistics."""
    model, statistics = session.model, statistics_of(session.model)
    if not statistics:
        return 0
    with contextlib.ExitStack() as undo:
        for x in statistics:
            undo.callback(overwrite, x, x.clone())
        count = reestimate_batch_norm(
            model, session.batches, forward=session.forward, device=session.device
        )
        with session.evaluating():
            if not apart(original, output_of(session, batch)) < apart(original, present):
                return 0
        undo.pop_all()
    return count


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
