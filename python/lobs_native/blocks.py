"""Calibrating a model block by block: what a block receives is kept, and only that block is run.

To calibrate a layer on what the already pruned layers feed it, the model has to be run again for
every layer. Most models have a stack of blocks, each fed with what the one before it returned:
then it is enough to run one block on its kept inputs, once for every tensor that its layers read,
and once more, pruned, for the inputs of the next one. Stacks are found by what the modules hand to
each other, not by their names, and replaying them is checked against the model itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import CheckpointError, LobsError
from lobs_native.partial import States
from lobs_native.running import Enough, Run, attached
from lobs_native.safefile import MOST_MARKS, count_marks, parse_json
from lobs_native.shelf import Shelf

__all__ = ["Stack", "find_stacks", "readers"]

_CLOSE = 1e-3  # relative distance up to which a replay counts as the model's own result


# ---- what reads the same tensor ------------------------------------------------------------------


def readers(run: Run, modules: Mapping[str, nn.Module]) -> tuple[list[list[str]], set[str]]:
    """Run the first batch and see which modules are called on the very same tensor.

    Returns
    -------
    groups : list of lists of names
        In the order of their first calls; those next to each other that read one tensor together.
    once : set of names
        Modules that were called exactly once.
    """
    calls: list[tuple[str, Any]] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            version = _version(first) if isinstance(first, Tensor) else None
            calls.append((name, (first, version)))

        return see

    with attached(
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ):
        _first(run)
    count: dict[str, int] = {}
    for name, _ in calls:
        count[name] = count.get(name, 0) + 1
    groups: list[list[str]] = []
    last: tuple[Any, Any] = (None, None)
    for name, seen in calls:
        if any(name in group for group in groups):
            last = (None, None)
            continue
        alone = count[name] > 1 or not isinstance(seen[0], Tensor)
        if groups and not alone and seen[0] is last[0] and seen[1] == last[1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = (None, None) if alone else seen
    return groups, {name for name, times in count.items() if times == 1}


def _version(x: Tensor) -> int:
    """How often ``x`` has been written to; inference tensors do not count that."""
    return 0 if x.is_inference() else x._version


def _first(run: Run) -> None:
    for batch in run.each("look"):
        run.call(run.model, batch)
        break


# ---- stacks of blocks ----------------------------------------------------------------------------


@dataclass
class _Call:
    """How a block was called; the hidden state stands at ``slot``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    @property
    def hidden(self) -> Any:
        return self.args[self.slot] if isinstance(self.slot, int) else self.kwargs[self.slot]

    def with_hidden(self, value: Any) -> _Call:
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], value, *self.args[self.slot + 1 :])
            return _Call(args, self.kwargs, self.slot)
        return _Call(self.args, {**self.kwargs, self.slot: value}, self.slot)


def _main(output: Any) -> Any:
    """The hidden state in what a block returns: the tensor, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _plain(value: Any) -> bool:
    """Whether handing a value to a block twice is the same as handing it over once; lists and
    other objects may collect things."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(
        value, (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.Size)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def find_stacks(run: Run, layers: Mapping[str, nn.Module]) -> tuple[list[Stack], list[str]]:
    """Look for stacks of blocks that hold some of ``layers`` (name -> module).

    Returns
    -------
    stacks : list of Stack
        In the order of their calls, none inside another.
    reasons : list of str
        Why containers that might have been stacks are none, a line for each.
    """
    candidates: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in run.model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = [
            (f"{name}.{key}" if name else key, child) for key, child in module.named_children()
        ]
        holding = [
            child
            for path, child in children
            if any(layer == path or layer.startswith(path + ".") for layer in layers)
        ]
        deep = all(next(child.children(), None) is not None for _, child in children)
        inside = any(name.startswith(other + ".") for other in candidates)
        if len(holding) >= 2 and deep and not inside:
            candidates[name] = children
    found: list[tuple[int, Stack]] = []
    reasons = []
    for name, children in candidates.items():
        stack = Stack(name, [path for path, _ in children], [child for _, child in children])
        try:
            found.append((stack.look(run), stack))
        except _NoStackError as why:
            reasons.append(f"{name}: {why}")
    return [stack for _, stack in sorted(found, key=lambda pair: pair[0])], reasons


class _NoStackError(Exception):
    """The message says why modules are no stack."""


