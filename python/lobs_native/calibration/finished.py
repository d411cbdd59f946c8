"""Parts of a block that repeat their outputs.

A block is run once for every tensor that its layers read, and once more at the end. Once all layers
of a part, such as its attention, have been pruned, the part returns the same in all passes that are
left: everything that it depends on comes before it and is finished too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Finished", "with_forward"]


@contextlib.contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while."""
    attributes = vars(module)
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


class Finished:
    """The outputs of the finished parts of the current block, by batch."""

    def __init__(self) -> None:
        self._outputs: dict[nn.Module, dict[int, Any]] = {}

    def add(self, part: nn.Module) -> None:
        """Repeat, from the second call from now on, what this part returns. It must be called once
        in a call of the block."""
        self._outputs.setdefault(part, {})

    def clear(self) -> None:
        """Forget all parts."""
        self._outputs.clear()

    @contextlib.contextmanager
    def repeating(self, number: int, most: int, *, last: bool) -> Iterator[None]:
        """The context in which the block is run on a batch. Outputs of more than ``most`` bytes are
        not kept; nor is anything in the ``last`` pass."""
        with contextlib.ExitStack() as scope:
            for part, outputs in self._outputs.items():
                if number in outputs:
                    kept = outputs.pop(number) if last else outputs[number]
                    scope.enter_context(with_forward(part, _returning(kept)))
                elif not last:
                    keeping = _keeping(part.forward, outputs, number, most)
                    scope.enter_context(with_forward(part, keeping))
            yield


def _returning(kept: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _copy(kept)  # whoever gets it may write to it

    return forward


def _keeping(
    forward: Callable[..., Any], outputs: dict[int, Any], number: int, most: int
) -> Callable[..., Any]:
    def keeping(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        parts = output if type(output) is tuple else (output,)
        if all(part is None or type(part) is Tensor for part in parts):
            tensors = [part for part in parts if part is not None]
            if sum(x.numel() * x.element_size() for x in tensors) <= most:
                outputs[number] = _copy(output)
        return output

    return keeping


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_copy, output))
    return None if output is None else output.detach().clone()
