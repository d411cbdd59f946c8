"""Stacks of blocks, which can be calibrated one block at a time on stored inputs.

Calibrating a layer on the outputs of the layers pruned before it takes a run of the whole model for
every layer. But most models have a stack of blocks, each of which is called on the result of the
one before. One block can then be run alone on its stored inputs: once for every tensor that its
layers read, and once more, pruned, to compute the inputs of the next block. Stacks are recognised
by the tensors that modules pass on, not by names, and a replay is checked against the model itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.calls import BlockCall
from lobs_native.calibration.finished import with_forward
from lobs_native.calibration.flow import version_of
from lobs_native.calibration.hooks import Enough, attached
from lobs_native.calibration.session import Session

__all__ = ["NotAStackError", "Sightings", "Stack", "find_stacks", "hidden_of", "run_first", "same"]

_CLOSE = 1e-3  # relative distance below which a replay counts as equal to the model's own result


def run_first(session: Session) -> None:
    """Run the model on the first batch."""
    for batch in session.each("look"):
        session.call(session.model, batch)
        break


# ---- stacks of blocks ----------------------------------------------------------------------------


def hidden_of(output: Any) -> Any:
    """The hidden state in a block's output: the output itself, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _plain(value: Any) -> bool:
    """Whether a value can be passed to a block again without side effects. A list or another
    object may accumulate something at each call."""
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


def _containers(model: nn.Module, layers: Iterable[str]) -> dict[str, list[tuple[str, nn.Module]]]:
    """The lists of modules that may be stacks around some of ``layers``: name -> its children, up
    to the last that holds one of them. None is inside another."""
    names = list(layers)
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = [
            (f"{name}.{key}" if name else key, child) for key, child in module.named_children()
        ]
        holding = [
            i
            for i, (path, _) in enumerate(children)
            if any(layer == path or layer.startswith(path + ".") for layer in names)
        ]
        deep = all(next(child.children(), None) is not None for _, child in children)
        inside = any(name.startswith(other + ".") for other in found)
        if len(holding) >= 2 and deep and not inside:
            found[name] = children[: holding[-1] + 1]
    return found


@dataclass
class _Sighting:
    """How the modules of a list were called on a batch."""

    before: int = 0  # module calls before its first
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class Sightings:
    """Watches the lists of modules that may be stacks around some layers while the model runs on
    its first batch."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self.model = model
        self.containers = _containers(model, layers)
        self.seen = {name: _Sighting() for name in self.containers}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The context in which the model is run on the batch."""
        handles = []
        for name, children in self.containers.items():
            seen = self.seen[name]
            for i, (_, module) in enumerate(children):
                hook = _entering(seen, i)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(module.register_forward_hook(_leaving(seen)))
        if self.containers:
            handles += [m.register_forward_pre_hook(self._count) for m in self.model.modules()]
        with attached(handles):
            yield

    def _count(self, *_: Any) -> None:
        for seen in self.seen.values():
            seen.before += not seen.calls

    def stacks(self, session: Session) -> tuple[list[Stack], list[str]]:
        """See :func:`find_stacks`. Call it once: it drops what was seen. Of several ranks, the
        first verifies the stacks."""
        stacks: list[tuple[int, Stack]] = []
        reasons: list[str] = []
        for name, children in self.containers.items():
            stack = Stack(name, [path for path, _ in children], [child for _, child in children])
            stack.all_blocks = len(list(self.model.get_submodule(name).children()))
            seen, reason = self.seen.pop(name), ""
            if session.ranks.first:
                try:
                    stack.verify(seen)
                    stack.verify_hollow(session, seen)
                except NotAStackError as error:
                    reason = str(error)
            reason, *known = session.ranks.value(f"stack {name}", [reason, *stack.known()])
            if reason:
                reasons.append(f"{name}: {reason}")
            else:
                stack.learn(*known)
                stacks.append((seen.before, stack))
        return [stack for _, stack in sorted(stacks, key=lambda pair: pair[0])], reasons


