"""Comparison of the pruned with the original network, row by row, for inputs "corrected".

Let x and x0 be a layer's inputs in the pruned and in the original network. Its new outputs
``x @ W'^T`` should equal ``x0 @ W^T``. If its output goes straight into a sum (a residual
connection), the sums should be equal, so that the change of the other operand is compensated too.
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
from lobs_native.calibration.session import Source
from lobs_native.calibration.sums import Sums
from lobs_native.errors import NonFiniteError
from lobs_native.layers import Layer
from lobs_native.solvers.hessian import needs_float64
from lobs_native.solvers.problem import Drift

__all__ = ["Differences", "Pairs"]

_AT_ONCE = 4096  # rows in one float32 product


class Differences:
    """How far a layer's outputs on the pruned network's inputs are from its outputs in the original
    network, before the layer itself is pruned: sums over rows.

    ``unlike`` tells why the two networks could not be compared row by row; "" if they could.
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
            self.unlike = "its experts are not sent the same rows as in the original network"

    @ops.full_precision()
    def update(
        self, g: int, x: Tensor, x0: Tensor, extra: Tensor | None, weights: Tensor | None
    ) -> None:
        """Add rows x (n, C) of the pruned and x0 (n, C) of the original network. ``extra`` (n, R)
        is what is added to the layer's output in the original network, less what is in this one."""
        C, W, dtype = self.layer.width, self.W[g], self.dtype
        if needs_float64(x, weights) or needs_float64(x0, weights):
            dtype, W = torch.float64, W.double()
        for at in torch.arange(len(x), device=x.device).split(_AT_ONCE):
            if weights is not None:
                at = at[weights[at] > 0]
            a, b = x[at].to(dtype), x0[at].to(dtype)
            missing = (b - a) @ W.T
            if extra is not None:
                missing += extra[at].to(dtype)
            target = b @ W.T
            if self.bias is not None:
                target += self.bias[g]
            w = None if weights is None else weights[at, None].to(dtype)
            weighted = missing if w is None else missing * w
            self.pull[g][:C] += (a.T @ weighted).double()
            if len(self.pull[g]) > C:
                self.pull[g][C] += weighted.sum(0).double()
            self.inherited[g] += float((missing * weighted).sum(dtype=torch.float64))
            self.energy[g] += float(
                (target.square() * (1.0 if w is None else w)).sum(dtype=torch.float64)
            )

    def kept(self) -> Kept:
        """The sums, from which :meth:`restore` resumes."""
        tensors = {f"pull.{g}": p for g, p in enumerate(self.pull)}
        each = torch.tensor([self.inherited, self.energy], dtype=torch.float64)
        info = {"summed": self.summed, "unlike": self.unlike}
        return {**tensors, "inherited and energy": each}, info

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Take over the sums that :meth:`kept` returned."""
        for g, pull in enumerate(self.pull):
            pull.copy_(tensors[f"pull.{g}"])
        self.inherited, self.energy = tensors["inherited and energy"].tolist()
        self.summed, self.unlike = bool(info["summed"]), str(info["unlike"])

    def drift(self, rows: Sequence[float]) -> Drift:
        """The means over the rows that each group saw. Call it once: it overwrites the sums."""
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
    """The inputs of layers in the original network, kept for one batch and compared with those in
    the pruned network."""

    def __init__(
        self,
        layers: Sequence[Layer],
        source: Source,
        readers: Mapping[str, Sequence[Layer]],
    ) -> None:
        self.layers, self.source = layers, source
        self.differences = {
            name: [Differences(reader) for reader in of_name] for name, of_name in readers.items()
        }
        self.running_original = False
        self._inputs: dict[str, list[tuple[Tensor, Columns]]] = {}  # of the original network
        self._addends: dict[str, list[Tensor]] = {}  # of the original network
        self._pending: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self._summed = self._find_sums()

    def _find_sums(self) -> dict[str, nn.Module]:
        """The layers whose outputs go straight into a sum, as seen on the first batch."""
        candidates = {
            d.layer.name: d.layer.module
            for differences in self.differences.values()
            for d in differences
            if d.layer.token_rows and not d.layer.watched and len(d.layer.sites) == 1
        }
        if not candidates:
            return {}
        with Sums(candidates) as sums:
            for batch in self.source.each("look"):
                self.source.call(self.source.model, batch)
                break
        once = [n for n in candidates if sums.calls[n] == 1 and len(sums.addends[n]) == 1]
        return {name: candidates[name] for name in once if name not in sums.elsewhere}

    def watching(
        self, until: nn.Module | None
    ) -> tuple[Sums, contextlib.AbstractContextManager[Any]]:
        """Contexts for one forward: one observes the sums, the other ends the forward. If there are
        sums, the last of them ends it instead."""
        waiting = set(self._summed)

        def stop(name: str) -> None:
            waiting.discard(name)
            if until is not None and not waiting:
                raise Enough

        return Sums(self._summed, stop), ending(None if self._summed else until)

    def run_original(self, batch: Any, until: nn.Module | None) -> None:
        """Run the original network on a batch. The caller's hooks pass its inputs to :meth:`keep`
        while ``running_original`` is True."""
        self._inputs = {layer.name: [] for layer in self.layers}
        sums, end = self.watching(until)
        self.running_original = True
        try:
            with contextlib.suppress(Enough), sums, end:
                self.source.call_original(batch)
        finally:
            self.running_original = False
        self._addends = sums.addends

    def keep(self, layer: Layer, x: Tensor, columns: Columns) -> None:
        """Record a layer's input x in the original network."""
        self._inputs[layer.name].append((x.detach().clone(), columns))

    def original_rows(self, layer: Layer) -> Iterator[tuple[int, Tensor]]:
        """(group, x0) of the layer's next call in the original network."""
        calls = self._inputs[layer.name]
        if not calls:
            self._set_unlike(layer.name, "it is called more often than in the original network")
            return
        x, columns = calls.pop(0)
        yield from columns(x)

    def see(
        self,
        name: str,
        g: int,
        x: Tensor,
        original_rows: Iterator[tuple[int, Tensor]],
        weights: Tensor | None,
    ) -> None:
        """Compare rows x (n, C) of the pruned network with the next ones of the original one."""
        g0, x0 = next(original_rows, (-1, x))
        if g0 != g or x0.shape != x.shape:
            self._set_unlike(name, "its inputs have other shapes than in the original network")
            return
        for difference in self.differences[name]:
            if difference.unlike:
                continue
            if difference.layer.name in self._summed:
                if not any(pending[0] == name for pending in self._pending):
                    self._pending.append((name, x.detach().clone(), x0, weights))
            else:
                difference.update(g, x, x0, None, weights)

    def finish(self, sums: Sums) -> None:
        """Compare the layers whose outputs are summed, now that the forward is complete."""
        for name, x, x0, weights in self._pending:
            for difference in self.differences[name]:
                reader = difference.layer.name
                if difference.unlike or reader not in self._summed:
                    continue
                addends = [*sums.addends[reader], *self._addends[reader]]
                whole = len(x) * difference.layer.rows
                if len(addends) != 2 or any(addend.numel() != whole for addend in addends):
                    difference.unlike = "what is added to its output differs from call to call"
                    continue
                difference.summed = True
                extra = (addends[1] - addends[0]).reshape(len(x), -1)
                difference.update(0, x, x0, extra, weights)
        self._pending.clear()
        for name, calls in self._inputs.items():
            if calls:
                self._set_unlike(name, "it is called less often than in the original network")

    def _set_unlike(self, name: str, reason: str) -> None:
        for difference in self.differences[name]:
            difference.unlike = difference.unlike or reason
