"""Stacks of blocks, which can be calibrated one block at a time on stored inputs.

Calibrating a layer on the outputs of the layers pruned before it takes a run of the whole model for
every layer. But most models have a stack of blocks, each of which is called on the result of the
one before. One block can then be run alone on its stored inputs: once for every tensor that its
layers read, and once more, pruned, to compute the inputs of the next block. Stacks are recognised
by the tensors that modules pass on, not by names, and a replay is checked against the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.calls import BlockCall
from lobs_native.calibration.flow import version_of
from lobs_native.calibration.hooks import attached
from lobs_native.calibration.session import Session

__all__ = ["NotAStackError", "Stack", "find_stacks", "hidden_of", "run_first", "same"]

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


def find_stacks(session: Session, layers: Mapping[str, nn.Module]) -> tuple[list[Stack], list[str]]:
    """Find the stacks of blocks that contain some of ``layers`` (name -> module).

    Returns
    -------
    stacks : list of Stack
        In the order of their calls. None is inside another.
    reasons : list of str
        For each container that looked like a stack but is not one, a line that tells why.
    """
    candidates: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in session.model.named_modules():
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
    stacks: list[tuple[int, Stack]] = []
    reasons = []
    for name, children in candidates.items():
        stack = Stack(name, [path for path, _ in children], [child for _, child in children])
        try:
            stacks.append((stack.verify(session), stack))
        except NotAStackError as reason:
            reasons.append(f"{name}: {reason}")
    return [stack for _, stack in sorted(stacks, key=lambda pair: pair[0])], reasons


class NotAStackError(Exception):
    """Modules cannot be replayed as a stack; the message gives the reason."""


class Stack:
    """Modules that a model calls one after another, each once, on the result of the one before."""

    def __init__(self, name: str, names: list[str], modules: list[nn.Module]) -> None:
        self.name = name
        self.names = names
        self.modules = modules
        self.slot: int | str = 0  # the hidden state's position or keyword in a block's arguments
        self.hidden_bytes = 0  # size of a block's hidden state, for the first batch
        self.other_bytes = 0  # size of all other arguments of the blocks, for the first batch

    def __contains__(self, layer: str) -> bool:
        return self.block_of(layer) is not None

    def block_of(self, layer: str) -> int | None:
        """The index of the block that contains a layer; None if none does."""
        for i, name in enumerate(self.names):
            if layer == name or layer.startswith(name + "."):
                return i
        return None

    def verify(self, session: Session) -> int:
        """Run the first batch to check that the modules can be replayed as a stack.

        Returns the number of module calls before the stack's first one. Raises NotAStackError.
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

        handles = [m.register_forward_pre_hook(count) for m in session.model.modules()]
        for i, module in enumerate(self.modules):
            handles.append(module.register_forward_pre_hook(see(i), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with attached(handles):
            run_first(session)
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
        return before

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


def same(a: Any, b: Any) -> bool:
    """Whether a replay's result ``a`` equals the model's ``b``, up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    x, y = a.double(), b.double()
    return float((x - y).norm()) <= _CLOSE * float(y.norm())
