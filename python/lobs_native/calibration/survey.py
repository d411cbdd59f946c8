"""What a forward pass does with each parameter: which operations read it, and whether it is the
plain operand of products or convolutions.

Parameters are recognised by their memory, so that it does not matter which function or module uses
them. Tensors that are computed from parameters and buffers alone are followed as well: a weight
that is scaled, standardised or masked before it is multiplied is not a plain operand.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lobs_native.calibration.copies import COPYING, JOINING, VIEWING, Copies, joined
from lobs_native.calibration.hooks import attached
from lobs_native.calibration.mixtures import Mixtures, Outputs
from lobs_native.calibration.mode import Mode
from lobs_native.calibration.storages import Storages, tensors_in
from lobs_native.calibration.watch import CONVOLUTION, PRODUCTS, span
from lobs_native.layers.block import Block
from lobs_native.layers.conv import ConvCall

__all__ = ["Survey", "Use"]

_LOOKUPS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select"}
_LOOKUPS |= {"gather", "take", "grid_sampler_2d", "_upsample_bicubic2d_aa", "upsample_bicubic2d"}
_ENTRYWISE = {"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "cat", "stack"}
_ENTRYWISE |= {"where", "copy_", "masked_fill", "index_put", "index_put_", "maximum", "minimum"}
_ENTRYWISE |= {"native_layer_norm", "native_group_norm", "native_batch_norm", "addcmul", "lerp"}
_ENTRYWISE |= {"cudnn_batch_norm", "_native_batch_norm_legit_no_training", "_fused_rms_norm", "pow"}
_ENTRYWISE |= {"scatter", "scatter_", "select_scatter", "slice_scatter", "_prelu_kernel", "atan2"}


@dataclass
class Use:
    """How one parameter was used. Operations go by their names without "aten::"."""

    blocks: dict[Block, int] = field(default_factory=dict)  # operands of products, with their rows
    calls: dict[ConvCall, None] = field(default_factory=dict)  # convolutions with it as a filter
    mixed: dict[ConvCall, int] = field(default_factory=dict)  # with filters mixed from it: samples
    biases: dict[str | None, None] = field(default_factory=dict)  # what is added in these; or None
    shifts: dict[Block, set[int]] = field(default_factory=dict)  # where in it, in entries
    added: int = 0  # how often it was added in a product or convolution as a bias
    changed: dict[str, None] = field(default_factory=dict)  # operations before it is multiplied
    mixed_otherwise: bool = False  # what is mixed from it is read by other operations
    mixed_bias: bool = False  # biases are mixed from it in the same way
    routes: bool = False  # its outputs are the weights with which filters are mixed
    parts: bool = False  # multiplied in pieces that are no blocks
    both: bool = False  # multiplied with another parameter, or made into a weight by inputs
    looked_up: dict[str, None] = field(default_factory=dict)
    entrywise: dict[str, None] = field(default_factory=dict)
    inputs: bool = False  # a learned input of layers
    others: dict[str, None] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)  # which of these fields hold uses outside owners
    callers: list[nn.Module] | None = None  # the modules whose calls include every use
    some: set[nn.Module] = field(default_factory=set)  # and those whose calls include some

    @property
    def used(self) -> bool:
        """Whether anything was done with it."""
        return self.callers is not None

    @property
    def plain(self) -> bool:
        """Whether it is nothing but an operand of products, or of convolutions."""
        return bool(self.blocks) != bool(self.calls) and not (
            self.changed or self.parts or self.both or self.looked_up or self.entrywise
            or self.inputs or self.others or self.added or self.mixed_bias
        )  # fmt: skip


class Survey(Mode):
    """While active, records the uses of all parameters of ``model``.

    ``owners`` has, for some parameters, the modules by whose calls they are meant to be used.
    """

    def __init__(
        self, model: nn.Module, owners: Mapping[nn.Parameter, Sequence[nn.Module]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.owners = owners
        self.uses: dict[nn.Parameter, Use] = {}
        self.seconds = 0.0  # of the operations alone, without looking at them
        self._names: dict[nn.Parameter, str] = {}
        self._stack: list[nn.Module] = [model]
        self._derived = Storages[dict[nn.Parameter, dict[str, None]]]()  # with the operations
        self._copies = Copies[nn.Parameter]()
        self._mixed = Storages[list[nn.Parameter]]()  # with activations
        self._mixtures = Mixtures[nn.Parameter]()
        self._outputs = Outputs[nn.Parameter]()
        spans: list[tuple[int, int, nn.Parameter | None]] = []
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                continue
            self._names[parameter] = name
            self.uses[parameter] = Use()
            spans.append((*span(parameter), parameter))
        for buffer in model.buffers():
            spans.append((*span(buffer), None))
        self._spans = sorted(spans, key=lambda entry: entry[:2])
        self._reach: list[int] = []  # the furthest end up to each span, since spans may overlap
        for _, end, _ in self._spans:
            self._reach.append(max(end, self._reach[-1] if self._reach else 0))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context in which the model is run. (The mode itself is entered again and again.)"""
        inner = [m for m in self.model.modules() if m is not self.model]
        inner = [m for m in inner if not isinstance(m, torch.jit.ScriptModule)]
        enter = [m.register_forward_pre_hook(self._enter) for m in inner]
        leave = [m.register_forward_hook(self._leave, always_call=True) for m in inner]
        with attached([*enter, *leave]), self:
            yield
        self._derived.clear()
        self._copies.clear()
        self._mixed.clear()
        self._mixtures.clear()
        self._outputs.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while module in self._stack[1:] and self._stack.pop() is not module:
            pass  # of modules that raised

    # ---- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        viewing = getattr(func, "is_view", False) or func in VIEWING
        if viewing or any(x.is_nested for x in tensors):
            return self._run(func, args, kwargs)  # nested tensors have no strides to recognise
        direct = [self._direct(x) for x in tensors]
        origins = [self._origins(x) for x in tensors]
        if not any([*direct, *origins, *(self._mixed.of(x) for x in tensors)]):
            return self._run(func, args, kwargs)
        if func not in PRODUCTS and func is not CONVOLUTION:
            result = self.decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = self._run(func, args, kwargs)
        if not any(x.numel() for x in tensors_in(result)):
            return result  # a comparison, or of no rows: nothing of the weights goes on
        name = func.name().removeprefix("aten::").partition(".")[0]
        for mixture in map(self._mixtures.of, tensors) if func is not CONVOLUTION else ():
            if mixture is not None:
                self.uses[mixture.owner].mixed_otherwise = True
        if func in PRODUCTS:
            first = PRODUCTS[func]
            unscaled = kwargs.get("alpha", 1) == kwargs.get("beta", 1) == 1
            left, right = args[first : first + 2]
            self._product(left, right, args[0] if first and unscaled else None)
            weights = [*self._weights(left), *self._weights(right)]
            own = [p for p in weights if not self._owned(p)]
            if own:
                self._mixed.note(result, own)
            if len(own) == 1:
                self._mixtures.note(own[0], own[0], func, args, result)
            self._outputs.note(weights, result)
        elif func is CONVOLUTION:
            self._convolution(*args)
            self._outputs.note(self._weights(args[1]), result)
        else:
            self._other(name, tensors, direct, origins, result)
            if func in COPYING and len(direct[0]) == 1:
                self._copies.note(direct[0][0], direct[0][0], tensors[0], result)
            elif func in JOINING and not any(origins):
                known = zip(tensors, direct, strict=True)
                if all(len(ps) == 1 or (not ps and self._static(x)) for x, ps in known):
                    owners = [(ps[0], ps[0]) if ps else None for ps in direct]
                    self._copies.note_joined(tensors, owners, result, *joined(func, args, kwargs))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = func(*args, **kwargs)
        self.seconds += time.perf_counter() - begun
        self._outputs.follow(func, args, result)
        return result

    def _other(
        self,
        name: str,
        tensors: Sequence[Tensor],
        direct: Sequence[list[nn.Parameter]],
        origins: Sequence[dict[nn.Parameter, dict[str, None]]],
        result: Any,
    ) -> None:
        """An operation that is no product."""
        known = [
            bool(d) or bool(o) or x.numel() == 1 or self._static(x)
            for x, d, o in zip(tensors, direct, origins, strict=True)
        ]
        if all(known):  # computed from parameters and buffers alone
            chains: dict[nn.Parameter, dict[str, None]] = {}
            for of_tensor in origins:
                for p, chain in of_tensor.items():
                    chains.setdefault(p, {}).update(chain)
            for p in (p for ps in direct for p in ps):
                chains.setdefault(p, {})
                self._place(p)
            for chain in chains.values():
                chain[name] = None
            if chains:
                self._derived.note(result, chains)
            return
        involved = [p for ps in (*direct, *origins) for p in ps]
        for p in dict.fromkeys(involved):
            if name in _LOOKUPS:
                self._note(p, "looked_up", name)
            elif name.startswith("_scaled_dot_product"):
                self._note(p, "inputs")
            else:
                self._note(p, "entrywise" if name in _ENTRYWISE else "others", name)
        if own := [p for p in involved if not self._owned(p)]:
            self._mixed.note(result, own)

    def _product(self, left: Tensor, right: Tensor, bias: Any) -> None:
        if right.ndim == left.ndim - 1:  # a vector
            right = right[..., None]
            bias = bias[..., None] if isinstance(bias, Tensor) and bias.ndim else bias
        if left.ndim == 2:
            left, right = left[None], right[None]
        added = self._direct(bias) if isinstance(bias, Tensor) else []
        shape = (len(left), left.shape[1], right.shape[2])
        of_each = bias.expand(shape) if added else [None] * len(left)
        for a, b, shift in zip(left, right, of_each, strict=True):
            self._pair(a, b, added, shift)
        for p in added:
            self.uses[p].added += 1
            self._place(p)

    def _pair(self, a: Tensor, b: Tensor, added: list[nn.Parameter], shift: Tensor | None) -> None:
        """a (n, C) @ b (C, m), and what is added to it (n, m), from the memory of ``added``."""
        sides = ((b, a), (a.T, b.T))
        parameters = [self._weights(weight) for weight, _ in sides]
        for k, (weight, x) in enumerate(sides):
            shifted = shift if shift is None or k == 0 else shift.T
            others = parameters[1 - k]
            for p, block, part in self._operands(weight):
                if others and not self._owned(p):
                    self._note(p, "inputs" if self._owned(others[0]) else "both")
                    continue
                offset = None
                if shifted is not None and len(added) == 1:
                    offset = _offset(shifted[:, part], added[0])
                self._operand(p, block, len(x), None if offset is None else (added[0], offset))
            for p, chain in self._origins(weight).items() if not self._copies.of(weight) else ():
                if others:
                    self._note(p, "inputs")
                else:
                    self._note(p, "changed", *chain)

    def _operands(self, weight: Tensor) -> Iterator[tuple[nn.Parameter, Block | None, slice]]:
        """The parameters in whose memory, or in copies of which, ``weight`` (C, R) lies: each with
        its block, None if it is none, and the part of the R rows that it is."""
        whole = slice(None)
        if not (copied := self._copies.owners(weight)):
            for p in self._direct(weight):
                offset = (weight.data_ptr() - p.data_ptr()) // p.element_size()
                yield p, Block.of(weight, offset), whole
        elif (pieces := self._copies.pieces(weight)) is None:
            yield from ((p, None, whole) for p in copied)
        else:
            yield from ((piece.owner, piece.block(weight), piece.rows) for piece in pieces)

    def _operand(
        self,
        p: nn.Parameter,
        block: Block | None,
        rows: int,
        bias: tuple[nn.Parameter, int] | None,
    ) -> None:
        """x (rows, C) @ a block of ``p`` (C, R), to which a bias is added from an entry on."""
        use = self.uses[p]
        use.biases[None if bias is None else self._names[bias[0]]] = None
        if block is None:
            self._note(p, "parts")
            return
        if bias is not None:
            use.shifts.setdefault(block, set()).add(bias[1])
        use.blocks[block] = use.blocks.get(block, 0) + rows
        self._place(p, "blocks")

    def _convolution(self, x: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> None:
        added = self._direct(bias) if isinstance(bias, Tensor) else []
        for p in self._direct(weight):
            whole = span(weight) == span(p) and (
                (weight.is_contiguous() and p.is_contiguous())
                or (weight.shape, weight.stride()) == (p.shape, p.stride())
            )
            if self._direct(x):
                self._note(p, "both")
            elif not whole:
                self._note(p, "parts")
            else:
                self.uses[p].calls[ConvCall.of(weight, arguments)] = None
                self.uses[p].biases[self._names[added[0]] if len(added) == 1 else None] = None
                self._place(p, "calls")
        for p, chain in self._origins(weight).items():
            self._note(p, "changed", *chain)
        mixture = self._mixtures.of(weight)
        if mixture is not None and (call := mixture.call(x, weight, arguments)) is not None:
            seen = self.uses[mixture.owner].mixed
            seen[call] = seen.get(call, 0) + len(mixture.routing)
            self._place(mixture.owner, "mixed")
            for p in self._outputs.of(mixture.routing):
                self.uses[p].routes = True
            if (shift := self._mixtures.of(bias)) is not None:
                self._note(shift.owner, "mixed_bias")
        else:
            for p in self._mixed.of(weight) or ():
                self._note(p, "both")
        for p in [*self._direct(x), *self._origins(x)]:
            self._note(p, "inputs")
        for p in added:
            self.uses[p].added += 1
            self._place(p)

    # ---- what is known of a tensor ---------------------------------------------------------------

    def _overlapping(self, x: Tensor) -> Iterator[nn.Parameter | None]:
        start, end = span(x)
        i = bisect_right(self._reach, start)
        while start < end and i < len(self._spans) and self._spans[i][0] < end:
            if self._spans[i][1] > start:
                yield self._spans[i][2]
            i += 1

    def _direct(self, x: Tensor) -> list[nn.Parameter]:
        """The parameters in whose memory ``x`` lies."""
        return [p for p in self._overlapping(x) if p is not None]

    def _weights(self, x: Tensor) -> list[nn.Parameter]:
        """The parameters in whose memory, or in copies of which, ``x`` lies."""
        return self._copies.owners(x) or self._direct(x)

    def _static(self, x: Tensor) -> bool:
        """Whether ``x`` lies in the memory of a parameter or buffer."""
        return next(self._overlapping(x), x) is not x

    def _origins(self, x: Tensor) -> dict[nn.Parameter, dict[str, None]]:
        """The parameters from which ``x`` was computed, with the operations on the way."""
        return self._derived.of(x) or {}

    def _owned(self, p: nn.Parameter) -> bool:
        """Whether a module that it belongs to is being called."""
        return any(owner in self._stack for owner in self.owners.get(p, ()))

    def _note(self, p: nn.Parameter, which: str, *operations: str) -> None:
        """Record a use under the name of a field of :class:`Use`."""
        use = self.uses[p]
        if operations:
            getattr(use, which).update(dict.fromkeys(operations))
        else:
            setattr(use, which, True)
        self._place(p, which)

    def _place(self, p: nn.Parameter, which: str = "") -> None:
        """Record in which modules' calls a use happens."""
        use = self.uses[p]
        if which and not self._owned(p):
            use.outside.add(which)
        use.some.update(self._stack)
        if use.callers is None:
            use.callers = list(self._stack)
        else:
            together = zip(use.callers, self._stack, strict=False)
            common = next((i for i, (a, b) in enumerate(together) if a is not b), None)
            shorter = min(len(use.callers), len(self._stack))
            del use.callers[shorter if common is None else common :]


def _offset(shift: Tensor, bias: nn.Parameter) -> int | None:
    """Where in ``bias``, in entries, the row lies that is added as ``shift`` (n, R); None if it is
    another one for each of the n rows, or no row of neighbouring entries."""
    n, R = shift.shape
    if (n > 1 and shift.stride(0)) or (R > 1 and shift.stride(1) != 1):
        return None
    return (shift.data_ptr() - bias.data_ptr()) // bias.element_size()
