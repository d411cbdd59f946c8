"""Linear layers that skip their zeros, for inference on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, BackendError, DtypeError, ShapeError
from lobs_native.network.folding import exchange
from lobs_native.ops import SlicedWeight, select_backend
from lobs_native.ops.sliced import DTYPES_OF_VALUES, multiply

__all__ = [
    "SparseLayers",
    "SparseLinear",
    "from_sparse",
    "share_of_zeros",
    "sparse_linear",
    "to_sparse",
]

_CPU = torch.device("cpu")


class SparseLinear(nn.Module):
    """``nn.Linear`` for a weight with many zeros: ``x @ weight.T + bias`` without the zeros.

    It computes on the CPU, forward only, with a kernel that is made for few rows of x (a token, a
    small batch) and zeros anywhere. It has no parameters; ``state_dict()`` holds the same
    ``weight`` and ``bias`` as that of the dense layer, and loads them. Moving or converting the
    network does not touch it.

    Parameters
    ----------
    weight : (R, C) float32 or bfloat16
        Not modified. What is not zero is stored.
    bias : (R,), optional
    dtype : torch.dtype, optional
        How the weights are stored, torch.float32 or torch.bfloat16; default: as they are. Products
        are accumulated in float32 in any case.

    Raises
    ------
    ShapeError, DtypeError, BackendError
        An argument does not fit.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._sliced, self._bias = _stored(weight, bias, dtype)
        self._dtypes = (weight.dtype, None if bias is None else bias.dtype)

    @property
    def in_features(self) -> int:
        """C, the size of the last dimension of the input."""
        return self._sliced.features

    @property
    def out_features(self) -> int:
        """R, the size of the last dimension of the output."""
        return self._sliced.rows

    @property
    def weight(self) -> Tensor:
        """The dense weight (R, C), made anew at each access: changes to it have no effect."""
        return self._sliced.unpack()

    @property
    def bias(self) -> Tensor | None:
        """The bias (R,), a copy: changes to it have no effect."""
        return None if self._bias is None else self._bias.to(self._dtypes[1], copy=True)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights as they are stored."""
        return self._sliced.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output (..., R), in x's dtype, for x (..., C) in float32 or bfloat16.

        An infinity or NaN in x reaches only the outputs that have a weight in its column.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            x has another size, dtype or device.
        ArgumentError
            x requires a gradient.
        """
        sliced = self._sliced
        if x.dtype not in DTYPES_OF_VALUES:
            raise DtypeError(f"x: dtype is {x.dtype}, but a SparseLinear takes float32 or bfloat16")
        if not x.is_cpu:
            raise BackendError(
                f"x: on {x.device}, but a SparseLinear computes on the CPU; put the dense layers "
                "back with from_sparse(model) before the network is moved"
            )
        if x.ndim == 0 or x.shape[-1] != sliced.features:
            raise ShapeError(
                f"x is {tuple(x.shape)}, but its last dimension must be {sliced.features}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                "x: requires a gradient, which a SparseLinear does not compute; call the network "
                "under torch.inference_mode(), or put the dense layers back with from_sparse(model)"
            )
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.lobs_native.sliced_linear(
                x.detach().reshape(math.prod(x.shape[:-1]), sliced.features),
                sliced.values,
                sliced.columns,
                sliced.steps,
                self._bias,
                rows=sliced.rows,
                features=sliced.features,
                width=sliced.width,
            )
            return y.view(*x.shape[:-1], sliced.rows)
        return multiply(x, sliced, self._bias, _backend())

    def extra_repr(self) -> str:
        stored = str(self._sliced.values.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._bias is not None}, stored={stored}"
        )

    def dense(self) -> nn.Linear:
        """An ``nn.Linear`` with these weights, in the dtype that they had before."""
        linear = nn.Linear(self.in_features, self.out_features, self._bias is not None, "meta")
        linear.weight = nn.Parameter(self.weight.to(self._dtypes[0]))
        if self._bias is not None:
            linear.bias = nn.Parameter(self._bias.to(self._dtypes[1], copy=True))
        return linear.train(self.training)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight
        if self._bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}weight": (self.out_features, self.in_features)
        }
        if self._bias is not None:
            shapes[f"{prefix}bias"] = (self.out_features,)
        missing = [key for key in shapes if key not in state_dict]
        missing_keys += missing
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key not in shapes
        ]
        if missing:
            return
        wrong = [
            f"{key} is {tuple(state_dict[key].shape)}, but must be {shape}"
            for key, shape in shapes.items()
            if tuple(state_dict[key].shape) != shape
        ]
        error_msgs += wrong
        if wrong:
            return
        weight = state_dict[f"{prefix}weight"].detach().to(device=_CPU, dtype=self._dtypes[0])
        bias = None if self._bias is None else state_dict[f"{prefix}bias"]
        self._sliced, self._bias = _stored(weight, bias, self._sliced.values.dtype)


