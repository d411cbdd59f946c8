"""Filters that activations mix: the product of routing weights (B, E) with E sets of filters gives
each of B samples filters of its own, which one convolution with B times as many groups applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from lobs_native.calibration.storages import Storages, tensors_in
from lobs_native.layers.conv import ConvCall

__all__ = ["Mixture", "Mixtures", "Outputs"]

_MIXING = torch.ops.aten.mm.default
_FOLLOWED = {"softmax", "_softmax", "_to_copy", "clone"}  # besides operations entry by entry
Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Mixture(Generic[Owner]):
    """The mixed filters of all samples."""

    owner: Owner  # of the E sets of filters
    routing: Tensor  # (B, E)
    entries: int  # of all of them

    def call(self, x: Tensor, weight: Tensor, arguments: Sequence[Any]) -> ConvCall | None:
        """What a convolution does to each sample; None if not every sample has groups of its own.

        ``x`` (1, B * C_in, *sizes) and ``weight`` (B * C_out, C_in / groups, *kernel), of the mixed
        filters, are those of a call of aten::convolution, and ``arguments`` follow the bias there.
        """
        samples, whole = len(self.routing), ConvCall.of(weight, arguments)
        all_in_order = weight.numel() == self.entries and weight.is_contiguous()
        if len(x) > 1 or whole.transposed or whole.groups % samples or not all_in_order:
            return None
        return dataclasses.replace(
            whole,
            in_channels=whole.in_channels // samples,
            out_channels=whole.out_channels // samples,
            groups=whole.groups // samples,
        )


class Mixtures(Generic[Owner]):
    """The mixed filters that are in memory."""

    def __init__(self) -> None:
        self._kept = Storages[Mixture[Owner]]()

    def note(self, owner: Owner, parameter: Tensor, func: Any, args: Any, result: Any) -> bool:
        """Remember what a product has made of activations and a whole parameter (E, ...); whether
        it is such a product."""
        if func is not _MIXING:
            return False
        routing, filters = args
        whole = filters.data_ptr() == parameter.data_ptr() and filters.numel() == parameter.numel()
        in_order = filters.is_contiguous() and parameter.is_contiguous() and result.is_contiguous()
        if not (whole and in_order and len(filters) == len(parameter)):
            return False
        self._kept.forget_freed()  # with their routing weights
        return self._kept.note(result, Mixture(owner, routing, result.numel()))

    def of(self, x: Any) -> Mixture[Owner] | None:
        """The mixture in whose memory a tensor lies, if it is one and does."""
        return self._kept.of(x) if isinstance(x, Tensor) else None

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


class Outputs(Generic[Owner]):
    """Which tensors are the outputs of layers, or computed from these entry by entry or by softmax,
    as routing weights are."""

    def __init__(self) -> None:
        self._kept = Storages[dict[Owner, None]]()

    def note(self, owners: Iterable[Owner], result: Any) -> None:
        """Remember the output of a layer, by the owners of its weights."""
        if each := dict.fromkeys(owners):
            self._kept.note(result, each)

    def follow(self, func: Any, args: Any, result: Any) -> None:
        """Remember what an operation makes of outputs."""
        if self._kept and isinstance(func, OpOverload):
            name = func._schema.name.split("::")[-1]
            if torch.Tag.pointwise in func.tags or name in _FOLLOWED:
                self.note((owner for x in tensors_in(args) for owner in self.of(x)), result)

    def of(self, x: Tensor) -> Collection[Owner]:
        """Of which layers a tensor is the output."""
        return self._kept.of(x) or {}

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