class Stack:
    """Modules that a model calls one after another, each once, on what the one before returned."""

    def __init__(self, name: str, names: list[str], modules: list[nn.Module]) -> None:
        self.name = name
        self.names = names
        self.modules = modules
        self.slot: int | str = 0
        self.hidden_bytes = 0  # of what a block receives from the first batch
        self.other_bytes = 0  # of everything else that the blocks are called with then

    def __contains__(self, layer: str) -> bool:
        return self.block_of(layer) is not None

    def block_of(self, layer: str) -> int | None:
        """The number of the block that holds a layer."""
        for i, name in enumerate(self.names):
            if layer == name or layer.startswith(name + "."):
                return i
        return None

    def look(self, run: Run) -> int:
        """Run the first batch and check that this is a stack that can be replayed.

        Returns how many calls of any module came before it. Raises _NoStackError.
        """
        seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Any] = []
        before = 0

        def count(*_: Any) -> None:
            nonlocal before
            before += not seen

        def see(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append((i, args, kwargs))

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)

        handles = [m.register_forward_pre_hook(count) for m in run.model.modules()]
        for i, module in enumerate(self.modules):
            handles.append(module.register_forward_pre_hook(see(i), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with attached(handles):
            _first(run)
        if [i for i, _, _ in seen] != list(range(len(self.modules))):
            raise _NoStackError("its modules are not called once each, in their order")
        if len(outputs) != len(seen):
            raise _NoStackError("a module of it did not return")
        self.slot = self._slot(seen[1][1:], outputs[0])
        returned = {id(t) for output in outputs for t in _tensors(output)}
        for k, (i, args, kwargs) in enumerate(seen):
            call = _Call(args, kwargs, self.slot)
            try:
                hidden = call.hidden
            except (IndexError, KeyError):
                raise _NoStackError(f"{self.names[i]} is called in another way") from None
            if not isinstance(hidden, Tensor):
                raise _NoStackError(f"{self.names[i]} is not called on a tensor")
            if k > 0 and hidden is not _main(outputs[k - 1]):
                raise _NoStackError(f"{self.names[i]} is not called on what came before it")
            others = call.with_hidden(None)
            for value in (*others.args, *others.kwargs.values()):
                if not _plain(value):
                    raise _NoStackError(
                        f"{self.names[i]} is handed a {type(value).__name__}, which may change "
                        "from call to call"
                    )
                if any(id(t) in returned for t in _tensors(value)):
                    raise _NoStackError(f"{self.names[i]} also reads other results of the stack")
        call = _Call(*seen[0][1:], self.slot)
        hidden = call.hidden
        self.hidden_bytes = hidden.numel() * hidden.element_size()
        around: dict[int, int] = {}
        for _, args, kwargs in seen:
            for t in _tensors([_Call(args, kwargs, self.slot).with_hidden(None).args, kwargs]):
                around[t.data_ptr()] = t.numel() * t.element_size()
        around.pop(hidden.data_ptr(), None)
        self.other_bytes = sum(around.values())
        for k, (_, args, kwargs) in enumerate(seen):
            call = _Call(args, kwargs, self.slot)
            hidden = _main(self._run(k, call, hidden))
            if not _same(hidden, _main(outputs[k])):
                raise _NoStackError(f"{self.names[k]} does not give the same when run again")
        return before

    def _slot(self, second: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> int | str:
        args, kwargs = second
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if value is _main(output):
                return place
        raise _NoStackError(f"{self.names[1]} is not called on what {self.names[0]} returns")

    def _run(self, i: int, call: _Call, hidden: Tensor) -> Any:
        """Block i on a copy of ``hidden``, which it may write to."""
        ready = call.with_hidden(hidden.clone())
        others = list(_tensors([call.with_hidden(None).args, call.with_hidden(None).kwargs]))
        versions = [_version(t) for t in others]
        out = self.modules[i](*ready.args, **ready.kwargs)
        if [_version(t) for t in others] != versions:
            raise _NoStackError(f"{self.names[i]} writes to what it is handed")
        return out

    def replay(
        self,
        run: Run,
        limit: int | None = None,
        *,
        corrected: bool = False,
        states: States | None = None,
    ) -> Replay:
        """Start, or go on from ``states``: keep what every block is called with and the first one's
        hidden states; ``corrected`` for the original network, too."""
        return Replay(self, run, limit, corrected, states)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    x, y = a.double(), b.double()
    return float((x - y).norm()) <= _CLOSE * float(y.norm())


# ---- calls as tensors and plain values -----------------------------------------------------------


_STRUCTURE = "structure"


def packed(value: Any) -> dict[str, Tensor]:
    """Tensors, each once, and JSON as bytes that says how ``value`` is made of them."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    calls: dict[str, int] = {}  # blocks are mostly called alike

    def pack(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = names.setdefault(id(x), f"{len(names)}")
            tensors[name] = x
            return {"tensor": name, "device": str(x.device)}
        if isinstance(x, _Call):
            text = json.dumps([pack(x.args), pack(x.kwargs)])
            return {"call": calls.setdefault(text, len(calls))}
        if isinstance(x, torch.Size):
            return {"size": list(x)}
        if isinstance(x, (torch.dtype, torch.device)):
            return {type(x).__name__: str(x).removeprefix("torch.")}
        if isinstance(x, (list, tuple)):
            return [pack(part) for part in x]
        if isinstance(x, dict):
            return {"dict": [[key, pack(part)] for key, part in x.items()]}
        if isinstance(x, float):
            return {"float": x.hex()}
        return x

    told = pack(value)
    text = f'{{"value": {json.dumps(told)}, "calls": [{", ".join(calls)}]}}'.encode()
    return {**tensors, _STRUCTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpacked(tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`packed` was given; lists and tuples come back as tuples."""
    moved: dict[str, Tensor] = {}

    def unpack(x: Any) -> Any:
        if isinstance(x, list):
            return tuple(unpack(part) for part in x)
        if not isinstance(x, dict):
            return x
        if "tensor" in x:
            name = x["tensor"]
            if name not in moved:
                moved[name] = tensors[name].clone().to(x["device"])
            return moved[name]
        if "call" in x:
            return unpack(found["calls"][x["call"]])
        if "size" in x:
            return torch.Size(x["size"])
        if "dtype" in x:
            kind = getattr(torch, x["dtype"])
            if not isinstance(kind, torch.dtype):
                raise TypeError(f"{x['dtype']} is no dtype")
            return kind
        if "device" in x:
            return torch.device(x["device"])
        if "float" in x:
            return float.fromhex(x["float"])
        return {key: unpack(part) for key, part in x["dict"]}

    found = parse_json(tensors[_STRUCTURE].numpy().tobytes(), _STRUCTURE)
    return unpack(found["value"])


class _Kept:
    """What the blocks of one network are called with, by batch."""

    def __init__(self, limit: int | None) -> None:
        self.hidden = Shelf(limit)  # of the present block
        self.calls: list[list[_Call]] = []  # by batch, by block; without hidden states


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
        seen: list[_Call] = []

        def see(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append(_Call(args, kwargs, self.stack.slot))
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
            return self.stack._run(self.block, kept.calls[number][self.block], kept.hidden[number])
        except _NoStackError as why:
            raise LobsError(f"blocks: {why}; pass blocks=None") from None

    def advance(self) -> None:
        """Run the present block, as it is now, on everything; its results are what the next one
        receives."""
        for batch in self.each(f"through {self.stack.names[self.block]}"):
            number = self._next
            if self._original is not None:
                self._original.hidden.put(number, _main(self.call_original(batch)).detach())
            self._pruned.hidden.put(number, _main(self.call(self.model, batch)).detach())
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
            if count_marks(calls[_STRUCTURE].numpy().tobytes()) > MOST_MARKS:
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
        try:
            found = unpacked(calls[0])
            for name, kept in self._networks():
                kept.calls = [
                    [_Call(tuple(args), kwargs, self.stack.slot) for args, kwargs in batch]
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
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"run_dir: the inputs of {self.stack.name} that are kept there cannot be read: "
                f"{error}; repair the run or begin a new one"
            ) from error
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
            kept.append(_main(output))
            raise Enough

        with (
            attached([self.stack.modules[-1].register_forward_hook(leave)]),
            contextlib.suppress(Enough),
        ):
            _first(self.run)
        if not kept or not _same(replayed.hidden[0], kept[0]):
            raise LobsError(
                f"blocks: run by themselves, the blocks of {self.stack.name!r} do not give what "
                "the model gives; pass blocks=None"
            )
