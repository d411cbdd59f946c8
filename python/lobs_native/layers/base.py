"""The interface between a layer and the pruner: its weights as matrices (and back), its inputs as
rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lobs_native.errors import ArgumentError, DtypeError, ShapeError
from lobs_native.layers import computed

__all__ = ["Layer", "overwrite"]


class Layer(ABC):
    """One prunable weight. A subclass describes the layout of weights and inputs, in Python alone.

    ``groups`` is G, ``rows`` is R (outputs per group), ``width`` is C (inputs per group). W is
    (G, R, C), and each group sees its own X (N, C).
    """

    module_type: type[nn.Module] | tuple[type[nn.Module], ...]
    groups: int
    rows: int
    width: int

    weight_part = "weight"  # names of the module's tensors
    bias_part = "bias"
    token_rows = False  # inputs are (..., C); every index of the leading dimensions is a row
    routed = False  # each group sees the rows that a router sends it
    watched = False  # its inputs are observed in the module's matrix products, see Matrix

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.prefix = name  # the module's name, for the names of its parameters
        self.module = module  # owns the parameters
        self.caller = module  # the module whose forward uses them
        self.sites: list[Layer] = [self]  # all uses of the weight, this one first
        self.notes: list[str] = []
        # Of a weight that is known by its use: the modules whose calls include all of its uses, and
        # those whose calls include some.
        self.around_all: Sequence[nn.Module] = ()
        self.around_some: Collection[nn.Module] = ()

    # ---- which modules, and whether they may be pruned -------------------------------------------

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        """The class by which ``module`` is a layer of this type; None if it is not."""
        kinds = cls.module_type if isinstance(cls.module_type, tuple) else (cls.module_type,)
        return next((kind for kind in kinds if isinstance(module, kind)), None)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        """The layers of a module that :meth:`base_of` accepts."""
        return [cls(name, module)]

    def check(self) -> None:
        """Raise if pruning would go wrong: an unknown forward, or a weight that is computed or has
        no values."""
        if not self.forward_is_known():
            raise ArgumentError(
                f"layer {self.name!r}: {type(self.caller).__name__} has a forward of its own, so "
                "how it uses the weight is unknown; exclude it, or describe it by a layer type "
                "(lobs_native.register_layer)"
            )
        self.check_weight()

    def check_weight(self) -> None:
        """Raise if the weight is computed or has no values."""
        for part in (self.weight_part, self.bias_part):
            owned = self.module._parameters.get(part)
            if owned is None and getattr(self.module, part, None) is not None:
                self._check_computed(part)
            elif owned is not None and is_lazy(owned):
                raise ArgumentError(
                    f"layer {self.name!r}: its {part} has no shape yet; run the model once first"
                )
            elif owned is not None and owned.is_meta and hasattr(self.module, "_hf_hook"):
                raise ArgumentError(
                    f"layer {self.name!r}: its {part} is offloaded (accelerate loads it for each "
                    "forward only); load the model without offloading, call "
                    "accelerate.hooks.remove_hook_from_submodules(model) first, or exclude it"
                )

    def forward_is_known(self) -> bool:
        """Whether the module's forward is that of the class that this type describes."""
        base = self.base_of(self.caller)
        replaced = "forward" in vars(self.caller) and not hasattr(self.caller, "_hf_hook")
        return not replaced and base is not None and type(self.caller).forward is base.forward

    def _check_computed(self, part: str) -> None:
        """Accept a computed weight if assigning to it works."""
        if not computed.holds(self.module, part):
            raise ArgumentError(
                f"layer {self.name!r}: its {part} is computed from other parameters "
                f"({computed.why_not(self.module, part)}) and cannot hold a pruned value; make it "
                "permanent first (remove_parametrizations, prune.remove) or exclude it"
            )

    # ---- weights ---------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that pruning changes, by full name, the weight's first."""
        changed: dict[str, nn.Parameter] = {}
        prefix = f"{self.prefix}." if self.prefix else ""
        for part in (self.weight_part, self.bias_part):
            owned = self.module._parameters.get(part)
            if owned is not None:
                changed[prefix + part] = owned
            elif part:
                for name, value in computed.computing(self.module, part).items():
                    changed[prefix + name] = value
        return changed

    @property
    def kind(self) -> str:
        """The name of the module's type, for reports."""
        return type(self.module).__name__

    @property
    def neighbours(self) -> int:
        """The length of a run of neighbouring inputs, which a pattern's groups must divide."""
        return self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as stored."""
        return tuple(self.stored(self.weight_part).shape)

    def weight(self) -> Tensor:
        """(G, R, C), detached; a view where possible."""
        return self.pack(self._floating(self.weight_part))

    def bias(self) -> Tensor | None:
        """(G, R), detached; None if there is no bias that may be changed."""
        if not self.bias_part or getattr(self.module, self.bias_part, None) is None:
            return None
        return self._floating(self.bias_part).reshape(self.groups, self.rows)

    def pack(self, stored: Tensor) -> Tensor:
        """The weight as stored, as (G, R, C). Neighbouring inputs are neighbouring columns."""
        return stored.reshape(self.groups, self.rows, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, for weights and masks."""
        return packed.reshape(self.shape)

    def stored(self, part: str) -> Tensor:
        """This layer's share of the module's tensor ``part``: a detached view."""
        return computed.value_of(self.module, part)

    @torch.no_grad()
    def write_back(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy ``weight`` (G, R, C) and ``bias`` (G, R) into the module's own parameters, keeping
        their dtype, device and memory format. Parametrized tensors are assigned to."""
        new = {self.weight_part: self.unpack(weight)}
        if bias is not None and self.bias() is not None:
            new[self.bias_part] = bias.reshape(self.stored(self.bias_part).shape)
        for part, value in new.items():
            if self.module._parameters.get(part) is not None:
                overwrite(self.stored(part), value)
                continue
            computed.assign(self.module, part, value)
            if not computed.same(self.stored(part), value):
                raise ArgumentError(
                    f"layer {self.name!r}: its parametrization cannot hold the pruned {part}; "
                    "make it permanent first (remove_parametrizations) or exclude it"
                )

    def _floating(self, part: str) -> Tensor:
        value = self.stored(part)
        if not value.is_floating_point():
            raise DtypeError(
                f"layer {self.name!r}: its {part} is {value.dtype}; only floating-point tensors "
                "can be pruned, so exclude it"
            )
        return value

    # ---- several uses of one weight --------------------------------------------------------------

    def can_share(self, other: Layer) -> bool:
        """Whether ``other`` uses the same parameter as its weight, in the same way."""
        own, others = (x.module._parameters.get(x.weight_part) for x in (self, other))
        return (
            own is not None
            and own is others
            and not self.watched
            and type(self) is type(other)
            and (self.groups, self.rows, self.width) == (other.groups, other.rows, other.width)
        )

    def share(self, other: Layer) -> None:
        """Prune the weight for both uses. Biases that are not shared stay as they are."""
        self.sites.append(other)
        own, others = (x.module._parameters.get(type(x).bias_part) for x in (self, other))
        self.notes.append(f"the weight is shared with {other.name!r}: pruned once for both inputs")
        if own is not others and self.bias_part:
            self.bias_part = ""
            self.notes.append("the biases are not shared and were not updated")

    # ---- inputs ----------------------------------------------------------------------------------

    def running(self) -> AbstractContextManager[Any]:
        """A context that is entered while the model runs for calibration."""
        return nullcontext()

    def units(self, output: Tensor) -> Tensor | None:
        """The module's output as (n, G * R), with the rows of :meth:`columns`; None if unknown."""
        return output.reshape(-1, self.groups * self.rows) if self.token_rows else None

    @abstractmethod
    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield pairs (group, X) with X (n, C) that contain every row the layer sees, once.

        ``inputs`` (and further arguments) are those that the module is called with.
        """

    def _tokens(self, inputs: Tensor) -> Tensor:
        """Inputs (..., C) as (n, C)."""
        if inputs.ndim == 0 or inputs.shape[-1] != self.width:
            raise ShapeError(
                f"layer {self.name!r}: input {tuple(inputs.shape)}, expected (..., {self.width})"
            )
        return inputs.reshape(-1, self.width)


def overwrite(target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into a tensor in place, also one that was made in inference mode, which cannot
    be written outside it."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.copy_(value)
