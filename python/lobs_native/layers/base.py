"""What the pruner needs to know of a layer: its weights as matrices, its inputs as rows, and the
way back."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lobs_native.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["Layer"]


class Layer(ABC):
    """One prunable weight. A subclass says how weights and inputs are laid out; nothing native
    changes.

    ``groups`` is G, ``rows`` R outputs and ``width`` C inputs per group: W is (G, R, C), each group
    sees its own X (N, C).
    """

    module_type: type[nn.Module] | tuple[type[nn.Module], ...]
    groups: int
    rows: int
    width: int

    weight_part = "weight"  # names of the module's tensors
    bias_part = "bias"
    token_rows = False  # inputs are (..., C), and every position but the last one is a row
    routed = False  # each group sees as many rows as a router gives it
    watched = False  # its inputs are seen in the module's matrix products, see Matrix

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.prefix = name  # of the module, for its parameters' names
        self.module = module  # holds the parameters
        self.caller = module  # its forward uses them
        self.sites: list[Layer] = [self]  # all uses of the weight, this one first
        self.notes: list[str] = []

    # ---- which modules, and whether they may be touched ------------------------------------------

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        """The class that makes ``module`` one of these layers, or None if it is none."""
        kinds = cls.module_type if isinstance(cls.module_type, tuple) else (cls.module_type,)
        return next((kind for kind in kinds if isinstance(module, kind)), None)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        """The layers of a module that :meth:`base_of` accepts."""
        return [cls(name, module)]

    def check(self) -> None:
        """Refuse what would be pruned wrongly, by name: forwards of their own, computed weights,
        weights that are not there."""
        self._check_forward()
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
                    f"layer {self.name!r}: its {part} is offloaded (accelerate brings it in for "
                    "each forward only); load the model without offloading, or call "
                    "accelerate.hooks.remove_hook_from_submodules(model) first, or exclude it"
                )

    def _check_forward(self) -> None:
        base = self.base_of(self.caller)
        replaced = "forward" in vars(self.caller) and not hasattr(self.caller, "_hf_hook")
        if replaced or base is None or type(self.caller).forward is not base.forward:
            raise ArgumentError(
                f"layer {self.name!r}: {type(self.caller).__name__} has a forward of its own, so "
                "what its weight is used for is not known; exclude it, or describe it by a layer "
                "type (lobs_native.register_layer)"
            )

    def _check_computed(self, part: str) -> None:
        """A parametrized weight is fine if assigning to it works: tried on a copy, with half of it
        zero."""
        if parametrize.is_parametrized(self.module, part):
            chain = copy.deepcopy(self._chain(part))
            value = getattr(self.module, part).detach().clone()
            value.view(-1)[::2] = 0
            try:
                with torch.no_grad():
                    chain.right_inverse(value)
                    if _same(chain(), value):
                        return
            except Exception:  # anything may come out of a user's parametrization
                pass
        raise ArgumentError(
            f"layer {self.name!r}: its {part} is computed from other parameters (parametrized, or "
            "masked by torch.nn.utils.prune) and does not take a pruned value; make it permanent "
            "first (remove_parametrizations, prune.remove) or exclude it"
        )

    # ---- weights ---------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that pruning changes, by their full names, the weight's first."""
        found: dict[str, nn.Parameter] = {}
        prefix = f"{self.prefix}." if self.prefix else ""
        for part in (self.weight_part, self.bias_part):
            owned = self.module._parameters.get(part)
            if owned is not None:
                found[prefix + part] = owned
            elif part and parametrize.is_parametrized(self.module, part):
                for key, value in self._chain(part).named_parameters():
                    found[f"{prefix}parametrizations.{part}.{key}"] = value
        return found

    def _chain(self, part: str) -> parametrize.ParametrizationList:
        chains = self.module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        chain = chains[part]
        assert isinstance(chain, parametrize.ParametrizationList)
        return chain

    @property
    def kind(self) -> str:
        """The module type's name, for reports."""
        return type(self.module).__name__

    @property
    def neighbours(self) -> int:
        """Inputs that stand next to each other: groups of a pattern must divide them."""
        return self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as it is stored."""
        return tuple(self.stored(self.weight_part).shape)

    def weight(self) -> Tensor:
        """(G, R, C), detached; a view where possible."""
        return self.pack(self._floating(self.weight_part))

    def bias(self) -> Tensor | None:
        """(G, R), detached, or None where there is none that may be changed."""
        if not self.bias_part or getattr(self.module, self.bias_part, None) is None:
            return None
        return self._floating(self.bias_part).reshape(self.groups, self.rows)

    def pack(self, stored: Tensor) -> Tensor:
        """(G, R, C) from the weight as it is stored. Columns that are neighbouring inputs stand
        next to each other."""
        return stored.reshape(self.groups, self.rows, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        """The way back from (G, R, C), for weights and masks."""
        return packed.reshape(self.shape)

    def stored(self, part: str) -> Tensor:
        """The tensor that this layer owns of the module's ``part``, detached: a view of the
        parameter."""
        value = getattr(self.module, part)
        assert isinstance(value, Tensor)
        return value.detach()

    @torch.no_grad()
    def write_back(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy (G, R, C) and (G, R) into the module's own parameters, keeping dtype, device and
        memory format. Parametrized ones are assigned to."""
        new = {self.weight_part: self.unpack(weight)}
        if bias is not None and self.bias() is not None:
            new[self.bias_part] = bias.reshape(self.stored(self.bias_part).shape)
        for part, value in new.items():
            if not parametrize.is_parametrized(self.module, part):
                self.stored(part).copy_(value)
                continue
            setattr(self.module, part, value.clone())
            if not _same(self.stored(part), value):
                raise ArgumentError(
                    f"layer {self.name!r}: its parametrization did not take the pruned {part}; "
                    "make it permanent first (remove_parametrizations) or exclude it"
                )

    def _floating(self, part: str) -> Tensor:
        value = self.stored(part)
        if not value.is_floating_point():
            raise DtypeError(
                f"layer {self.name!r}: its {part} is {value.dtype}; only floating point can be "
                "pruned"
            )
        return value

    # ---- several uses of one weight --------------------------------------------------------------

    def can_share(self, other: Layer) -> bool:
        """Whether ``other`` uses the same parameter as its weight, in the same way."""
        mine, theirs = (x.module._parameters.get(x.weight_part) for x in (self, other))
        return (
            mine is not None
            and mine is theirs
            and not self.watched
            and type(self) is type(other)
            and (self.groups, self.rows, self.width) == (other.groups, other.rows, other.width)
        )

    def share(self, other: Layer) -> None:
        """Prune the weight for both uses. Biases that differ stay as they are."""
        self.sites.append(other)
        mine, theirs = (x.module._parameters.get(type(x).bias_part) for x in (self, other))
        self.notes.append(f"the weight is shared with {other.name!r}: pruned once for both inputs")
        if mine is not theirs and self.bias_part:
            self.bias_part = ""
            self.notes.append("the biases are not shared and were not updated")

    # ---- inputs ----------------------------------------------------------------------------------

    def running(self) -> AbstractContextManager[Any]:
        """Entered while the model runs for calibration."""
        return nullcontext()

    def units(self, output: Tensor) -> Tensor | None:
        """(n, G * R) from what the module returns, whose rows are those of :meth:`columns`; None
        if that is not known."""
        return output.reshape(-1, self.groups * self.rows) if self.token_rows else None

    @abstractmethod
    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (group, X) with X (n, C) until every row that the layer saw has been given once.

        Called with what the module is called with.
        """

    def _tokens(self, inputs: Tensor) -> Tensor:
        """(n, C) of inputs (..., C)."""
        if inputs.ndim == 0 or inputs.shape[-1] != self.width:
            raise ShapeError(
                f"layer {self.name!r}: input {tuple(inputs.shape)}, expected (..., {self.width})"
            )
        return inputs.reshape(-1, self.width)


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Whether all zeros are there and everything else is right up to a few roundings."""
    limit = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max()) if wanted.numel() else 0
    return bool((got[wanted == 0] == 0).all()) and float((got - wanted).abs().max()) <= limit