@functools.cache
def _backend() -> str:
    """The fastest level of this machine, asked for once: that takes as long as a small product."""
    return select_backend(None, _CPU)


def _stored(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[SlicedWeight, Tensor | None]:
    weight = checks.tensor(weight, "weight", ndim=2, dtypes=DTYPES_OF_VALUES)
    if weight.device != _CPU:
        raise BackendError(f"weight: on {weight.device}; a SparseLinear computes on the CPU")
    if bias is not None:
        bias = checks.tensor(bias, "bias", ndim=1)
        if len(bias) != len(weight):
            raise ShapeError(f"bias has {len(bias)} entries, but weight has {len(weight)} rows")
        bias = bias.to(dtype=torch.float32, device=_CPU, copy=True)
    return SlicedWeight.pack(weight, dtype=dtype), bias


def sparse_linear(linear: nn.Linear, *, dtype: torch.dtype | None = None) -> SparseLinear:
    """Return a :class:`SparseLinear` that computes what ``linear`` computes.

    Parameters
    ----------
    linear : nn.Linear
        On the CPU, in float32 or bfloat16. Not modified; its weights are copied.
    dtype : torch.dtype, optional
        How the weights are stored; see :class:`SparseLinear`.

    Raises
    ------
    DtypeError, BackendError
        ``linear`` is something else, has another dtype, or is on another device.
    """
    if not isinstance(linear, nn.Linear):
        raise DtypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    made = SparseLinear(linear.weight, linear.bias, dtype=dtype)
    return made.train(linear.training)


@dataclass(frozen=True)
class SparseLayers:
    """What :func:`to_sparse` did: the share of zeros of each layer that it replaced, and why it
    left the others."""

    replaced: dict[str, float]
    left: dict[str, str]


def to_sparse(
    model: nn.Module,
    *,
    sparsity: float = 0.7,
    smallest: int = 1 << 16,
    dtype: torch.dtype | None = None,
) -> SparseLayers:
    """Replace the linear layers of a network that have many zeros by :class:`SparseLinear`.

    For inference on a CPU with few rows at a time: with one row it is faster from some 50 % zeros
    on, with 100 rows from 70 %; :func:`measure_speed` says so for a network. :func:`from_sparse`
    undoes it.

    Parameters
    ----------
    model : nn.Module
        Modified in place. Only plain ``nn.Linear`` modules are replaced, not ``model`` itself.
    sparsity : float
        The least share of zeros of a layer that is replaced.
    smallest : int
        The least number of weights of a layer that is replaced: a call of a small one
        costs more than it saves.
    dtype : torch.dtype, optional
        How the weights are stored; see :class:`SparseLinear`.

    Returns
    -------
    SparseLayers
        Every linear layer is in it, with its share of zeros or the reason why it was left.

    Raises
    ------
    ArgumentError, DtypeError
        An argument does not fit. Nothing is replaced then.
    """
    least = checks.sparsity(sparsity)
    smallest = checks.count(smallest, "smallest")
    if dtype not in (None, *DTYPES_OF_VALUES):
        raise DtypeError(f"dtype: {dtype}; weights are stored in float32 or bfloat16")
    if isinstance(model, nn.Linear):
        raise ArgumentError("model: is a linear layer itself; use sparse_linear(model)")
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    replaced: dict[str, float] = {}
    left: dict[str, str] = {}
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason(module, smallest, shared=uses.get(id(module.weight), 0) > 1)
        share = 0.0 if reason else share_of_zeros(module.weight)
        if not reason and share < least:
            reason = f"{share:.1%} zeros"
        if reason:
            left[name] = reason
            continue
        made[module] = sparse_linear(module, dtype=dtype)
        replaced[name] = share
    exchange(model, made)
    return SparseLayers(replaced, left)


def from_sparse(model: nn.Module) -> list[str]:
    """Put ``nn.Linear`` layers in the place of every :class:`SparseLinear` of a network.

    Their weights are those that are stored, with their zeros, in the dtype that they had before
    :func:`to_sparse`; those stored in bfloat16 stay rounded. ``model`` is modified in place.
    Returns the names of the layers.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    if "" in found:
        raise ArgumentError("model: is a SparseLinear itself; use model.dense()")
    exchange(model, {module: module.dense() for module in found.values()})
    return list(found)


def share_of_zeros(weight: Tensor) -> float:
    """The share of the entries that are zero."""
    return float((weight == 0).float().mean())


def _reason(linear: nn.Linear, smallest: int, *, shared: bool) -> str:
    """Why a linear layer is not replaced, or nothing."""
    if type(linear) is not nn.Linear:
        return f"its type is {type(linear).__name__}"
    if linear.weight.device != _CPU:
        return f"it is on {linear.weight.device}"
    if linear.weight.dtype not in DTYPES_OF_VALUES:
        return f"its dtype is {linear.weight.dtype}"
    if shared:
        return "its weight belongs to another layer as well"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has hooks"
    if linear.weight.numel() < smallest:
        return f"it has {linear.weight.numel()} weights"
    return ""
