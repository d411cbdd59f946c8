"""What the pruner needs to know of a layer: its weights as matrices, its inputs as rows, and the
way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError, DtypeError

__all__ = ["Layer"]


class Layer(ABC):
    """One prunable module. A subclass says how its weights and inputs are laid out; nothing native
    changes.

    ``groups`` is G, ``rows`` R outputs and ``width`` C inputs per group: W is (G, R, C), each group
    sees its own X (N, C).
    """

    module_type: type[nn.Module]
    groups: int
    rows: int
    width: int

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        for part in ("weight", "bias"):
            value = getattr(module, part, None)
            if value is not None and module._parameters.get(part) is None:
                raise ArgumentError(
                    f"layer {name!r}: its {part} is computed from other parameters "
                    "(parametrized, or masked by "
                    "torch.nn.utils.prune); make it permanent first (remove_parametrizations, "
                    "prune.remove) or exclude it"
                )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that pruning changes, by their full names."""
        found = {part: self.module._parameters.get(part) for part in ("weight", "bias")}
        prefix = f"{self.name}." if self.name else ""
        return {prefix + part: p for part, p in found.items() if p is not None}

    @property
    def kind(self) -> str:
        """The module type's name, for reports."""
        return type(self.module).__name__

    def weight(self) -> Tensor:
        """(G, R, C), detached; a view where possible."""
        return self._parameter("weight").reshape(self.groups, self.rows, self.width)

    def bias(self) -> Tensor | None:
        """(G, R), detached, or None."""
        if self.module._parameters.get("bias") is None:
            return None
        return self._parameter("bias").reshape(self.groups, self.rows)

    @abstractmethod
    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (group, X) with X (n, C) until every row that the layer saw has been given once."""

    @torch.no_grad()
    def write_back(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy (G, R, C) and (G, R) into the module's own parameters, keeping dtype, device and
        memory format."""
        for part, value in (("weight", weight), ("bias", bias)):
            target = self.module._parameters.get(part)
            if value is not None and target is not None:
                target.copy_(value.reshape(target.shape))

    def _parameter(self, part: str) -> Tensor:
        value = self.module._parameters[part]
        assert value is not None
        if not value.is_floating_point():
            raise DtypeError(
                f"layer {self.name!r}: its {part} is {value.dtype}; only floating point can be "
                "pruned"
            )
        return value.detach()
