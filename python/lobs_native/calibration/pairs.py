"""The original network beside the pruned one, row by row: inputs "corrected".

With x and x0 what a layer reads in the pruned and in the original network, its new outputs ``x @
W'^T`` should be ``x0 @ W^T``. Where its output goes straight into a sum (a residual connection),
the sums should agree, so that what the other operand has lost is made up for as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import ops
from lobs_native.calibration.hooks import Columns, Enough, ending
from lobs_native.calibration.partial import Kept
from lobs_native.calibration.run import Source
from lobs_native.calibration.sums import Sums
from lobs_native.errors import NonFiniteError
from lobs_native.layers import Layer
from lobs_native.solvers.problem import Drift

__all__ = ["Differences", "Pairs"]

_AT_ONCE = 4096  # rows in one float32 product of two networks' difference


class Differences:
    """How far a layer, as it is, is from the original network's outputs on the pruned network's
    inputs: sums over rows.

    ``unlike`` says why the two networks could not be compared row by row, where they could not.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        wide = layer.weight().dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.W = layer.weight().to(self.dtype)  # (G, R, C)
        bias = layer.bias()
        self.bias = None if bias is None else bias.to(self.dtype)
        D = layer.width + (bias is not None)
        self.pull = [
            torch.zeros(D, layer.rows, dtype=torch.float64, device=self.W.device)
            for _ in range(layer.groups)
        ]
        self.inherited = [0.0] * layer.groups
        self.energy = [0.0] * layer.groups
        self.summed = False
        self.unlike = ""
        if layer.routed:
            self.unlike = "experts are sent other rows than in the original network"

    @ops.full_precision()
    def update(
        self, g: int, x: Tensor, x0: Tensor, extra: Tensor | None, weights: Tensor | None
    ) -> None:
        """Add rows x (n, C) of the pruned and x0 (n, C) of the original network; ``extra`` (n, R)
        is how much more is added to the original one's output."""
        C, W = self.layer.width, self.W[g]
        for at in torch.arange(len(x), device=x.device).split(_AT_ONCE):
            if weights is not None:
                at = at[weights[at] > 0]
            a, b = x[at].to(self.dtype), x0[at].to(self.dtype)
            away = (b - a) @ W.T
            if extra is not None:
                away += extra[at].to(self.dtype)
            wanted = b @ W.T
            if self.bias is not None:
                wanted += self.bias[g]
            w = None if weights is None else weights[at, None].to(self.dtype)
            weighted = away if w is None else away * w
            self.pull[g][:C] += (a.T @ weighted).double()
            if len(self.pull[g]) > C:
                self.pull[g][C] += weighted.sum(0).double()
            self.inherited[g] += float((away * weighted).sum(dtype=torch.float64))
            self.energy[g] += float(
                (wanted.square() * (1.0 if w is None else w)).sum(dtype=torch.float64)
            )

    def kept(self) -> Kept:
        """The sums, to go on with later."""
        tensors = {f"pull.{g}": p for g, p in enumerate(self.pull)}
        each = torch.tensor([self.inherited, self.energy], dtype=torch.float64)
        info = {"summed": self.summed, "unlike": self.unlike}
        return {**tensors, "inherited and energy": each}, info

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Take over what :meth:`kept` gave."""
        for g, mine in enumerate(self.pull):
            mine.copy_(tensors[f"pull.{g}"])
        self.inherited, self.energy = tensors["inherited and energy"].tolist()
        self.summed, self.unlike = bool(info["summed"]), str(info["unlike"])

    def drift(self, rows: Sequence[float]) -> Drift:
        """Means over the rows that each group saw; to be called once."""
        if not all(bool(torch.isfinite(p).all()) for p in self.pull):
            raise NonFiniteError(
                f"layer {self.layer.name!r}: NaN or infinity in its input in the original network"
            )
        each = [n or 1.0 for n in rows]
        return Drift(
            pull=[p.div_(n) for p, n in zip(self.pull, each, strict=True)],
            inherited=sum(e / n for e, n in zip(self.inherited, each, strict=True)),
            energy=sum(e / n for e, n in zip(self.energy, each, strict=True)),
        )


class Pairs:
    """What layers read in the original network, kept for one batch beside what they read in the
    pruned one."""

    def __init__(
        self,
        layers: Sequence[Layer],
        run: Source,
        readers: Mapping[str, Sequence[Layer]],
    ) -> None:
        self.layers, self.run = layers, run
        self.found = {name: [Differences(r) for r in mine] for name, mine in readers.items()}
        self.original_runs = False  # what is read now is the original network's
        self.read: dict[str, list[tuple[Tensor, Columns]]] = {}
        self.added: dict[str, list[Tensor]] = {}
        self.late: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self.summed = self._find_sums()

    def _find_sums(self) -> dict[str, nn.Module]:
        """The layers whose outputs go straight into a sum, found by running the first batch."""
        candidates = {
            d.layer.name: d.layer.module
            for mine in self.found.values()
            for d in mine
            if d.layer.token_rows and not d.layer.watched and len(d.layer.sites) == 1
        }
        if not candidates:
            return {}
        with Sums(candidates) as sums:
            for batch in self.run.each("look"):
                self.run.call(self.run.model, batch)
                break
        once = [n for n in candidates if sums.calls[n] == 1 and len(sums.found[n]) == 1]
        return {name: candidates[name] for name in once if name not in sums.elsewhere}

    def watching(
        self, until: nn.Module | None
    ) -> tuple[Sums, contextlib.AbstractContextManager[Any]]:
        """For one forward: what sees the sums, and what ends it, which is the last of the sums
        where there are any."""
        waiting = set(self.summed)

        def stop(name: str) -> None:
            waiting.discard(name)
            if until is not None and not waiting:
                raise Enough

        return Sums(self.summed, stop), ending(None if self.summed else until)

    def original(self, batch: Any, until: nn.Module | None) -> None:
        """Run the original network on a batch; :meth:`keep` is to be told what is read in it."""
        self.read = {layer.name: [] for layer in self.layers}
        sums, end = self.watching(until)
        self.original_runs = True
        try:
            with contextlib.suppress(Enough), sums, end:
                self.run.call_original(batch)
        finally:
            self.original_runs = False
        self.added = sums.found

    def keep(self, layer: Layer, x: Tensor, columns: Columns) -> None:
        """A layer reads x in the original network."""
        self.read[layer.name].append((x.detach().clone(), columns))

    def rows(self, layer: Layer) -> Iterator[tuple[int, Tensor]]:
        """What the layer read in the original network at the call that is next in turn."""
        kept = self.read[layer.name]
        if not kept:
            self._unlike(layer.name, "it is called more often than in the original network")
            return
        x, columns = kept.pop(0)
        yield from columns(x)

    def see(
        self,
        name: str,
        g: int,
        x: Tensor,
        rows: Iterator[tuple[int, Tensor]],
        weights: Tensor | None,
    ) -> None:
        """Rows x (n, C) of the pruned network, beside the next of the original one's."""
        g0, x0 = next(rows, (-1, x))
        if g0 != g or x0.shape != x.shape:
            self._unlike(name, "its inputs have other shapes than in the original network")
            return
        for difference in self.found[name]:
            if difference.unlike:
                continue
            if difference.layer.name in self.summed:
                if not any(kept[0] == name for kept in self.late):
                    self.late.append((name, x.detach().clone(), x0, weights))
            else:
                difference.update(g, x, x0, None, weights)

    def end(self, sums: Sums) -> None:
        """The forward is done: what was added to outputs is known."""
        for name, x, x0, weights in self.late:
            for difference in self.found[name]:
                mine = difference.layer.name
                if difference.unlike or mine not in self.summed:
                    continue
                added = [*sums.found[mine], *self.added[mine]]
                whole = len(x) * difference.layer.rows
                if len(added) != 2 or any(extra.numel() != whole for extra in added):
                    difference.unlike = "what is added to its output differs from call to call"
                    continue
                difference.summed = True
                extra = (added[1] - added[0]).reshape(len(x), -1)
                difference.update(0, x, x0, extra, weights)
        self.late.clear()
        for name, kept in self.read.items():
            if kept:
                self._unlike(name, "it is called less often than in the original network")

    def _unlike(self, name: str, why: str) -> None:
        for difference in self.found[name]:
            difference.unlike = difference.unlike or why
