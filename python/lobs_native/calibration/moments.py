"""One pass over the data: second moments of what layers read, and what there is to say about
them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.hooks import Columns, Enough, ending, hooked
from lobs_native.calibration.pairs import Differences, Pairs
from lobs_native.calibration.partial import Kept, States, resumable
from lobs_native.calibration.run import Source
from lobs_native.errors import NonFiniteError
from lobs_native.layers import Layer
from lobs_native.solvers.hessian import Hessian, few_rows
from lobs_native.solvers.problem import Drift

__all__ = ["Moments", "calibrate"]


class Moments(list[Hessian]):
    """The second moments of a layer's groups, and what there is to say about them."""

    def __init__(self, layer: Layer) -> None:
        bias, device = layer.bias() is not None, layer.weight().device
        super().__init__(
            Hessian(layer.width, bias=bias, device=device) for _ in range(layer.groups)
        )
        self.layer = layer
        self.padding = 0  # rows left out
        self.unmasked = False  # whether a mask did not fit
        self.differences: dict[str, Differences] = {}  # by layer, with inputs "corrected"
        self._matrices: list[Tensor] | None = None

    @property
    def rows(self) -> float:
        """Rows that the layer saw; of all experts together."""
        return sum(h.rows for h in self) if self.layer.routed else self[0].rows

    def matrices(self) -> list[Tensor]:
        """The second moments, made when they are first asked for; the sums are given up then. An
        expert that saw no row gets the mean one without correlations: removing by magnitude."""
        if self._matrices is None:
            some = self.layer.routed and any(h.rows > 0 for h in self)
            made: list[Tensor | None] = []
            for h in self:
                made.append(None if some and h.rows == 0 else h.matrix())
                h.release()
            mean = self._uncorrelated([H for H in made if H is not None])
            self._matrices = [mean if H is None else H for H in made]
        return self._matrices

    def _uncorrelated(self, seen: Sequence[Tensor]) -> Tensor:
        """The mean of second moments, with one size for all columns."""
        C = self.layer.width
        diagonal = torch.ones(len(seen[0]), dtype=torch.float64, device=seen[0].device)
        diagonal[:C] = sum(float(H.diagonal()[:C].mean()) for H in seen) / len(seen) or 1.0
        return torch.diag(diagonal)

    def drift(self, layer: Layer) -> Drift | None:
        """What ``layer`` should make up for; None where the networks could not be compared."""
        found = self.differences.get(layer.name)
        return None if found is None or found.unlike else found.drift([h.rows for h in self])

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The weight of every row of inputs (..., C), 0 for padding; None: all count. ``mask``
        (...,), nonzero for tokens, is used where it fits; both are recorded."""
        if mask is None:
            return None
        if not self.layer.token_rows or x.shape[:-1] != mask.shape:
            self.unmasked = True
            return None
        weights = mask.reshape(-1).to(device=x.device, dtype=torch.float64)
        self.padding += int((weights == 0).sum())
        return weights

    def kept(self) -> Kept:
        """The sums, to go on with later."""
        tensors = {f"{g}.{k}": x for g, h in enumerate(self) for k, x in h.state_dict().items()}
        info: dict[str, Any] = {"padding": self.padding, "unmasked": self.unmasked}
        info["differences"] = {}
        for name, found in self.differences.items():
            mine, info["differences"][name] = found.kept()
            tensors |= {f"{name}/{k}": x for k, x in mine.items()}
        return tensors, info

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Take over what :meth:`kept` gave."""
        for g, h in enumerate(self):
            h.load_state_dict({k: tensors[f"{g}.{k}"] for k in ("sum", "rows", "bias")})
        self.padding, self.unmasked = int(info["padding"]), bool(info["unmasked"])
        for name, found in self.differences.items():
            begin = f"{name}/"
            mine = {k.removeprefix(begin): x for k, x in tensors.items() if k.startswith(begin)}
            found.restore(mine, info["differences"][name])

    def notes(self, layer: Layer) -> list[str]:
        """What a report should say."""
        notes = []
        C, few = self.layer.width, [h.rows for h in self if h.rows < self.layer.width]
        unseen = [str(g) for g, h in enumerate(self) if h.rows == 0]
        if few and not self.layer.routed:
            notes.append(few_rows(min(few), C))
        elif few:
            if unseen:
                notes.append(
                    f"{len(unseen)} of {len(self)} experts saw no row and were pruned by "
                    f"magnitude: {', '.join(unseen)}"
                )
            if some := [n for n in few if n > 0]:
                notes.append(f"{len(some)} of {len(self)} experts: {few_rows(min(some), C)}")
        if self.padding:
            notes.append(f"{self.padding} rows were padding (attention_mask) and were left out")
        if self.unmasked:
            notes.append(
                "padding was counted: the inputs are not (batch, length, width) as attention_mask "
                "has them"
            )
        if (found := self.differences.get(layer.name)) and found.unlike:
            notes.append(f"not corrected, only calibrated on pruned inputs: {found.unlike}")
        elif found and found.summed:
            notes.append("corrected together with what is added to its output")
        return notes


