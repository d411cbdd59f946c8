"""Shrinking: neurons and attention heads are removed, what reads them is repaired, and the layers
get smaller."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.calibration.outputs import floating_tensors
from lobs_native.calibration.session import Forward, Session, batches_of
from lobs_native.errors import ArgumentError
from lobs_native.layers import overwrite
from lobs_native.network.configured import configurable, fits_its_class, new_counts
from lobs_native.network.families import (
    KINDS,
    Family,
    families_of,
    inputs_axis,
    linear_shape,
)
from lobs_native.network.pruner import prune
from lobs_native.network.surgery import replace, take_out
from lobs_native.report.report import Report
from lobs_native.solvers.methods import COLUMNS

__all__ = ["ShrinkReport", "Shrunk", "shrink"]

_DEPENDS = (
    "model: without the removed units it does not compute what it does with them set to zero, so "
    "something else depends on them; it was left as it was"
)
_AGREES = 16.0  # times rounding to the power of 3/4: 1e-4 in float32, 0.09 in float16


@dataclass(frozen=True)
class Shrunk:
    """What was removed before one layer."""

    kind: str  # "neurons" or "heads" (groups of heads that share keys and values)
    consumer: str  # the layer that reads them, and was repaired
    producers: tuple[str, ...]  # the layers that lost outputs
    units: int  # before
    kept: tuple[int, ...]  # indices of those that stay, rising


@dataclass(frozen=True)
class ShrinkReport:
    """What :func:`shrink` did."""

    layers: tuple[Shrunk, ...]
    parameters: tuple[int, int]  # of the whole model, before and after
    multiplications: tuple[int, int]  # of the layers concerned, for one row, before and after
    configured: bool  # whether the model's own class, with its configuration, has the new sizes
    notes: tuple[str, ...]
    pruning: Report = field(repr=False)  # errors of the repaired layers, change of the output

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        fields = {name: value for name, value in vars(self).items() if name != "pruning"}
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {**fields, "layers": layers, "pruning": self.pruning.to_dict()}

    def __str__(self) -> str:
        (p, q), (m, n) = self.parameters, self.multiplications
        return (
            f"shrunk {len(self.layers)} layers: {p:,} -> {q:,} parameters, {m:,} -> {n:,} "
            f"multiplications for a row in the layers concerned ({n / m:.0%})"
        )


def shrink(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep: float | Mapping[str, float] | None = None,
    parameters: float | None = None,
    kinds: Sequence[str] = KINDS,
    multiple: int = 8,
    method: str = "exact",
    refine: str | None = None,
    inputs: str = "corrected",
    damping: float = 0.01,
    configured: bool = True,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> ShrinkReport:
    """Make a transformer smaller in place, without retraining: remove neurons of its feed-forward
    layers and heads of its attention, and repair the layers that read them.

    A unit (a neuron with its gate; the heads that share keys and values) costs what the layer that
    reads it loses when all its other inputs make up for it as well as they can. The cheapest one is
    removed, the others are repaired, and so on, layer after layer, as in :func:`prune` with pattern
    "columns". Then the removed units leave the weights.

    Parameters
    ----------
    model : nn.Module
        Changed in place: parameters are replaced by smaller ones, and its configuration is brought
        up to date. On any error it is as it was.
    calibration : iterable of batches
        As in :func:`prune`.
    keep : float in (0, 1], or {"neurons": float, "heads": float}
        The share of the units that stays, the same in every layer. Kinds that are left out of a
        mapping stay whole.
    parameters : float in (0, 1]
        Instead of ``keep``: the share of the parameters of the layers concerned that stays, which
        is also that of their multiplications.
    kinds : of "neurons" and "heads"
        What may be removed.
    multiple : int
        Numbers of neurons are rounded to a multiple of this, as hardware likes it, and are at least
        this (or all there are).
    method : "exact", "magnitude" or "wanda"
        How units are chosen: by what they cost with repair, or by the norms of the reading layer's
        columns, without repair.
    refine : None or "solve"
        "solve" repairs what "magnitude" and "wanda" leave.
    inputs, damping, forward, device, memory, progress, seed
        As in :func:`prune`.
    configured : bool
        Leave out a kind for which the model's own class, made from its configuration, would not
        have the new sizes. With False, such a model can be saved only as a whole.

    Returns
    -------
    ShrinkReport
        What stayed, sizes before and after, and the report of the repair.

    Raises
    ------
    ArgumentError
        An argument does not fit, nothing can be removed, or the smaller network does not compute
        what the repaired one does, because something else depends on a unit.
    LobsError
        All that :func:`prune` raises.

    Notes
    -----
    Sources: Hassibi & Stork 1993 for the cost of a group with repair; Kurtic et al. 2023 (ZipLM)
    for using it on structures of transformers. Corrected inputs are those of :func:`prune`.
    """
    checks.check_choice(method, "method", tuple(COLUMNS))
    for kind in kinds:
        checks.check_choice(kind, "kinds", KINDS)
    multiple = checks.positive_int(multiple, "multiple")
    batches = batches_of(calibration)
    notes: list[str] = []
    families = list(families_of(model, tuple(kinds)))
    if configured:
        families = configurable(model, families, notes)
    if not families:
        raise ArgumentError(
            "model: it has no feed-forward layers or attention whose units can be removed"
            + "".join(f"; {note}" for note in notes)
        )
    shares = _shares(model, families, keep, parameters, multiple)
    counts = {f.consumer: _kept(f, shares.get(f.kind, 1.0), multiple) for f in families}
    families = [f for f in families if counts[f.consumer] < f.units]
    if not families:
        raise ArgumentError(
            f"keep: with {shares} and multiples of {multiple} all units stay; keep less, or pass a "
            "smaller multiple"
        )
    before = _size(model), sum(_work(model, f) for f in families)
    originals = [
        (p, p.detach().clone())
        for f in families
        for p in model.get_submodule(f.consumer).parameters(recurse=False)
    ]
    with contextlib.ExitStack() as undo:
        for parameter, original in originals:
            undo.callback(overwrite, parameter, original)
        report = prune(
            model,
            batches,
            sparsity=0.5,
            method=method,
            refine=refine,
            pattern="columns",
            include=[f.consumer for f in families],
            overrides={
                f.consumer: {
                    "pattern": f"{f.columns} columns",
                    "sparsity": 1 - counts[f.consumer] / f.units,
                }
                for f in families
            },
            inputs=inputs,
            damping=damping,
            forward=forward,
            device=device,
            memory=memory,
            progress=progress,
            seed=seed,
            strict=True,
        )
        wanted = _first_output(model, batches, forward, device, seed)
        kept = {f.consumer: _kept_units(model, f, report.masks[f.consumer]) for f in families}
        for f in families:
            take_out(model, f, kept[f.consumer], undo)
        for owner, name, value in new_counts(families, counts):
            replace(owner, name, value, undo)
        try:
            found = _first_output(model, batches, forward, device, seed)
        except Exception as error:  # sizes that do not fit any more
            raise ArgumentError(_DEPENDS) from error
        _check_same(wanted, found)
        undo.pop_all()
    return ShrinkReport(
        layers=tuple(
            Shrunk(
                kind=f.kind,
                consumer=f.consumer,
                producers=tuple(p.name for p in f.producers),
                units=f.units,
                kept=tuple(kept[f.consumer].tolist()),
            )
            for f in families
        ),
        parameters=(before[0], _size(model)),
        multiplications=(before[1], sum(_work(model, f) for f in families)),
        configured=fits_its_class(model),
        notes=tuple(dict.fromkeys(notes)),
        pruning=report,
    )


# ---- how many ------------------------------------------------------------------------------------


def _shares(
    model: nn.Module,
    families: Sequence[Family],
    keep: float | Mapping[str, float] | None,
    parameters: float | None,
    multiple: int,
) -> dict[str, float]:
    """The share of each kind's units that stays."""
    if (keep is None) == (parameters is None):
        raise ArgumentError("keep, parameters: give exactly one of them")
    if parameters is not None:
        target = _share(parameters, "parameters")
        whole = sum(_work(model, f) for f in families)

        def left(share: float) -> float:
            each = (_work(model, f) * _kept(f, share, multiple) / f.units for f in families)
            return sum(each) / whole

        low, high = 0.0, 1.0
        if left(low) > target:
            raise ArgumentError(
                f"parameters: {target:g}; with the fewest units that can stay it is {left(low):.3g}"
                ", so pass more, or a smaller multiple"
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) <= target else (low, middle)
        return dict.fromkeys(KINDS, low)
    if isinstance(keep, Mapping):
        for kind in keep:
            checks.check_choice(kind, "keep", KINDS)
        return {kind: _share(value, f"keep[{kind!r}]") for kind, value in keep.items()}
    return dict.fromkeys(KINDS, _share(keep, "keep"))


