"""Second moments of the layers' inputs, accumulated in one pass over the data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.differences import Differences
from lobs_native.calibration.hooks import Columns, Enough, ending, hooked
from lobs_native.calibration.pairs import Pairs
from lobs_native.calibration.partial import States, resumable
from lobs_native.calibration.session import Source
from lobs_native.calibration.tree import Summing
from lobs_native.errors import ArgumentError, NonFiniteError
from lobs_native.layers import Layer
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.hessian import Hessian, few_rows
from lobs_native.solvers.measurement import error_elsewhere

__all__ = ["ENOUGH", "Moments", "calibrate"]

ENOUGH = 8  # rows for each input, from which on an expert's second moment is taken as it is


class Moments(list[Hessian]):
    """The second moments of a layer's groups, with what a report should note about them."""

    def __init__(self, layer: Layer) -> None:
        bias, device = layer.bias() is not None, layer.weight().device
        super().__init__(
            Hessian(layer.width, bias=bias, device=device) for _ in range(layer.groups)
        )
        self.layer = layer
        self.padding = 0  # rows left out
        self.told_by = ""  # what says which rows are padding
        self.unmasked = False  # whether a mask did not fit
        self.squares = 0.0  # of the weights of the first group's rows
        self.unweighted = False  # whether weights of rows did not fit
        self.differences: dict[str, Differences] = {}  # by layer; only with inputs "corrected"
        self._matrices: list[Tensor] | None = None

    @property
    def rows(self) -> float:
        """The number of rows that the layer saw; with experts, of all together."""
        return sum(h.rows for h in self) if self.layer.routed else self[0].rows

    @property
    def effective_rows(self) -> float | None:
        """How many rows of equal weight tell as much: the square of the sum of the weights over the
        sum of their squares (Kish 1965). None if the rows of the first group count the same."""
        return self[0].rows * (self[0].rows / self.squares) if self.squares else None

    def matrices(self) -> list[Tensor]:
        """The second moments, computed at the first call, which releases the sums.

        Those of rare experts are mixed with a multiple of the identity that has the same mean
        diagonal: with n rows for C inputs, ``1 - n / (8 C)`` of it, or more if :func:`_shrinkage`
        is more. An expert that saw no rows gets the mean of the other experts' diagonals, so that
        it is pruned by magnitude.
        """
        if self._matrices is None:
            some_rows = self.layer.routed and any(h.rows > 0 for h in self)
            shares = [self._unknown(h) for h in self]
            matrices: list[Tensor | None] = []
            for h in self:
                matrices.append(None if some_rows and h.rows == 0 else h.take())
                h.release()  # also one that is not taken
            mean = self._uncorrelated([H for H in matrices if H is not None])
            for H, rows, share in zip(matrices, [h.rows for h in self], shares, strict=True):
                if H is not None and share > 0:
                    share = max(share, _shrinkage(H[: self.layer.width, : self.layer.width], rows))
                    plain = self._uncorrelated([H]).mul_(share)
                    H.mul_(1 - share).add_(plain)
            self._matrices = [mean if H is None else H for H in matrices]
        return self._matrices

    def _unknown(self, h: Hessian) -> float:
        """How far an expert's rows are from being enough: 1 if there are none, 0 if there are, or
        for other layers."""
        return max(0.0, 1 - h.rows / (ENOUGH * self.layer.width)) if self.layer.routed else 0.0

    @property
    def rare(self) -> list[int]:
        """The experts that saw fewer than 8 rows for each input."""
        return [g for g, h in enumerate(self) if self._unknown(h) > 0]

    def _uncorrelated(self, matrices: Sequence[Tensor]) -> Tensor:
        """A diagonal second moment: the mean diagonal entry of ``matrices`` for every input, 1 for
        the bias."""
        C = self.layer.width
        diagonal = torch.ones(len(matrices[0]), dtype=torch.float64, device=matrices[0].device)
        diagonal[:C] = sum(float(H.diagonal()[:C].mean()) for H in matrices) / len(matrices) or 1.0
        return torch.diag(diagonal)

    def drift(self, layer: Layer) -> Drift | None:
        """What ``layer`` should compensate; None if the two networks could not be compared."""
        difference = self.differences.get(layer.name)
        if difference is None or difference.unlike:
            return None
        drift = difference.drift([h.rows for h in self])
        # Weights do not reduce their number: rows that weigh more are taken to have less noise.
        return dataclasses.replace(drift, rows=self[0].rows)

    def error(
        self, layer: Layer, weight: Tensor, bias: Tensor | None, *, corrected: bool
    ) -> float | None:
        """The relative error that new weights (G, R, C) and biases (G, R) of ``layer``, which still
        has its own, make on these rows; None for experts, or where nothing comes in. Call it once.
        """
        if layer.routed:
            return None
        before, after = (layer.weight(), layer.bias()), (weight, bias)
        drift = self.drift(layer) if corrected else None
        error, energy = error_elsewhere(before, after, self.matrices(), drift)
        return error / energy if energy > 0 else None

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The weight of each row of inputs (..., C), 0 for padding; None if all rows count.

        ``mask`` (...,), nonzero for tokens, is used if it fits. Padding, and a mask that does not
        fit, are recorded.
        """
        if mask is None:
            return None
        known = self.layer.token_rows or self.layer.watched
        if not known or x.shape[:-1] != mask.shape:
            self.unmasked = True
            return None
        weights = mask.reshape(-1).to(device=x.device, dtype=torch.float64)
        self.padding += int((weights == 0).sum())
        return weights

    def add(self, group: int, rows: Tensor, weights: Tensor | None, *, uneven: bool) -> None:
        """Add rows (n, C) of a group; ``uneven`` if the weights are more than a mask."""
        self[group].update(rows, weights)
        if uneven and group == 0 and weights is not None:
            self.squares += float(weights.square().sum())

    def tensors(self) -> dict[str, Tensor]:
        """The sums, as :class:`lobs_native.calibration.tree.Summing` says."""
        tensors = {f"{g}": h.running_sum for g, h in enumerate(self)}
        for name, difference in self.differences.items():
            tensors |= {f"{name}/{k}": x for k, x in difference.tensors().items()}
        return tensors

    def lower(self) -> list[str]:
        """The names of those that are zero above the diagonal."""
        own = [f"{g}" for g in range(len(self))]
        return own + [f"{name}/{k}" for name, d in self.differences.items() for k in d.lower()]

    def values(self) -> dict[str, Any]:
        """What else belongs to the sums."""
        return {
            "rows": [h.rows for h in self],
            "padding": self.padding,
            "told by": self.told_by,
            "unmasked": self.unmasked,
            "squares": self.squares,
            "unweighted": self.unweighted,
            "differences": {name: d.values() for name, d in self.differences.items()},
        }

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take over what :meth:`values` returned."""
        for h, rows in zip(self, values["rows"], strict=True):
            h.set_rows(rows)
        self.padding, self.unmasked = int(values["padding"]), bool(values["unmasked"])
        self.squares, self.unweighted = float(values["squares"]), bool(values["unweighted"])
        self.told_by = str(values["told by"])
        for name, difference in self.differences.items():
            difference.set_values(values["differences"][name])

    def notes(self, layer: Layer) -> list[str]:
        """The notes of ``layer`` for a report."""
        notes = []
        C, few = self.layer.width, [h.rows for h in self if h.rows < self.layer.width]
        unseen = [str(g) for g, h in enumerate(self) if h.rows == 0]
        if few and not self.layer.routed:
            notes.append(few_rows(min(few), C))
        elif few:
            if unseen:
                notes.append(
                    f"{len(unseen)} of {len(self)} experts saw no rows and were pruned by "
                    f"magnitude: {', '.join(unseen)}"
                )
            if some := [n for n in few if n > 0]:
                notes.append(f"{len(some)} of {len(self)} experts: {few_rows(min(some), C)}")
        if rare := self.rare:
            notes.append(
                f"{len(rare)} of {len(self)} experts saw fewer than {ENOUGH * C} rows ({ENOUGH} "
                "for each input): their second moments were mixed with the identity"
            )
        if self.padding:
            notes.append(f"{self.padding} rows were padding ({self.told_by}) and were left out")
        if self.unmasked:
            notes.append(
                f"padding was counted: the inputs do not have the (batch, length) of {self.told_by}"
            )
        if self.unweighted:
            notes.append(
                "token_weights: on some batches its rows counted the same, since it was not sent "
                "as many as in the original network"
            )
        if (difference := self.differences.get(layer.name)) and difference.unlike:
            notes.append(f"not corrected, only calibrated on pruned inputs: {difference.unlike}")
        elif difference and difference.summed:
            notes.append("corrected together with what is added to its output")
        return notes


