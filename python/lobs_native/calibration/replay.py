"""A stack of blocks, run one block at a time on what it receives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lobs_native.calibration.blocks import NoStackError, Stack, hidden_of, run_first, same
from lobs_native.calibration.calls import STRUCTURE, BlockCall, packed, unpacked
from lobs_native.calibration.hooks import Enough, attached
from lobs_native.calibration.partial import States, readable
from lobs_native.calibration.run import Run
from lobs_native.errors import LobsError
from lobs_native.files.safefile import MOST_MARKS, count_marks
from lobs_native.files.shelf import Shelf

__all__ = ["Replay"]


class _Kept:
    """What the blocks of one network are called with, by batch."""

    def __init__(self, limit: int | None) -> None:
        self.hidden = Shelf(limit)  # of the present block
        self.calls: list[list[BlockCall]] = []  # by batch, by block; without hidden states


class Replay:
    """A stack that is run block by block on kept hidden states. Use it as a context manager.

    It takes the place of a ``Run`` in :func:`lobs_native.calibration.calibrate`: batches are those
    of the model, and running one runs the present block alone.
    """

    def __init__(
        self,
        stack: Stack,
        run: Run,
        limit: int | None,
        corrected: bool,
        states: States | None = None,
    ) -> None:
        self.stack = stack
        self.run = run
        self.states = states
        self.block = 0
        share = limit // 2 if limit is not None and corrected else limit
        self._pruned = _Kept(share)
        self._original = _Kept(share) if corrected else None
        self._next = 0
        self._calls_saved = False

    def __enter__(self) -> Replay:
        if self._restore():
            return self
        for number, batch in enumerate(self.run.each(f"inputs of {self.stack.name}")):
            if self._original is not None:
                with self.run.original():
                    self._keep(self._original, number, batch)
            self._keep(self._pruned, number, batch)
        return self

    def _keep(self, kept: _Kept, number: int, batch: Any) -> None:
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
            self.run.call(self.run.model, batch)
        if len(seen) != len(self.stack.modules):
            raise LobsError(
                f"blocks: {self.stack.name!r} is not called on every batch as on the first; pass "
                "blocks=None"
            )
        kept.hidden.put(number, seen[0].hidden.detach())
        kept.calls.append([call.with_hidden(None) for call in seen])

    def __exit__(self, *_: Any) -> None:
        for kept in (self._pruned, self._original):
            if kept is not None:
                kept.hidden.close()
                kept.calls.clear()

    @property
    def model(self) -> nn.Module:
        """The present block."""
        return self.stack.modules[self.block]

    @property
    def batches(self) -> Sequence[Any]:
        """The model's."""
        return self.run.batches

    def each(self, what: str, start: int = 0) -> Iterator[Any]:
        """The batches of one pass without the first ``start``, seeded."""
        self._next = start
        yield from self.run.each(what, start)

    def mask(self, batch: Any) -> Tensor | None:
        """As the run has it."""
        return self.run.mask(batch)

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run the present block on what it receives from the next batch."""
        number, self._next = self._next, self._next + 1
        return self._run(self._pruned, number)

    def call_original(self, batch: Any) -> Any:
        """Run the original block on what it received there from the next batch."""
        assert self._original is not None
        with self.run.original(self.model):
            return self._run(self._original, self._next)

    def _run(self, kept: _Kept, number: int) -> Any:
        try:
            return self.stack.run_block(
                self.block, kept.calls[number][self.block], kept.hidden[number]
            )
        except NoStackError as why:
            raise LobsError(f"blocks: {why}; pass blocks=None") from None

    def advance(self) -> None:
        """Run the present block, as it is now, on everything; its results are what the next one
        receives."""
        for batch in self.each(f"through {self.stack.names[self.block]}"):
            number = self._next
            if self._original is not None:
                self._original.hidden.put(number, hidden_of(self.call_original(batch)).detach())
            self._pruned.hidden.put(number, hidden_of(self.call(self.model, batch)).detach())
        self.block += 1
        self._save()

    # ---- in a run directory ----------------------------------------------------------------------

    def _networks(self) -> list[tuple[str, _Kept]]:
        both = (("pruned", self._pruned), ("original", self._original))
        return [(name, kept) for name, kept in both if kept is not None]

    def _save(self) -> None:
        """Keep what the present block receives, if that is worth its time. What does not fit into
        memory is not kept, since it would have to be read at once."""
        networks, states = self._networks(), self.states
        if states is None or any(kept.hidden.on_disk for _, kept in networks):
            return
        key, size = f"inputs of {self.stack.name}", sum(k.hidden.in_memory for _, k in networks)
        if not states.due(key, size):
            return
        if not self._calls_saved:
            calls = packed({name: kept.calls for name, kept in networks})
            if count_marks(calls[STRUCTURE].numpy().tobytes()) > MOST_MARKS:
                return  # many thousands of batches: more than would be read again
            states.save(f"calls of {self.stack.name}", calls, {})
            self._calls_saved = True
        hidden = {f"{name}.{n}": x for name, kept in networks for n, x in kept.hidden.items()}
        places = {name: str(kept.hidden[0].device) for name, kept in networks}
        states.save(key, hidden, {"block": self.block, "devices": places})

    def _restore(self) -> bool:
        """Take over what :meth:`_save` kept; False if there is nothing."""
        if self.states is None:
            return False
        calls = self.states.load(f"calls of {self.stack.name}")
        inputs = self.states.load(f"inputs of {self.stack.name}")
        if calls is None or inputs is None:
            return False
        tensors, info = inputs
        with readable(f"inputs of {self.stack.name}"):
            found = unpacked(calls[0])
            for name, kept in self._networks():
                kept.calls = [
                    [BlockCall(tuple(args), kwargs, self.stack.slot) for args, kwargs in batch]
                    for batch in found[name]
                ]
                for n in range(len(kept.calls)):
                    key = f"{name}.{n}"
                    kept.hidden.put(n, tensors[key].clone().to(info["devices"][name]))
            block, batches = info["block"], {len(kept.calls) for _, kept in self._networks()}
            if type(block) is not int or not 0 <= block < len(self.stack.modules):
                raise ValueError(f"there is no block {block}")
            if batches != {len(self.batches)}:
                raise ValueError(f"they are of {sorted(batches)} batches")
        self.block, self._calls_saved = block, True
        return True

    def finish(self) -> None:
        """Run the remaining blocks and compare with what the model itself gives on the first batch.

        LobsError if they differ: a layer would then have been calibrated on something else than
        the network's inputs.
        """
        while self.block < len(self.stack.modules):
            self.advance()
        self._compare(self._pruned)
        if self._original is not None:
            with self.run.original():
                self._compare(self._original)
        if self.states is not None:
            for what in ("inputs", "calls"):  # calls alone are of no use
                self.states.drop(f"{what} of {self.stack.name}")

    def _compare(self, replayed: _Kept) -> None:
        kept: list[Any] = []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(hidden_of(output))
            raise Enough

        with (
            attached([self.stack.modules[-1].register_forward_hook(leave)]),
            contextlib.suppress(Enough),
        ):
            run_first(self.run)
        if not kept or not same(replayed.hidden[0], kept[0]):
            raise LobsError(
                f"blocks: run by themselves, the blocks of {self.stack.name!r} do not give what "
                "the model gives; pass blocks=None"
            )