class _Statistics:
    """The second moments of all layers of a pass, as sums that can be kept."""

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self.moments = moments

    @property
    def names(self) -> Sequence[str]:
        return list(self.moments)

    def size(self) -> int:
        found = [d for m in self.moments.values() for d in m.differences.values()]
        moments = sum(h.columns**2 * h.dtype.itemsize for m in self.moments.values() for h in m)
        return moments + sum(p.numel() * p.element_size() for d in found for p in d.pull)

    def kept(self) -> Kept:
        tensors: dict[str, Tensor] = {}
        info: dict[str, Any] = {}
        for name, moments in self.moments.items():
            mine, info[name] = moments.kept()
            tensors |= {f"{name}:{k}": x for k, x in mine.items()}
        return tensors, info

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        for name, moments in self.moments.items():
            begin = f"{name}:"
            mine = {k.removeprefix(begin): x for k, x in tensors.items() if k.startswith(begin)}
            moments.restore(mine, info[name])


def calibrate(
    layers: Sequence[Layer],
    run: Source,
    what: str,
    *,
    until: nn.Module | None = None,
    corrected: Mapping[str, Sequence[Layer]] | None = None,
    states: States | None = None,
    purpose: str = "calibrate",
) -> dict[str, Moments]:
    """One pass over the data: name -> a Hessian for every group.

    Parameters
    ----------
    layers, run, what
        Whose inputs, in what, and the pass's name for people.
    until : nn.Module, optional
        End each forward as soon as this module has returned (and its sum has been made).
    corrected : {name: layers}, optional
        For each of ``layers`` those that read its inputs; :meth:`Moments.drift` then has what they
        should make up for.
    states, purpose
        Where the sums are kept on the way, and what tells them from other passes of these layers.
    """
    moments = {layer.name: Moments(layer) for layer in layers}
    mask: Tensor | None = None
    pairs = Pairs(layers, run, corrected) if corrected else None
    for name, found in pairs.found.items() if pairs is not None else ():
        moments[name].differences = {d.layer.name: d for d in found}

    def see(layer: Layer, x: Tensor, columns: Columns) -> None:
        if pairs is not None and pairs.original_runs:
            pairs.keep(layer, x, columns)
            return
        mine = moments[layer.name]
        weights = mine.weights(x, mask)
        before = None if pairs is None else pairs.rows(layer)
        try:
            for group, rows in columns(x):
                mine[group].update(rows, weights)
                if pairs is not None and before is not None:
                    pairs.see(layer.name, group, rows, before, weights)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error

    with hooked(layers, see):
        for batch in resumable(run, what, purpose, _Statistics(moments), states):
            mask = run.mask(batch)
            if pairs is None:
                with contextlib.suppress(Enough), ending(until):
                    run.call(run.model, batch)
                continue
            pairs.original(batch, until)
            sums, end = pairs.watching(until)
            with contextlib.suppress(Enough), sums, end:
                run.call(run.model, batch)
            pairs.end(sums)
    return moments