def _shrinkage(H: Tensor, rows: float) -> float:
    """The share of the identity that brings a second moment (C, C) of so many rows closest to that
    of all rows, if these are normal. 1 for inputs that seem uncorrelated.

    Source: Chen, Wiesel, Eldar & Hero 2010, the oracle approximating shrinkage estimator.
    """
    C = len(H)
    square, trace = float(H.square().sum()), float(H.diagonal().sum()) ** 2
    spread = (rows + 1 - 2 / C) * (square - trace / C)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / C) * square + trace) / spread)


class _Shares:
    """The weights of the rows of one call, as its groups and their parts ask for them.

    ``counted`` (n,) is 0 for padding, and ``weights`` (n,) the weights otherwise. ``unlike`` tells
    whether these are of another number of rows, and are therefore left out.
    """

    def __init__(
        self, counted: Tensor | None, weights: Tensor | None, device: torch.device
    ) -> None:
        self.counted = counted
        self.weights = None if weights is None else weights.to(device)
        self.unlike = False
        self._passed: dict[int, int] = {}

    def of(self, group: int, count: int) -> Tensor | None:
        """The weights of the next rows of a group; None if all count the same."""
        if self.weights is None:
            return self.counted
        first = self._passed.get(group, 0)
        self._passed[group] = first + count
        part = self.weights[first : first + count]
        if len(part) != count:
            self.weights, self.unlike = None, True
            return self.counted
        return part if self.counted is None else part * self.counted


