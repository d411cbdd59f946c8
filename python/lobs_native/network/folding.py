"""Plain layers in the place of those that compute their weight anew in each call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lobs_native.calibration.mode import Mode
from lobs_native.calibration.watch import CONVOLUTION, PRODUCTS
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers import computed
from lobs_native.layers.conv import margins

__all__ = ["SamePaddedConv2d", "exchange", "fold_weights"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_ARGUMENTS: tuple[str, ...] = ("in_features", "out_features", "in_channels", "out_channels")
_ARGUMENTS += ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_AGREES = 64  # roundings of the largest output by which the outputs may differ


def fold_weights(model: nn.Module) -> list[str]:
    """Replace layers that compute their weight in each call by plain layers that hold the result.

    These are convolutions and linear layers of subclasses whose forward standardizes, scales or
    masks the stored weight before it is used (``StdConv2d`` and ``ScaledStdConv2d`` of timm, in
    both forms, ``WeightStandardizedConv2d`` of BiT in transformers), and weights with a
    parametrization that cannot hold zeros (``spectral_norm``). Zeros in what they store would not
    be zeros of the network. Afterwards :func:`prune` prunes them like any other layer.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Its outputs in eval mode stay the same, up to rounding.

    Returns
    -------
    list of str
        The names of the layers that were replaced. Layers stay as they are whose weight depends on
        their inputs or is drawn at random, that have hooks, share a parameter with other modules,
        or compute something else besides.

    Raises
    ------
    ArgumentError
        The model is nothing but such a layer, which cannot be replaced in it.
    DtypeError
        ``model`` is no nn.Module, or a TorchScript module.

    Notes
    -----
    A layer is tried on random inputs of two sizes, and is replaced if a plain layer with the weight
    of its product or convolution returns the same. ``nn.Conv2d`` that pads by the size of its
    input, as TensorFlow does, becomes a :class:`~lobs_native.network.folding.SamePaddedConv2d`.

    Call this before making the optimizer, since the parameters are new; in training, the weights
    are no longer standardized. **The state of a folded model belongs to a folded model.** Keys and
    shapes are those of the original class, which would load it without complaint and standardize
    the weights once more: build the original, call this function, and then load the state. Gains
    and other parameters of the layers are gone.

    Why the zeros are not kept by the stored weights: a standardized row has mean zero, so that a
    zero in it stays one only if the mean of the stored row is exactly zero, in every order in which
    a device sums it.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise DtypeError(
            f"model: a {type(model).__name__} (TorchScript), whose layers are compiled"
        )
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    plain: dict[nn.Module, nn.Module] = {}
    parametrized: list[nn.Module] = []
    names = []
    for name, module in model.named_modules():
        if any(owners[id(p)] > uses[id(module)] for p in module.parameters()):
            continue
        if parametrize.is_parametrized(module, "weight"):
            if isinstance(module, _KINDS) and not computed.holds(module, "weight"):
                parametrized.append(module)
                names.append(name)
        elif (folded := _folded(module)) is not None:
            plain[module] = folded
            names.append(name)
    if model in plain:
        raise ArgumentError(
            f"model: it is a {type(model).__name__} itself, which cannot be replaced in it; put it "
            "into an nn.Sequential"
        )
    exchange(model, plain)
    for module in parametrized:
        training = module.training
        parametrize.remove_parametrizations(module.eval(), "weight")
        module.train(training)
    return names


def exchange(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of those of a network, wherever they are registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in others:
                parent._modules[name] = others[child]


class SamePaddedConv2d(nn.Conv2d):
    """nn.Conv2d that pads with zeros as TensorFlow's "SAME": so that there is an output for every
    ``stride`` inputs, one zero more at the end where their number is odd."""

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, C, height, width), or without B."""
        around = []
        pairs = zip(input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        for n, k, s, d in pairs:
            total = max(0, (math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
            around.append((total // 2, total - total // 2))
        return super().forward(functional.pad(input, margins(around)))


class _Operands(Mode):
    """While active, keeps the weights and biases of products and convolutions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is CONVOLUTION:
            self.seen.append((args[1], args[2]))
        elif func in PRODUCTS:
            first = PRODUCTS[func]
            self.seen.append((args[first + 1].mT, args[0] if first else None))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Trial:
    """A call of a module that computes its weight."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor


@torch.no_grad()
def _folded(module: nn.Module) -> nn.Module | None:
    """A plain layer that does the same; None if there is none, or if this is one already."""
    base = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if base is None or base is type(module) or "forward" in vars(module):
        return None
    stored = module._parameters["weight"]
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if stored is None or is_lazy(stored) or stored.is_meta or not stored.is_floating_point():
        return None
    training = module.training
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            trials = [_tried(module, stored, x) for x in _inputs(module, stored)]
    finally:
        module.train(training)
    first, second = trials
    if first is None or second is None or not torch.equal(first.weight, second.weight):
        return None
    for plain in _plain(module, base, first.weight, first.bias):
        if all(_same(plain(trial.inputs), trial.output) for trial in (first, second)):
            return plain.train(training)
    return None


def _inputs(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """Random inputs of two sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]]
    if isinstance(module, nn.Linear):
        shapes = [(rows, module.in_features) for rows in (3, 4)]
    else:
        assert isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
        each = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
        shapes = [
            (2, module.in_channels, *(d * (k - 1) + 1 + 2 * s + more for k, s, d in each))
            for more in (0, 1)
        ]
    return [torch.randn(shape, generator=generator).to(weight) for shape in shapes]


def _tried(module: nn.Module, stored: Tensor, x: Tensor) -> _Trial | None:
    """A call of a module; None if it does not use one weight that it has computed."""
    with _Operands() as operands:
        try:
            output = module(x)
        except Exception:  # a forward of a user's may raise anything on random inputs
            return None
    seen = [pair for pair in operands.seen if pair[0].shape == stored.shape]
    if len(seen) != 1 or not isinstance(output, Tensor):
        return None
    ((weight, bias),) = seen
    if weight.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
        return None
    return _Trial(x, weight.clone(), None if bias is None else bias.reshape(-1).clone(), output)


def _plain(
    module: nn.Module, base: type[nn.Module], weight: Tensor, bias: Tensor | None
) -> Iterator[nn.Module]:
    """Plain layers with the arguments of a module, each padding in another way."""
    names = (*_ARGUMENTS, "output_padding") if base in _TRANSPOSED else _ARGUMENTS
    arguments = {name: getattr(module, name) for name in names if hasattr(module, name)}
    for kind in (base, *((SamePaddedConv2d,) if base is nn.Conv2d else ())):
        plain = kind(**arguments, bias=bias is not None, device="meta")
        trained = any(p.requires_grad for p in module.parameters())
        plain.weight = nn.Parameter(weight, requires_grad=trained)
        plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=trained)
        yield plain


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    if found.shape != wanted.shape:
        return False
    limit = _AGREES * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= limit
