"""Which entries along the axes of parameters belong together: seen by running a model once.

Every index of every axis of every parameter and buffer is a variable. An operation ties variables
(an addition ties the channels of what it adds, a batch normalisation those of its statistics to
those of its input), hands them on (pooling, flattening, concatenation), or contracts them (the
input channels of a convolution). What an operation does that is not known here pins the variables
of all that it reads: they have to stay. Tied variables are a class; when every tensor loses the
entries of a class, and no contraction reads it, all other entries of all tensors stay as they were.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from lobs_native.calibration.classes import Classes, Label
from lobs_native.calibration.mode import Mode
from lobs_native.calibration.storages import tensors_in

__all__ = ["Ties"]

_SAME = {"clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous"}
_RESHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"}
_BATCH_NORM = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
_BATCH_NORM |= {"_native_batch_norm_legit", "miopen_batch_norm"}
# Entry by entry, though torch does not say so.
_POINTWISE = {"hardswish", "hardswish_", "_prelu_kernel", "dropout", "log_sigmoid_forward"}
_REDUCING = {"mean", "sum", "amax", "amin"}
_NUMBERS = itertools.count()  # one for each look at a model
_SPATIAL = re.compile(r"_?(?:adaptive_)?(?:max_pool|avg_pool|upsample_\w+?|reflection_pad)(\d)d")


@dataclass(frozen=True)
class _Call:
    """An operation that has been made: its arguments, the labels and sizes of the tensors that it
    read (as they were), and what it returned."""

    args: Any
    kwargs: Any
    labels: Sequence[Label | None]
    sizes: Sequence[Sequence[int]]
    out: Any

    @property
    def first(self) -> Label:
        """The label of the first tensor; without variables if it has none."""
        return self.labels[0] or Label({})

    def dim(self, at: int, default: Any = None) -> Any:
        """The argument that names a dimension, or several."""
        return self.args[at] if len(self.args) > at else self.kwargs.get("dim", default)


class Ties(Mode):
    """While active, follows the operations of ``model``.

    Attributes
    ----------
    contracted, produced : set of (parameter name, axis)
        The axes of weights that are summed over, and those that become axes of activations.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.contracted: set[tuple[str, int]] = set()
        self.produced: set[tuple[str, int]] = set()
        self.classes = Classes()
        # An attribute of activations, some of which a model may keep for its next calls.
        self._mark = f"_lobs_native_label_{next(_NUMBERS)}"
        self._labels: dict[int, tuple[Tensor, Label]] = {}  # of parameters and buffers in use
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(x): name for name, x in tensors}

    # ---- what was found --------------------------------------------------------------------------

    def axes(self) -> dict[tuple[str, int], list[int]]:
        """(name of a parameter or buffer, axis) -> the class of each index along it."""
        return {
            (self._names[key], axis): [self.classes.root(v) for v in variables]
            for key, (_, label) in self._labels.items()
            for axis, variables in label.axes.items()
        }

    def returned(self, output: Any) -> None:
        """Take note of what the model returns."""
        self.classes.pin(map(self._label, tensors_in(output)), "the model returns them")

    # ---- variables -------------------------------------------------------------------------------

    def _label(self, x: Tensor) -> Label | None:
        label: Label | None = getattr(x, self._mark, None)
        if label is not None or id(x) not in self._names:
            return label
        if id(x) not in self._labels:
            axes = {d: self.classes.new(n) for d, n in enumerate(x.shape)}
            sources = {d: (self._names[id(x)], d) for d in axes}
            self._labels[id(x)] = (x, Label(axes, sources))
        return self._labels[id(x)][1]

    # ---- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = tensors_in((args, kwargs))
        labels = [self._label(x) for x in read]
        if not any(labels):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1] if isinstance(func, OpOverload) else str(func)
        rule = self._rule(func, name)
        if rule is None:
            made = self.decomposed(func, args, kwargs)
            if made is not NotImplemented:
                return made
        sizes = [x.shape for x in read]  # before an operation in place
        out = func(*args, **kwargs)
        found = None if rule is None else rule(_Call(args, kwargs, labels, sizes, out))
        if found is None:
            self.classes.pin(labels, f"aten::{name} reads them")
            found = Label({})
        each = found if isinstance(found, list) else [found]
        for x, label in zip(tensors_in(out), each, strict=False):
            if id(x) not in self._names:
                setattr(x, self._mark, label)
        return out

    def _rule(self, func: Any, name: str) -> Any:
        """What is known of an operation: a function of a call that returns the label of the first
        tensor that came out, a list of labels, or None where it does not know after all."""
        if name in _SAME:
            return lambda call: call.labels[0]
        if name in _RESHAPING:
            return self._reshaped
        if name in _BATCH_NORM:
            return self._normed
        if name in _REDUCING:
            return self._reduced
        if match := _SPATIAL.match(name):
            count = int(match[1])
            return lambda call: self._spatial(call.labels[0], call.sizes[0], count)
        known = getattr(self, f"_op_{name}", None)
        pointwise = name in _POINTWISE or torch.Tag.pointwise in getattr(func, "tags", ())
        if known is None and pointwise:
            return self._pointwise
        return known

    def _pointwise(self, call: _Call) -> Any:
        """Entry by entry, with broadcasting; the same for all that comes out."""
        every = list(tensors_in(call.out))
        if not every or len({x.shape for x in every}) > 1:
            return None
        shape, axes = every[0].shape, {}
        for d in range(len(shape)):
            parts: list[list[int] | None] = []  # of the tensors that have this axis
            for label, size in zip(call.labels, call.sizes, strict=True):
                at = d - len(shape) + len(size)
                variables = None if label is None or at < 0 else label.axes.get(at)
                if at >= 0 and size[at] == shape[d]:
                    parts.append(variables)
                elif variables is not None:
                    self.classes.pin([Label({0: variables})], "they are broadcast")
            if known := [p for p in parts if p is not None]:
                for other in known[1:]:
                    self.classes.tie(known[0], other)
                if len(known) < len(parts) and shape[d] > 1:
                    self.classes.pin(
                        [Label({0: known[0]})], "they are combined with a tensor of fixed size"
                    )
                else:
                    axes[d] = known[0]
        return [Label(dict(axes)) for _ in every]

    def _op_copy_(self, call: _Call) -> Any:
        return self._pointwise(call) if all(call.labels) else None

    def _reshaped(self, call: _Call) -> Any:
        """An axis that stays whole, alone or merged with its neighbours."""
        old, new, label = call.sizes[0], call.out.shape, call.first
        axes: dict[int, list[int]] = {}
        sources, taken = {}, dict[int, int]()
        for d, variables in label.axes.items():
            before, after, n = math.prod(old[:d]), math.prod(old[d + 1 :]), old[d]
            for e, size in enumerate(new):
                leading, trailing = math.prod(new[:e]), math.prod(new[e + 1 :])
                if n < 2 or before % leading or after % trailing:
                    continue
                outer, inner = before // leading, after // trailing
                if outer * n * inner == size:
                    break
            else:
                self.classes.pin([label], "an axis is divided", [d])
                continue
            if e in taken:  # two axes become one
                self.classes.pin([label], "two axes become one", [d, taken[e]])
                axes.pop(e, None)
                continue
            taken[e] = d
            axes[e] = [v for _ in range(outer) for v in variables for _ in range(inner)]
            if size == n and d in label.sources:
                sources[e] = label.sources[d]
        return Label(axes, sources)

    def _permuted(self, label: Label, order: Sequence[int]) -> Label:
        return label.moved({d % len(order): new for new, d in enumerate(order)})

    def _op_t(self, call: _Call) -> Any:
        return self._permuted(call.first, range(len(call.sizes[0]))[::-1])

    def _op_permute(self, call: _Call) -> Any:
        return self._permuted(call.first, [d % len(call.sizes[0]) for d in call.args[1]])

    def _op_transpose(self, call: _Call) -> Any:
        order = list(range(len(call.sizes[0])))
        a, b = call.args[1], call.args[2]
        order[a], order[b] = order[b], order[a]
        return self._permuted(call.first, order)

    def _op_expand(self, call: _Call) -> Any:
        shift = call.out.ndim - len(call.sizes[0])
        same = {d: d + shift for d, n in enumerate(call.sizes[0]) if n == call.out.shape[d + shift]}
        self.classes.pin(
            call.labels, "they are broadcast", set(range(len(call.sizes[0]))) - set(same)
        )
        return call.first.moved(same)

    def _op_slice(self, call: _Call) -> Any:
        size = call.sizes[0]
        cut = [d for d in range(len(size)) if call.out.shape[d] != size[d]]
        self.classes.pin(call.labels, "they are divided at fixed places", cut)
        return call.first.moved({d: d for d in range(len(size)) if d not in cut})

    def _op_select(self, call: _Call) -> Any:
        dim = call.args[1] % len(call.sizes[0])
        self.classes.pin(call.labels, "one of them is picked", [dim])
        return call.first.moved({d: d - (d > dim) for d in range(len(call.sizes[0])) if d != dim})

    def _op_split(self, call: _Call) -> Any:
        dim = call.dim(2, 0) % len(call.sizes[0])
        self.classes.pin(call.labels, "they are divided at fixed places", [dim])
        rest = {d: d for d in range(len(call.sizes[0])) if d != dim}
        return [call.first.moved(rest) for _ in call.out]

    _op_split_with_sizes = _op_split

    def _op_cat(self, call: _Call) -> Any:
        dim = call.dim(1, 0) % call.out.ndim
        axes: dict[int, list[int]] = {}
        for d in range(call.out.ndim):
            parts = [None if label is None else label.axes.get(d) for label in call.labels]
            known = [p for p in parts if p is not None]
            if len(known) < len(parts):
                self.classes.pin(
                    [Label({0: p}) for p in known], "they stand beside a tensor of fixed size"
                )
            elif d == dim:
                axes[d] = [v for p in known for v in p]
            else:
                for other in known[1:]:
                    self.classes.tie(known[0], other)
                axes[d] = known[0]
        return Label(axes)

    def _reduced(self, call: _Call) -> Any:
        """Means and sums along some axes."""
        dims = call.dim(1)
        if not dims:
            return None
        n = len(call.sizes[0])
        gone = {d % n for d in ([dims] if isinstance(dims, int) else dims)}
        self.classes.pin(call.labels, "they are summed", gone)
        stay = [d for d in range(n) if d not in gone]
        return call.first.moved({d: d if call.out.ndim == n else i for i, d in enumerate(stay)})

    def _spatial(self, label: Label | None, size: Sequence[int], count: int) -> Label | None:
        """Pooling and the like along the last ``count`` axes."""
        assert label is not None
        rest = range(len(size) - count)
        self.classes.pin([label], "they are pooled", set(label.axes) - set(rest))
        return label.moved({d: d for d in rest})

    def _op_constant_pad_nd(self, call: _Call) -> Any:
        return self._spatial(call.labels[0], call.sizes[0], len(call.args[1]) // 2)

    def _op__softmax(self, call: _Call) -> Any:
        dim = call.args[1] % call.out.ndim
        self.classes.pin(call.labels, "a softmax goes over them", [dim])
        return call.first.moved({d: d for d in call.first.axes if d != dim})

    def _normed(self, call: _Call) -> Any:
        """Batch normalisation in eval mode."""
        channels = [_at(label, 0 if i else 1) for i, label in enumerate(call.labels)]
        known = [c for c in channels if c is not None]
        if len(known) < len(channels):
            return None
        for other in known[1:]:
            self.classes.tie(known[0], other)
        return call.first.moved({d: d for d in call.first.axes})

    # ---- products --------------------------------------------------------------------------------

    def _contracts(self, x: Label | None, axis: int, weight: Label | None, of_weight: int) -> None:
        """Sum over an axis of activations and one of a parameter."""
        variables, columns = _at(x, axis), _at(weight, of_weight)
        source = None if weight is None else weight.sources.get(of_weight)
        of_x = None if x is None else x.sources.get(axis)
        if variables is None or columns is None or source is None or of_x is not None:
            why = "they are multiplied with what is not a parameter, or has a fixed size"
            self.classes.pin([x], why, [axis])
            self.classes.pin([weight], why, [of_weight])
        else:
            self.classes.tie(variables, columns)
            self.contracted.add(source)

    def _op_convolution(self, call: _Call) -> Any:
        x, weight, bias = (None if a is None else self._label(a) for a in call.args[:3])
        transposed, groups = call.args[6], call.args[8]
        made = 1 if transposed else 0
        if weight is None or not {0, 1} <= weight.sources.keys():
            return None  # a weight that is computed
        rows, channels = weight.axes[made], _at(x, 1)
        if groups == 1:
            self._contracts(x, 1, weight, 1 - made)
            self.produced.add(weight.sources[made])
        elif (
            groups == call.args[0].shape[1] == call.args[1].shape[0] == call.out.shape[1]
            and channels
            and not transposed
        ):
            self.classes.tie(channels, rows)  # a filter of its own for each channel
        else:
            self.classes.pin([x, weight, bias], "a convolution with groups reads or makes them")
        if (of_bias := _at(bias, 0)) is not None:
            self.classes.tie(rows, of_bias)
        elif call.args[2] is not None:
            self.classes.pin([weight], "a tensor of fixed size is added", [made])
        return Label({1: rows} if len(rows) == call.out.shape[1] else {})

    def _product(self, a: Label | None, b: Label | None) -> dict[int, list[int]]:
        """(n, C) @ (C, m): at most one of them a parameter."""
        left = a is not None and 1 in a.sources
        first, second = (b, a) if left else (a, b)
        self._contracts(first, 0 if left else 1, second, 1 if left else 0)
        axes = {d: v for d, v in ((0, _at(a, 0)), (1, _at(b, 1))) if v is not None}
        for label, d in ((a, 0), (b, 1)):
            if label is not None and d in label.sources:
                self.produced.add(label.sources[d])
        return axes

    def _op_mm(self, call: _Call) -> Any:
        return Label(self._product(*call.labels))

    def _op_addmm(self, call: _Call) -> Any:
        product = Label(self._product(*call.labels[1:]))
        return self._pointwise(
            dataclasses.replace(
                call, labels=[call.labels[0], product], sizes=[call.sizes[0], call.out.shape]
            )
        )


def _at(label: Label | None, axis: int) -> list[int] | None:
    return None if label is None else label.axes.get(axis)