def _share(value: Any, name: str) -> float:
    checks.sparsity(value, name)
    if not value > 0:
        raise ArgumentError(f"{name}: {value}; something has to stay, so pass more than 0")
    return float(value)


def _kept(family: Family, share: float, multiple: int) -> int:
    """How many units stay: at least one, neurons in multiples."""
    step = multiple if family.kind == "neurons" else 1
    nearest = step * math.floor(share * family.units / step + 0.5)
    return min(family.units, max(step, nearest))


def _kept_units(model: nn.Module, family: Family, mask: Tensor) -> Tensor:
    """The units that stay, by the mask of the consumer in the layout of its weight."""
    columns = mask.any(1 - inputs_axis(model.get_submodule(family.consumer)))
    return columns.view(family.units, family.columns).any(1).nonzero()[:, 0].cpu()


# ---- sizes and outputs ---------------------------------------------------------------------------


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _work(model: nn.Module, family: Family) -> int:
    """Multiplications of its layers for one row: their weights."""
    total = 0
    for name in (*(p.name for p in family.producers), family.consumer):
        shape = linear_shape(model.get_submodule(name))
        assert shape is not None
        total += shape[0] * shape[1]
    return total


@torch.no_grad()
def _first_output(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    device: torch.device | str | None,
    seed: int,
) -> list[Tensor]:
    """The floating-point tensors that the model returns for the first batch."""
    first = next(iter(batches))
    session = Session(model, [first], forward, device, seed, progress=False)
    with session.evaluating():
        torch.manual_seed(seed)
        return [x.clone() for x in floating_tensors(session.call(model, first))]


def _check_same(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """ArgumentError if two outputs differ by more than rounding."""
    alike = len(wanted) == len(found) and all(
        a.shape == b.shape for a, b in zip(wanted, found, strict=True)
    )
    for a, b in zip(wanted, found, strict=True) if alike else ():
        norm = float(a.double().norm()) or 1.0
        apart = float((a.double() - b.double()).norm()) / norm
        alike = alike and apart <= _AGREES * torch.finfo(a.dtype).eps ** 0.75
    if not alike:
        raise ArgumentError(_DEPENDS)
