"""In which order a model calls its layers, how often, and which of them read the same tensor: over
all batches, where a batch may take another way through the model than the first."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.hooks import Columns, attached, first_argument, hooked
from lobs_native.calibration.session import Session
from lobs_native.layers import Layer

__all__ = ["Flow", "Look", "flow_of", "version_of"]


@dataclass(frozen=True)
class Flow:
    """How the layers of a model are called."""

    order: list[str]  # layers that are called before others in a batch come before them
    groups: list[list[str]]  # layers that are always called in a row on the very same tensor
    once: set[str]  # layers that no batch calls twice
    rows: dict[str, float]  # rows of the first batch for each layer, averaged over its groups


def flow_of(layers: Sequence[Layer], session: Session) -> Flow:
    """Run the model to see how it calls ``layers``: on the first batch if that reaches them all,
    otherwise on every batch. Layers that are never called are not in the result."""
    look = Look(layers)
    with look.entered(), hooked(layers, look.see):
        for batch in session.each("order"):
            session.call(session.model, batch)
            look.end_batch()
            if look.batches == 1 and look.complete:
                break
    return look.flow()


class Look:
    """Notes the calls of ``layers`` while the model runs, batch by batch."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.names = [layer.name for layer in layers]
        self.found: dict[str, int] = {}  # layer -> its place among those called first
        self.rows: dict[str, float] = {}
        self.batches = 0
        self._twice: set[str] = set()
        self._after: dict[str, set[str]] = {}  # layer -> those called next in some batch
        self._class = dict.fromkeys(self.names, 0)  # equal for layers that read the same tensors
        self._seen: dict[str, None] = {}  # layers of this batch in the order of their inputs
        # Of this batch: each call's layer, and a number that is that of the call before if both are
        # on the same tensor; None if it is on none. Tensors themselves would take memory.
        self._calls: list[tuple[str, int | None]] = []
        self._last: tuple[Tensor, int] | None = None  # the last call's tensor, and its version

    @property
    def complete(self) -> bool:
        """Whether all layers have been called."""
        return len(self.found) == len(self.names)

    def flow(self) -> Flow:
        """What was seen."""
        return Flow(self.order(), self.groups(), self.once(), self.rows)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The context in which the model is run."""
        with attached(
            layer.caller.register_forward_pre_hook(self._entering(layer.name), with_kwargs=True)
            for layer in self.layers
        ):
            yield

    def _entering(self, name: str) -> Callable[..., None]:
        """A hook for the module that uses a layer's weight."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = first_argument(args, kwargs)
            if not isinstance(first, Tensor):
                self._calls.append((name, None))
                self._last = None
                return
            last, version = self._last, version_of(first)
            again = last is not None and last[0] is first and last[1] == version
            number = self._calls[-1][1] if again else len(self._calls)
            self._calls.append((name, number))
            self._last = first, version

        return enter

    def see(self, layer: Layer, x: Tensor, columns: Columns) -> None:
        """Record the input of a layer."""
        self._seen.setdefault(layer.name)
        self.found.setdefault(layer.name, len(self.found))
        if self.batches == 0:
            count = sum(len(piece) for _, piece in columns(x)) / layer.groups
            self.rows[layer.name] = self.rows.get(layer.name, 0.0) + count

    def end_batch(self) -> None:
        """Take the calls of a batch into account."""
        names = list(self._seen)
        for name, following in itertools.pairwise(names):
            self._after.setdefault(name, set()).add(following)
        self._divide(self._groups_of_batch())
        self._seen.clear()
        self._calls.clear()
        self._last = None
        self.batches += 1

    def _groups_of_batch(self) -> dict[str, int]:
        """Layer -> the number of its group in this batch."""
        count: dict[str, int] = {}
        for name, _ in self._calls:
            count[name] = count.get(name, 0) + 1
        self._twice |= {name for name, times in count.items() if times > 1}
        groups: dict[str, int] = {}
        number = -1
        last: int | None = None
        for name, tensor in self._calls:
            if name in groups:
                last = None
                continue
            alone = count[name] > 1 or tensor is None
            if alone or tensor != last:
                number += 1
            groups[name] = number
            last = None if alone else tensor
        return groups

    def _divide(self, groups: Mapping[str, int]) -> None:
        """Refine the classes of layers by the groups of a batch."""
        numbers: dict[tuple[int, int], int] = {}
        for name in self.names:
            key = (self._class[name], groups.get(name, -1))
            self._class[name] = numbers.setdefault(key, len(numbers))

    def order(self) -> list[str]:
        """The layers sorted so that none comes before one that is called before it; where batches
        contradict each other, as they were called first."""
        before = dict.fromkeys(self.found, 0)
        for name in self.found:
            for following in self._after.get(name, ()):
                before[following] += 1
        ready = [(place, name) for name, place in self.found.items() if not before[name]]
        heapq.heapify(ready)
        rest = iter(self.found)  # in the order of their first calls, for contradictions
        done: dict[str, None] = {}
        while len(done) < len(self.found):
            name = heapq.heappop(ready)[1] if ready else next(rest)
            if name in done:
                continue
            done[name] = None
            for following in self._after.get(name, ()):
                before[following] -= 1
                if before[following] == 0:
                    heapq.heappush(ready, (self.found[following], following))
        return list(done)

    def groups(self) -> list[list[str]]:
        """The layers that every batch calls together."""
        groups: dict[int, list[str]] = {}
        for name in self.order():
            groups.setdefault(self._class[name], []).append(name)
        return list(groups.values())

    def once(self) -> set[str]:
        """The layers that are called, and never twice in a batch."""
        return set(self.found) - self._twice


def version_of(x: Tensor) -> int:
    """How often ``x`` has been written to; 0 for inference tensors, which do not track it."""
    return 0 if x.is_inference() else x._version
