"""Observing the inputs of weights that modules multiply by themselves (see ``layers/matrix.py``).

Every matrix product with an operand in the memory of a watched weight is reported, with the rows
that the weight is multiplied by. Any other use of that memory is an error, since the weight's
effect on the output is then unknown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lobs_native.errors import ArgumentError
from lobs_native.layers.matrix import Matrix

__all__ = ["Watch"]

_aten = torch.ops.aten
_PRODUCTS = {  # the position of the first of the two operands
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmv.default: 1,
}


class Watch(TorchDispatchMode):
    """While active, calls ``see(layer, group, X)`` with X (n, C) at every product with a weight of
    ``layers``."""

    supports_higher_order_operators = True

    def __init__(
        self, layers: Iterable[Matrix], see: Callable[[Matrix, int, Tensor], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        spans = [(*_span(layer.matrices()), layer, layer.matrices()) for layer in layers]
        self._spans = sorted(spans, key=lambda span: span[:2])
        self._ends = [end for _, end, _, _ in self._spans]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not getattr(func, "is_view", False):
            touched = [
                layer
                for x in tree_leaves((args, kwargs))
                if isinstance(x, Tensor)
                for layer, _, _ in self._touching(x)
            ]
            if touched and func in _PRODUCTS:
                first = _PRODUCTS[func]
                self._product(*args[first : first + 2])
            elif touched:
                result: Any = NotImplemented
                if isinstance(func, OpOverload):
                    with self:  # in inference mode, linear and matmul are not yet decomposed
                        result = func.decompose(*args, **kwargs)
                if result is NotImplemented:
                    raise _unobservable(touched[0], f"used by {func.name()}")
                return result
        return func(*args, **kwargs)

    def _touching(self, x: Tensor) -> Iterator[tuple[Matrix, Tensor, int]]:
        """The watched weights whose memory overlaps that of ``x``: (layer, its matrices, the
        address of ``x``)."""
        start, end = _span(x)
        i = bisect_right(self._ends, start)
        while start < end and i < len(self._spans) and self._spans[i][0] < end:
            _, _, layer, matrices = self._spans[i]
            yield layer, matrices, start
            i += 1

    def _product(self, left: Tensor, right: Tensor) -> None:
        if right.ndim == left.ndim - 1:  # a vector
            right = right[..., None]
        if left.ndim == 2:
            left, right = left[None], right[None]
        for a, b in zip(left, right, strict=True):
            self._uses(a, b)
            self._uses(b.T, a.T)

    def _uses(self, x: Tensor, weight: Tensor) -> None:
        """Report x (n, C) @ weight (C, r), whose r columns may be rows of several layers or
        groups."""
        for layer, matrices, start in self._touching(weight):
            step = max(1, matrices.stride(0) * matrices.element_size())
            first = max(0, (start - matrices.data_ptr()) // step)
            last = min(layer.groups - 1, (_span(weight)[1] - 1 - matrices.data_ptr()) // step)
            for g in range(first, last + 1):
                if not _contains(weight, matrices[g]):
                    raise _unobservable(layer, "used in parts, or in another orientation")
                self.see(layer, g, x)


def _contains(weight: Tensor, matrix: Tensor) -> bool:
    """Whether all rows of ``matrix`` (R, C) are columns of ``weight`` (C, r)."""
    (C, r), R = weight.shape, len(matrix)
    step = weight.stride(1) if r > 1 else matrix.stride(0)
    before, rest = divmod(
        (matrix.data_ptr() - weight.data_ptr()) // weight.element_size(), max(1, step)
    )
    return (
        matrix.shape[1] == C
        and (C == 1 or weight.stride(0) == matrix.stride(1))
        and (R == 1 or r == 1 or step == matrix.stride(0))
        and rest == 0
        and before >= 0
        and before + R <= r
    )


def _span(x: Tensor) -> tuple[int, int]:
    """The address range [first, last) of a tensor's bytes; (0, 0) if it has no memory."""
    try:
        start = x.data_ptr()
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    except (RuntimeError, NotImplementedError):
        return 0, 0
    return (start, start + (reach + 1) * x.element_size()) if x.numel() else (0, 0)


def _unobservable(layer: Matrix, use: str) -> ArgumentError:
    return ArgumentError(
        f"layer {layer.name!r}: its weight is {use}, so its inputs cannot be observed; exclude it, "
        "or turn off autocast and compilation, which copy weights"
    )
