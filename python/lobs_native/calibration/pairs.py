"""Comparison of the pruned with the original network, row by row, for inputs "corrected".

Let x and x0 be a layer's inputs in the pruned and in the original network. Its new outputs
``x @ W'^T`` should equal ``x0 @ W^T``. If its output goes straight into a sum (a residual
connection), the sums should be equal, so that the change of the other operand is compensated too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.differences import Differences, Gap
from lobs_native.calibration.hooks import Columns, Enough, ending
from lobs_native.calibration.session import Source
from lobs_native.calibration.sums import Sums
from lobs_native.layers import Layer

__all__ = ["Pairs"]


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
        self.running_original = False
        self._inputs: dict[str, list[tuple[Tensor, Columns]]] = {}  # of the original network
        self._addends: dict[str, list[Tensor]] = {}  # of the original network
        self._pending: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self._summed = self._find_sums(readers)
        self.differences = {
            name: self._differences_of(of_name) for name, of_name in readers.items()
        }

    def _differences_of(self, readers: Sequence[Layer]) -> list[Differences]:
        """The differences of layers that read one tensor."""
        alone = [layer for layer in readers if layer.name not in self._summed]
        gap = Gap(alone[0]) if Gap.pays(alone) else None
        return [
            Differences(layer, None if layer.name in self._summed else gap) for layer in readers
        ]

    @property
    def compares_sums(self) -> bool:
        """Whether some layer's output goes straight into a sum, and the sums are compared."""
        return bool(self._summed)

    def _find_sums(self, readers: Mapping[str, Sequence[Layer]]) -> dict[str, nn.Module]:
        """The layers whose outputs go straight into a sum, as seen on the first batch."""
        candidates = {
            layer.name: layer.module
            for of_name in readers.values()
            for layer in of_name
            if layer.token_rows and not layer.watched and len(layer.sites) == 1
        }
        if not candidates:
            return {}
        once: list[str] = []
        if self.source.ranks.first:  # which has the first batch
            with Sums(candidates) as sums:
                for batch in self.source.each("look"):
                    self.source.call(self.source.model, batch)
                    break
            once = [n for n in candidates if sums.calls[n] == 1 and len(sums.addends[n]) == 1]
            once = [name for name in once if name not in sums.elsewhere]
        names = self.source.ranks.value("layers whose outputs are summed", once)
        return {name: candidates[name] for name in names}

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
            elif difference.gap is None:
                difference.update(g, x, x0, None, weights)
            elif difference.gap.layer is difference.layer:  # once for all that share it
                difference.gap.update(g, x, x0, weights)

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