class _Statistics(Summing):
    """The second moments of all layers of a pass, as sums over the data."""

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self.moments = moments

    def tensors(self) -> dict[str, Tensor]:
        of_each = [(name, m.tensors()) for name, m in self.moments.items()]
        return {f"{name}:{k}": x for name, tensors in of_each for k, x in tensors.items()}

    def lower(self) -> set[str]:
        return {f"{name}:{k}" for name, m in self.moments.items() for k in m.lower()}

    def values(self) -> dict[str, Any]:
        return {name: moments.values() for name, moments in self.moments.items()}

    def set_values(self, values: Mapping[str, Any]) -> None:
        for name, moments in self.moments.items():
            moments.set_values(values[name])


def calibrate(
    layers: Sequence[Layer],
    source: Source,
    label: str,
    *,
    until: nn.Module | None = None,
    readers: Mapping[str, Sequence[Layer]] | None = None,
    corrected: bool = False,
    states: States | None = None,
    purpose: str = "calibrate",
) -> dict[str, Moments]:
    """Accumulate second moments in one pass over the data: name -> a Hessian for every group.

    Parameters
    ----------
    layers, source : Sequence[Layer], Source
        The layers whose inputs are observed, and what runs the model.
    label : str
        The pass's name in the progress bar.
    until : nn.Module, optional
        End each forward early: as soon as the inputs of this module, the one of ``layers``, have
        been seen; or as soon as its output has been summed, if that is compared; or, of a module
        that multiplies several weights, as soon as it has returned.
    readers : {name: layers}, optional
        For each of ``layers``, the layers that read its inputs; by default itself alone.
    corrected : bool
        Compare with the original network: :meth:`Moments.drift` then tells what the readers should
        compensate.
    states : States, optional
        Where the sums are saved along the way.
    purpose : str
        The kind of pass, which distinguishes its saved sums from others of the same layers.
    """
    moments = {layer.name: Moments(layer) for layer in layers}
    mask: Tensor | None = None
    readers = readers or {layer.name: [layer] for layer in layers}
    calls: dict[str, int] = {}  # of each layer, on the batch at hand
    pairs = Pairs(layers, source, readers) if corrected else None
    for name, differences in pairs.differences.items() if pairs is not None else ():
        moments[name].differences = {d.layer.name: d for d in differences}
    entering = until is not None and not any(layer.watched for layer in layers)
    if pairs is not None and pairs.compares_sums:
        entering = False

    def see(layer: Layer, x: Tensor, columns: Columns) -> None:
        if pairs is not None and pairs.running_original:
            pairs.keep(layer, x, columns)
            if entering:
                raise Enough
            return
        of_layer = moments[layer.name]
        of_module = source.tokens(layer)
        if mask is not None or of_module is not None:
            of_layer.told_by = source.told_by if of_module is None else "key_padding_mask"
        weights = of_layer.weights(x, mask if of_module is None else of_module)
        original_rows = None if pairs is None else pairs.original_rows(layer)
        call = calls[layer.name] = calls.get(layer.name, -1) + 1
        shares = _Shares(weights, source.token_weights(readers[layer.name], call), x.device)
        try:
            for group, rows in columns(x):
                share = shares.of(group, len(rows))
                of_layer.add(group, rows, share, uneven=shares.weights is not None)
                if pairs is not None and original_rows is not None:
                    pairs.see(layer.name, group, rows, original_rows, share)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error
        of_layer.unweighted |= shares.unlike
        if entering:
            raise Enough

    with hooked(layers, see):
        for batch in resumable(source, label, purpose, list(moments), _Statistics(moments), states):
            mask = source.mask(batch)
            calls.clear()
            if pairs is None:
                with contextlib.suppress(Enough), ending(until):
                    source.call(source.model, batch)
                continue
            pairs.run_original(batch, until)
            sums, end = pairs.watching(until)
            with contextlib.suppress(Enough), sums, end:
                source.call(source.model, batch)
            pairs.finish(sums)
    for layer in layers:
        if not moments[layer.name].rows:
            raise ArgumentError(
                f"layer {layer.name!r}: it saw no rows on the calibration data (it is not called, "
                "batches are empty, or all of it is padding); pass batches with rows, or exclude it"
            )
    return moments
