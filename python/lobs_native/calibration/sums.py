"""Observing what is added to a module's output: the other operand of a residual connection.

Sums are recognised by the operands of operations, not by names. An output counts only if its single
use is a sum of two tensors of its own shape: the layer can then compensate a change of the other
operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.mode import Mode
from lobs_native.calibration.storages import address, tensors_in

__all__ = ["Sums"]

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class Sums(Mode):
    """While active, collects in ``addends[name]`` a copy of what is added to the output of
    ``modules[name]`` at each call. ``elsewhere`` has the names whose outputs are used otherwise.

    ``then(name)`` is called after each sum.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], then: Callable[[str], None] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = modules
        self.then = then
        self.calls = dict.fromkeys(modules, 0)
        self.addends: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.elsewhere: set[str] = set()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # by the address of their memory
        self._handles: list[Any] = []

    def __enter__(self) -> Sums:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        if self.modules:  # without any, each operation would pass through Python for nothing
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *what: Any) -> None:
        if self.modules:
            super().__exit__(*what)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.calls[name] += 1
            if isinstance(output, Tensor) and not output.is_nested and address(output):
                # The reference keeps the address from being used again.
                self._outputs[address(output)] = (name, output)
            else:
                self.elsewhere.add(name)

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._outputs or getattr(func, "is_view", False):
            return func(*args, **kwargs)
        summed = None
        if func in _ADDS and kwargs.get("alpha", 1) == 1:
            summed = self._sum(*args[:2])
        if summed is None:
            for x in tensors_in((args, kwargs)):
                if used := self._outputs.get(address(x)):
                    self.elsewhere.add(used[0])
        result = func(*args, **kwargs)
        if summed is not None and self.then is not None:
            self.then(summed)
        return result

    def _sum(self, a: Any, b: Any) -> str | None:
        """The name of the module whose output is added to something else; None if there is none."""
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or address(a) == address(b):
            return None
        if a.is_nested or b.is_nested:
            return None
        for y, other in ((a, b), (b, a)):
            if (known := self._outputs.get(address(y))) is None:
                continue
            name, output = known
            if len(self.addends[name]) == self.calls[name]:
                continue  # a second use of the same output
            alike = y.shape == output.shape == other.shape and y.dtype == other.dtype
            if alike and y.stride() == output.stride() and address(other) not in self._outputs:
                self.addends[name].append(other.detach().clone())
                return name
        return None
