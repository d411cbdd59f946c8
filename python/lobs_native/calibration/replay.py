"""Replay of a stack of blocks, one block at a time, on stored inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.blocks import NotAStackError, Stack, hidden_of, run_first, same
from lobs_native.calibration.calls import STRUCTURE, BlockCall, packed, unpacked
from lobs_native.calibration.finished import Finished
from lobs_native.calibration.hooks import Enough, attached
from lobs_native.calibration.partial import States, readable
from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.session import Session
from lobs_native.calibration.tree import own_batches
from lobs_native.errors import LobsError
from lobs_native.files.shelf import Shelf
from lobs_native.files.strict_json import MOST_MARKS, count_marks
from lobs_native.layers import Layer

__all__ = ["Replay", "UnlikeError", "repeated_limit", "widest_repeated"]

_REPEATED = 1 << 20  # bytes of outputs of finished parts that stay in memory
_WIDEST = 4  # how many times as large as hidden states such an output may be if others are on disk


def repeated_limit(stack: Stack) -> int | None:
    """How many bytes of outputs of finished parts of a block stay in memory, in each network; the
    rest is on disk. None: all of them, since from a device they would have to be copied first."""
    on_cpu = all(p.device.type == "cpu" for p in stack.modules[0].parameters())
    return _REPEATED if on_cpu else None


def widest_repeated(stack: Stack) -> int:
    """How many times as large as hidden states the output of a finished part may be."""
    return 1 if repeated_limit(stack) is None else _WIDEST


class UnlikeError(LobsError):
    """The blocks of a stack do not return what they return in the model."""


class _Inputs:
    """The arguments of the blocks of one network, by batch."""

    def __init__(self, limit: int | None, repeated: int | None) -> None:
        self.hidden = Shelf(limit)  # hidden states of the current block, by batch
        self.calls: dict[int, list[BlockCall]] = {}  # by batch and block, without hidden states
        self.finished = Finished(repeated)  # parts of the current block


class Replay:
    """A stack that is run block by block on stored hidden states. Use it as a context manager.

    It stands in for a ``Session`` in :func:`lobs_native.calibration.moments.calibrate`: it has the
    model's batches, but running one runs the current block alone. Of several ranks, each has the
    inputs for its own batches; with ``whole``, the first one has all.
    """

    def __init__(
        self,
        stack: Stack,
        session: Session,
        limit: int | None,
        corrected: bool,
        states: States | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.stack = stack
        self.session = session
        self.states = states if session.ranks.size == 1 else None  # one rank has not all inputs
        self.block = 0
        share = limit // 2 if limit is not None and corrected else limit
        repeated, self._widest = repeated_limit(stack), widest_repeated(stack)
        self._pruned = _Inputs(share, repeated)
        self._original = _Inputs(share, repeated) if corrected else None
        self._next = 0  # the number of the next batch
        self._calls_saved = False
        self._repeats = limit is None  # whether there is memory for outputs of finished parts
        self._advancing = False
        self._whole = whole and session.ranks.first

    def __enter__(self) -> Replay:
        if self._restore():
            return self
        for batch in self._all(f"inputs of {self.stack.name}"):
            number = self._next
            if self._original is not None:
                with self.session.original():
                    self._store(self._original, number, batch)
            self._store(self._pruned, number, batch)
        return self

    def _store(self, inputs: _Inputs, number: int, batch: Any) -> None:
        """Store the arguments of all blocks on a batch."""
        calls = self.stack.calls_without_computing(self.session, batch)
        if calls is None:
            calls = self._calls(batch)
        inputs.hidden.put(number, calls[0].hidden.detach())
        inputs.calls[number] = [call.with_hidden(None) for call in calls]

    def _calls(self, batch: Any) -> list[BlockCall]:
        """How the model calls the blocks on a batch, by running it up to the last of them."""
        last = len(self.stack.modules) - 1
        seen: list[BlockCall] = []

        def see(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append(BlockCall(args, kwargs, self.stack.slot))
                if i == last:
                    raise Enough

            return hook

        handles = (
            module.register_forward_pre_hook(see(i), with_kwargs=True)
            for i, module in enumerate(self.stack.modules)
        )
        with attached(handles), contextlib.suppress(Enough):
            self.session.call(self.session.model, batch)
        if len(seen) != len(self.stack.modules):
            raise LobsError(
                f"blocks: {self.stack.name!r} is not called on every batch as it is on the first; "
                "pass blocks=None"
            )
        return seen

    def __exit__(self, *_: Any) -> None:
        for inputs in (self._pruned, self._original):
            if inputs is not None:
                inputs.hidden.close()
                inputs.calls.clear()
                inputs.finished.clear()

    @property
    def model(self) -> nn.Module:
        """The current block."""
        return self.stack.modules[self.block]

    @property
    def batches(self) -> Sequence[Any]:
        """The model's batches."""
        return self.session.batches

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.session.ranks

    def each(
        self, label: str, start: int = 0, among: Container[int] | None = None
    ) -> Iterator[Any]:
        """The batches of one pass without the first ``start``, seeded."""
        for batch in self.session.each(label, start, among):
            self._next = self.session.number
            yield batch

    def each_held_back(self, label: str, among: Container[int] | None = None) -> Iterator[Any]:
        """The batches that are held back; their numbers follow those of the others."""
        for batch in self.session.each_held_back(label, among):
            self._next = len(self.batches) + self.session.number
            yield batch

    def _all(self, label: str) -> Iterator[Any]:
        """The batches whose inputs are here, and those that are held back."""
        own = None if self._whole else own_batches(len(self.batches), self.ranks)
        yield from self.each(label, among=own)
        if held_back := self.session.held_back:
            yield from self.each_held_back(label, own_batches(len(held_back), self.ranks))

    def mask(self, batch: Any) -> Tensor | None:
        """The mask of :meth:`Session.mask`."""
        return self.session.mask(batch)

    @property
    def told_by(self) -> str:
        """The kind of mask of :meth:`mask`."""
        return self.session.told_by

    def tokens(self, layer: Layer) -> Tensor | None:
        """The rows of :meth:`Session.tokens`."""
        return self.session.tokens(layer)

    def token_weights(self, layers: Sequence[Layer], call: int) -> Tensor | None:
        """The weights of :meth:`Session.token_weights`."""
        return self.session.token_weights(layers, call)

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run the current block on its input for the next batch."""
        number, self._next = self._next, self._next + 1
        return self._run(self._pruned, number)

    def call_original(self, batch: Any) -> Any:
        """Run the original block on its input in the original network for the next batch."""
        assert self._original is not None
        with self.session.original(self.model):
            return self._run(self._original, self._next)

    def repeat(self, part: nn.Module) -> None:
        """Take it that a part of the current block, called once in it, returns the same from now
        on, and compute it once more at most."""
        if self._repeats:
            for _, inputs in self._networks():
                inputs.finished.add(part)

    def forget_repeats(self) -> None:
        """Compute all parts of the current block again from now on, since they will change."""
        self._pruned.finished.clear()

    def targets(self) -> Iterator[tuple[int, Any, Tensor]]:
        """(number, batch, target) for all batches: what the current block returned in the original
        network; with inputs "pruned", what the original block returns on its present input."""
        inputs = self._pruned if self._original is None else self._original
        for batch in self.each(f"targets of {self.stack.names[self.block]}"):
            number, self._next = self._next, self._next + 1
            with self.session.original(self.model):
                target = hidden_of(self._run(inputs, number)).detach()
            yield number, batch, target

    def run(self, number: int) -> Tensor:
        """What the current block returns on its input for a batch, of any number."""
        output: Tensor = hidden_of(self._run(self._pruned, number))
        return output

    def _run(self, inputs: _Inputs, number: int) -> Any:
        hidden = inputs.hidden[number]
        most = self._widest * hidden.numel() * hidden.element_size()
        try:
            with inputs.finished.repeating(number, most, last=self._advancing):
                call = inputs.calls[number][self.block]
                return self.stack.run_block(self.block, call, hidden)
        except NotAStackError as reason:
            raise LobsError(f"blocks: {reason}; pass blocks=None") from None

    def advance(self) -> None:
        """Run the current block, as it is now, on all batches. Its results are the hidden states
        of the next block, which becomes the current one."""
        self._advancing = True
        for batch in self._all(f"through {self.stack.names[self.block]}"):
            number = self._next
            if self._original is not None:
                self._original.hidden.put(number, hidden_of(self.call_original(batch)).detach())
            self._pruned.hidden.put(number, hidden_of(self.call(self.model, batch)).detach())
        self._advancing = False
        self.block += 1
        for _, inputs in self._networks():
            inputs.finished.clear()
        self._save()

    # ---- in a run directory ----------------------------------------------------------------------

    def _networks(self) -> list[tuple[str, _Inputs]]:
        both = (("pruned", self._pruned), ("original", self._original))
        return [(name, inputs) for name, inputs in both if inputs is not None]

    def _save(self) -> None:
        """Save the current block's inputs if it is time to. Inputs that do not fit into memory are
        not saved, since :meth:`_restore` would have to read them into memory all at once."""
        networks, states = self._networks(), self.states
        if states is None or any(inputs.hidden.on_disk for _, inputs in networks):
            return
        key = f"inputs of {self.stack.name}"
        if not states.due(key, sum(inputs.hidden.in_memory for _, inputs in networks)):
            return
        if not self._calls_saved:
            lists = {
                name: [inputs.calls[n] for n in range(len(inputs.calls))]
                for name, inputs in networks
            }
            calls = packed(lists)
            if count_marks(calls[STRUCTURE].numpy().tobytes()) > MOST_MARKS:
                return  # many thousands of batches: parse_json would refuse to read them
            states.save(f"calls of {self.stack.name}", calls, {})
            self._calls_saved = True
        hidden = {f"{name}.{n}": x for name, inputs in networks for n, x in inputs.hidden.items()}
        devices = {name: str(inputs.hidden[0].device) for name, inputs in networks}
        states.save(key, hidden, {"block": self.block, "devices": devices})

    def _restore(self) -> bool:
        """Take over what :meth:`_save` saved; False if there is nothing."""
        if self.states is None:
            return False
        saved_calls = self.states.load(f"calls of {self.stack.name}")
        saved_inputs = self.states.load(f"inputs of {self.stack.name}")
        if saved_calls is None or saved_inputs is None:
            return False
        tensors, info = saved_inputs
        with readable(f"inputs of {self.stack.name}"):
            calls = unpacked(saved_calls[0])
            for name, inputs in self._networks():
                inputs.calls = {
                    n: [BlockCall(tuple(args), kwargs, self.stack.slot) for args, kwargs in batch]
                    for n, batch in enumerate(calls[name])
                }
                for n in range(len(inputs.calls)):
                    key = f"{name}.{n}"
                    inputs.hidden.put(n, tensors[key].clone().to(info["devices"][name]))
            block, batches = info["block"], {len(inputs.calls) for _, inputs in self._networks()}
            if type(block) is not int or not 0 <= block < len(self.stack.modules):
                raise ValueError(f"there is no block {block}")
            if batches != {len(self.batches) + len(self.session.held_back)}:
                raise ValueError(f"they are of {sorted(batches)} batches")
        self.block, self._calls_saved = block, True
        return True

    def finish(self) -> None:
        """Compare what the current block, the last one that is needed, returns on the first batch
        with what it returns in the model.

        Raises UnlikeError if they differ: layers would then have been calibrated on inputs other
        than the network's.
        """
        alike = True
        for batch in self.each("check") if self.ranks.first else ():
            if self._original is not None:
                replayed = hidden_of(self.call_original(batch))
                with self.session.original():
                    alike = self._is_alike(replayed)
            alike = alike and self._is_alike(hidden_of(self.call(self.model, batch)))
            break
        if not self.ranks.value("whether blocks return the same", alike):
            raise UnlikeError(
                f"blocks: run one by one, the blocks of {self.stack.name!r} do not return what "
                "they return in the model; pass blocks=None"
            )
        if self.states is not None:
            for kind in ("inputs", "calls"):  # in this order: calls alone are of no use
                self.states.drop(f"{kind} of {self.stack.name}")

    def _is_alike(self, replayed: Any) -> bool:
        """Whether the current block returns this in the model, too."""
        results: list[Any] = []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            results.append(hidden_of(output))
            raise Enough

        with (
            attached([self.model.register_forward_hook(leave)]),
            contextlib.suppress(Enough),
        ):
            run_first(self.session)
        return bool(results) and same(replayed, results[0])
