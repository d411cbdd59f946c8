"""Parts of a block that repeat their outputs.

A block is run once for every tensor that its layers read, and once more at the end. Once all layers
of a part, such as its attention or one layer of its MLP, have been pruned, the part returns the
same in all passes that are left: everything that it depends on comes before it and is finished too.
An output is read from disk in a third of the time that computing it takes, or less. Where there is
no room for it, it is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lobs_native.files.shelf import Shelf

__all__ = ["Finished", "with_forward"]

_Form = tuple[bool, list[bool]]  # of an output: whether it is a tuple, and which parts are tensors


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
    """The outputs of the finished parts of the current block, by batch: ``limit`` bytes of them in
    memory, the rest on disk."""

    def __init__(self, limit: int | None = None) -> None:
        self._outputs: dict[nn.Module, dict[int, _Form]] = {}  # by batch
        self._kept = Shelf(limit)  # (part, batch, number of the tensor) -> the tensor

    def add(self, part: nn.Module) -> None:
        """Repeat, from the second call from now on, what this part returns. It must be called once
        in a call of the block."""
        self._outputs.setdefault(part, {})

    def clear(self) -> None:
        """Forget all parts."""
        self._outputs.clear()
        self._kept.close()

    @contextlib.contextmanager
    def repeating(self, number: int, most: int, *, last: bool) -> Iterator[None]:
        """The context in which the block is run on a batch. Outputs of more than ``most`` bytes are
        not kept; nor is anything in the ``last`` pass."""
        with contextlib.ExitStack() as scope:
            for part, outputs in self._outputs.items():
                if number in outputs:
                    scope.enter_context(with_forward(part, self._returning(part, number)))
                elif not last:
                    keeping = self._keeping(part, part.forward, number, most)
                    scope.enter_context(with_forward(part, keeping))
            yield
            if last:
                for part, outputs in self._outputs.items():
                    _, tensors = outputs.pop(number, (False, []))
                    for i in range(len(tensors)):
                        self._kept.drop((part, number, i))

    def _returning(self, part: nn.Module, number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            several, tensors = self._outputs[part][number]
            parts = tuple(  # whoever gets them may write to them
                self._kept.copy_of((part, number, i)) if is_tensor else None
                for i, is_tensor in enumerate(tensors)
            )
            return parts if several else parts[0]

        return forward

    def _keeping(
        self, part: nn.Module, forward: Callable[..., Any], number: int, most: int
    ) -> Callable[..., Any]:
        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            several = type(output) is tuple
            parts = output if several else (output,)
            if all(x is None or type(x) is Tensor for x in parts):
                tensors = {i: x for i, x in enumerate(parts) if x is not None}
                if sum(x.numel() * x.element_size() for x in tensors.values()) <= most:
                    with contextlib.suppress(OSError):  # the disk is full
                        for i, x in tensors.items():
                            self._kept.put_copy((part, number, i), x)
                        form = several, [i in tensors for i in range(len(parts))]
                        self._outputs[part][number] = form
            return output

        return keeping
