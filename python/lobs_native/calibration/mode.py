"""A dispatch mode that does not load torch's compiler."""

from __future__ import annotations

import sys
from typing import Any

from torch._compile import _disable_dynamo
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Mode"]


class Mode(TorchDispatchMode):
    """Base of the modes that observe a model's operations.

    Torch 2.13 keeps its compiler out of every mode's ``__torch_dispatch__``, and imports it for
    that, which takes as long as importing torch. Here that is done only where it has been imported.
    """

    supports_higher_order_operators = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        raw = cls.__torch_dispatch__
        disabled = _disable_dynamo(raw, recursive=True)

        def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            run = disabled if "torch._dynamo" in sys.modules else raw
            return run(self, func, types, args, kwargs)

        cls.__torch_dispatch__ = dispatch  # type: ignore[method-assign]

    def decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation as those that it consists of, which this mode observes in turn, and
        return its result; NotImplemented if it consists of no others. In inference mode, linear and
        matmul are not yet decomposed."""
        if not isinstance(func, OpOverload):
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What torch asks before it wraps ``__torch_dispatch__``."""
        return False