def _entering(seen: _Sighting, i: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append((i, args, kwargs))

    return hook


def _leaving(seen: _Sighting) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(output)

    return hook


def find_stacks(
    session: Session, layers: Iterable[str], seen: Sightings | None = None
) -> tuple[list[Stack], list[str]]:
    """Find the stacks of blocks that contain some of ``layers`` (names), each up to the last block
    that does.

    ``seen`` on the first batch spares a run of the model, if it was for the same layers.

    Returns
    -------
    stacks : list of Stack
        In the order of their calls. None is inside another.
    reasons : list of str
        For each container that looked like a stack but is not one, a line that tells why.
    """
    fresh = Sightings(session.model, layers)
    if seen is None or seen.containers != fresh.containers:
        seen = fresh
        with seen.watching():
            run_first(session)
    return seen.stacks(session)


class NotAStackError(Exception):
    """Modules cannot be replayed as a stack; the message gives the reason."""


class Stack:
    """Modules that a model calls one after another, each once, on the result of the one before."""

    def __init__(self, name: str, names: list[str], modules: list[nn.Module]) -> None:
        self.name = name
        self.names = names
        self.modules = modules
        self.all_blocks = len(modules)  # with those after the last one that is pruned
        self.slot: int | str = 0  # the hidden state's position or keyword in a block's arguments
        self.hidden_bytes = 0  # size of a block's hidden state, for the first batch
        self.other_bytes = 0  # size of all other arguments of the blocks, for the first batch
        # What each block returns: None for a tensor, or the name of a sequence's type and its
        # length. Empty if the blocks have to compute for all of them to be called as they are.
        self._forms: list[tuple[str, int] | None] = []

    def known(self) -> list[Any]:
        """What verifying it has shown, as plain JSON values."""
        return [self.slot, self.hidden_bytes, self.other_bytes, self._forms]

    def learn(self, slot: int | str, hidden: int, other: int, forms: Iterable[Any]) -> None:
        """Take over what :meth:`known` returned."""
        self.slot, self.hidden_bytes, self.other_bytes = slot, hidden, other
        self._forms = [None if form is None else (form[0], form[1]) for form in forms]

    def __contains__(self, layer: str) -> bool:
        return self.block_of(layer) is not None

    def block_of(self, layer: str) -> int | None:
        """The index of the block that contains a layer; None if none does."""
        for i, name in enumerate(self.names):
            if layer == name or layer.startswith(name + "."):
                return i
        return None

    def verify(self, sighting: _Sighting) -> None:
        """Check that the modules can be replayed as a stack, as they were called on the first
        batch. Raises NotAStackError."""
        seen, outputs = sighting.calls, sighting.outputs
        if [i for i, _, _ in seen] != list(range(len(self.modules))):
            raise NotAStackError("its modules are not called once each, in their order")
        if len(outputs) != len(seen):
            raise NotAStackError("one of its modules did not return")
        self.slot = self._slot(seen[1][1:], outputs[0])
        returned = {id(t) for output in outputs for t in _tensors(output)}
        for k, (i, args, kwargs) in enumerate(seen):
            call = BlockCall(args, kwargs, self.slot)
            try:
                hidden = call.hidden
            except (IndexError, KeyError):
                raise NotAStackError(f"{self.names[i]} is called in another way") from None
            if not isinstance(hidden, Tensor) or hidden.is_nested:
                raise NotAStackError(f"{self.names[i]} is not called on a plain tensor")
            if k > 0 and hidden is not hidden_of(outputs[k - 1]):
                raise NotAStackError(
                    f"{self.names[i]} is not called on the result of the block before it"
                )
            others = call.with_hidden(None)
            for value in (*others.args, *others.kwargs.values()):
                if not _plain(value):
                    raise NotAStackError(
                        f"{self.names[i]} is passed a {type(value).__name__}, which may change "
                        "from call to call"
                    )
                if any(id(t) in returned for t in _tensors(value)):
                    raise NotAStackError(f"{self.names[i]} also reads other results of the stack")
        call = BlockCall(*seen[0][1:], self.slot)
        hidden = call.hidden
        self.hidden_bytes = hidden.numel() * hidden.element_size()
        others_by_address: dict[int, int] = {}
        for _, args, kwargs in seen:
            call = BlockCall(args, kwargs, self.slot)
            for t in _tensors([call.with_hidden(None).args, kwargs]):
                others_by_address[t.data_ptr()] = t.numel() * t.element_size()
        others_by_address.pop(hidden.data_ptr(), None)
        self.other_bytes = sum(others_by_address.values())
        for k, (_, args, kwargs) in enumerate(seen):
            call = BlockCall(args, kwargs, self.slot)
            hidden = hidden_of(self.run_block(k, call, hidden))
            if not same(hidden, hidden_of(outputs[k])):
                raise NotAStackError(f"{self.names[k]} returns something else when run again")

    def verify_hollow(self, session: Session, sighting: _Sighting) -> None:
        """Find out whether all blocks are called in the same way if none of them computes anything:
        what they are called with is then known without running them."""
        calls = [BlockCall(args, kwargs, self.slot) for _, args, kwargs in sighting.calls]
        for call, output in zip(calls, sighting.outputs, strict=True):
            before, after = call.hidden, hidden_of(output)
            alike = (before.shape, before.dtype, before.device) == (
                after.shape,
                after.dtype,
                after.device,
            )
            if not alike or type(output) not in (torch.Tensor, tuple, list):
                return
        self._forms = [
            None if isinstance(output, Tensor) else (type(output).__name__, len(output))
            for output in sighting.outputs
        ]
        hollow = None
        for batch in session.each("look"):
            hollow = self.calls_without_computing(session, batch)
            break
        if hollow is None or not all(map(_equal_calls, hollow, calls)):
            self._forms = []

    @property
    def hollow(self) -> bool:
        """Whether it is known how the blocks are called without running them."""
        return bool(self._forms)

    def calls_without_computing(self, session: Session, batch: Any) -> list[BlockCall] | None:
        """How the model calls the blocks on a batch, found while each of them returns what it is
        passed; None if that is not known to work."""
        if not self.hollow:
            return None
        seen: list[BlockCall] = []
        last = len(self.modules) - 1

        def replaced(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = BlockCall(args, kwargs, self.slot)
                seen.append(call)
                if i == last:
                    raise Enough
                form = self._forms[i]
                if form is None:
                    return call.hidden
                returned = [call.hidden, *[None] * (form[1] - 1)]
                return tuple(returned) if form[0] == "tuple" else returned

            return forward

        with contextlib.ExitStack() as scope:
            for i, module in enumerate(self.modules):
                scope.enter_context(with_forward(module, replaced(i)))
            try:
                session.call(session.model, batch)
            except Enough:
                pass
            except Exception:  # the model may compute something from what a block returns
                return None
        return seen if len(seen) == len(self.modules) else None

    def _slot(self, second: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> int | str:
        args, kwargs = second
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if value is hidden_of(output):
                return place
        raise NotAStackError(f"{self.names[1]} is not called on the result of {self.names[0]}")

    def run_block(self, i: int, call: BlockCall, hidden: Tensor) -> Any:
        """Run block i on a copy of ``hidden``, which it may modify."""
        ready = call.with_hidden(hidden.clone())
        others = list(_tensors([call.with_hidden(None).args, call.with_hidden(None).kwargs]))
        versions = [version_of(t) for t in others]
        out = self.modules[i](*ready.args, **ready.kwargs)
        if [version_of(t) for t in others] != versions:
            raise NotAStackError(f"{self.names[i]} writes to its arguments")
        return out


def _equal_calls(a: BlockCall, b: BlockCall) -> bool:
    """Whether two calls have the same arguments, apart from the hidden state."""
    a, b = a.with_hidden(None), b.with_hidden(None)
    return _equal(a.args, b.args) and _equal([*a.kwargs.items()], [*b.kwargs.items()])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)


def same(a: Any, b: Any) -> bool:
    """Whether a replay's result ``a`` equals the model's ``b``, up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    x, y = a.double(), b.double()
    return float((x - y).norm()) <= _CLOSE * float(y.norm())
