"""Observing the inputs of weights that modules multiply by themselves (see ``layers/matrix.py``).

Every product or convolution with an operand in the memory of a watched weight is reported, with the
rows that the weight is multiplied by. Any other use of that memory is an error, since the weight's
effect on the output is then unknown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lobs_native.calibration.copies import COPYING, JOINING, VIEWING, Copies, joined
from lobs_native.calibration.mixtures import Mixtures
from lobs_native.calibration.mode import Mode
from lobs_native.calibration.storages import tensors_in
from lobs_native.errors import ArgumentError
from lobs_native.layers import Layer, Matrix
from lobs_native.layers.block import Block
from lobs_native.layers.conv import ConvCall
from lobs_native.layers.own import MixedConv, OwnConv, Product

__all__ = [
    "CONVOLUTION",
    "PRODUCTS",
    "Columns",
    "Fail",
    "See",
    "Touch",
    "Watch",
    "span",
    "unobservable",
]

Columns = Callable[[Tensor], Iterable[tuple[int, Tensor]]]
See = Callable[[Layer, Tensor, Columns], Any]

_aten = torch.ops.aten
PRODUCTS = {  # the position of the first of the two operands
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmv.default: 1,
}
CONVOLUTION = _aten.convolution.default
Fail = Callable[[Layer, str], None]


class Watch(Mode):
    """While active, calls ``see(layer, inputs, columns)`` at every product with a weight of
    ``layers``; see :func:`lobs_native.calibration.hooks.hooked`.

    ``fail(layer, use)`` is called where a use is none of these; without it that is an
    ArgumentError.
    """

    def __init__(self, layers: Iterable[Layer], see: See, fail: Fail | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        self.fail = fail or _refuse
        spans = [(*span(w), layer, w) for layer in layers for w in [_operand(layer)]]
        self._spans = sorted(spans, key=lambda entry: entry[:2])
        self._ends = [end for _, end, _, _ in self._spans]
        self._copies = Copies[Product]()
        self._mixtures = Mixtures[MixedConv]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        # Nested tensors have no strides to recognise.
        viewing = getattr(func, "is_view", False) or func in VIEWING
        if not (viewing or any(x.is_nested for x in tensors)):
            touched = [layer for x in tensors for layer, _, _ in self._touching(x)]
            copies = [owner for x in tensors for owner in self._copies.owners(x)]
            filters = [m.owner for x in tensors if (m := self._mixtures.of(x)) is not None]
            mixed = [layer for layer in touched if isinstance(layer, MixedConv)]
            if mixed and func in PRODUCTS:
                return self._mixing(mixed[0], func, args, kwargs)
            if (touched or copies) and func in PRODUCTS:
                at = PRODUCTS[func]
                self._product(*args[at : at + 2])
            elif func is CONVOLUTION and (touched or filters):
                self._convolution(*args)
            elif touched or copies or filters:
                result = self.decomposed(func, args, kwargs)
                if result is not NotImplemented:
                    return result
                if not copies and (func in COPYING or func in JOINING):
                    result = func(*args, **kwargs)
                    if self._copied(func, tensors, args, kwargs, result):
                        return result
                for layer in dict.fromkeys([*touched, *copies, *filters]):
                    self.fail(layer, f"used by {func.name()}")
        return func(*args, **kwargs)

    def _mixing(self, layer: MixedConv, func: Any, args: Any, kwargs: Any) -> Any:
        """A product with filters that routing weights mix."""
        result = func(*args, **kwargs)
        if not self._mixtures.note(layer, _operand(layer), func, args, result):
            self.fail(layer, "used in a product of another form")
        return result

    def _copied(
        self, func: Any, sources: list[Tensor], args: Any, kwargs: Any, result: Any
    ) -> bool:
        """Remember what an operation has copied; whether that is possible."""
        owners: list[tuple[Product, Tensor] | None] = []
        for x in sources:
            touching = [layer for layer, _, _ in self._touching(x)]
            own = [layer for layer in touching if isinstance(layer, Product)]
            if len(own) < len(touching) or len(own) > 1:
                return False
            owners.append((own[0], _operand(own[0])) if own else None)
        if func in COPYING:
            (owned,) = owners
            return owned is not None and self._copies.note(*owned, sources[0], result)
        return self._copies.note_joined(sources, owners, result, *joined(func, args, kwargs))

    def _touching(self, x: Tensor) -> Iterator[tuple[Layer, Tensor, int]]:
        """The watched weights whose memory overlaps that of ``x``: (layer, its operand, the address
        of ``x``)."""
        start, end = span(x)
        i = bisect_right(self._ends, start)
        while start < end and i < len(self._spans) and self._spans[i][0] < end:
            _, _, layer, operand = self._spans[i]
            yield layer, operand, start
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
        if copies := self._copies.owners(weight):
            pieces = self._copies.pieces(weight)
            for owner in copies if pieces is None else ():
                self._use_of_block(owner, x, None)
            for piece in pieces or ():
                self._use_of_block(piece.owner, x[:, piece.columns], piece.block(weight))
            return
        for layer, matrices, start in self._touching(weight):
            if isinstance(layer, Product):
                offset = (start - matrices.data_ptr()) // matrices.element_size()
                self._use_of_block(layer, x, Block.of(weight, offset))
                continue
            if not isinstance(layer, Matrix):
                self.fail(layer, "used in a product, not in a convolution")
                continue
            step = max(1, matrices.stride(0) * matrices.element_size())
            first = max(0, (start - matrices.data_ptr()) // step)
            last = min(layer.groups - 1, (span(weight)[1] - 1 - matrices.data_ptr()) // step)
            for g in range(first, last + 1):
                if not _contains(weight, matrices[g]):
                    self.fail(layer, "used in parts, or in another orientation")
                else:
                    self.see(layer, x, _of_group(g))

    def _use_of_block(self, layer: Product, x: Tensor, block: Block | None) -> None:
        """Report x (n, C) @ a block of a weight (C, R)."""
        group = None if block is None else layer.group_of(block)
        if group is None:
            self.fail(layer, "used in parts, or in another orientation")
        else:
            self.see(layer, x, _of_group(group))

    def _convolution(self, x: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> None:
        if mixture := self._mixtures.of(weight):
            mixed, routing = mixture.owner, mixture.routing
            if mixture.call(x, weight, arguments) == mixed.of_sample:
                self.see(mixed, x, lambda x: mixed.columns(x, routing))
            else:
                self.fail(mixed, "used in a convolution of another form")
        for layer, _, _ in [
            *self._touching(x),
            *(self._touching(bias) if bias is not None else ()),
        ]:
            self.fail(layer, "used by aten::convolution, not as its weight")
        for layer, stored, _ in self._touching(weight):
            if (
                isinstance(layer, OwnConv)
                and span(weight) == span(stored)
                and layer.call == ConvCall.of(weight, arguments)
            ):
                self.see(layer, x, layer.columns)
            else:
                self.fail(layer, "used in a convolution of another form")


class Touch(Mode):
    """While active, notes in ``touched`` whether an operation reads or writes the memory of any of
    ``tensors``. It looks at no more than addresses, so that a model runs at its ordinary speed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.touched = False
        spans = sorted(span(x) for x in tensors)
        self._starts = [start for start, _ in spans]
        self._ends = list(accumulate((end for _, end in spans), max))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.touched and not getattr(func, "is_view", False):
            for x in (*args, *kwargs.values()):
                parts = x if isinstance(x, (tuple, list)) else (x,)
                if any(isinstance(part, Tensor) and self._touches(part) for part in parts):
                    self.touched = True
        return func(*args, **kwargs)

    def _touches(self, x: Tensor) -> bool:
        start, end = span(x)
        before = bisect_left(self._starts, end)  # of those that begin before x ends, the last end
        return before > 0 and self._ends[before - 1] > start


def _of_group(g: int) -> Columns:
    return lambda x: [(g, x)]


def _operand(layer: Layer) -> Tensor:
    """The weight as it lies in memory; as matrices, if it is known which."""
    if isinstance(layer, Matrix) and not isinstance(layer, Product):
        return layer.matrices()
    return layer.stored(layer.weight_part)


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


def span(x: Tensor) -> tuple[int, int]:
    """The address range [first, last) of a tensor's bytes; (0, 0) if it has no memory."""
    try:
        start = x.data_ptr()
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    except (RuntimeError, NotImplementedError):
        return 0, 0
    return (start, start + (reach + 1) * x.element_size()) if x.numel() and start else (0, 0)


def unobservable(layer: Layer, use: str) -> ArgumentError:
    """The error for a weight that is used in another way than in products."""
    return ArgumentError(
        f"layer {layer.name!r}: its weight is {use}, so its inputs cannot be observed; exclude it, "
        "or turn off autocast and compilation, which copy weights"
    )


def _refuse(layer: Layer, use: str) -> None:
    raise unobservable(layer, use)
