"""Weights that a module computes from other parameters, and how they are assigned to.

Parametrizations of torch are assigned to through their inverse. Weight normalization, as a
parametrization or in its older form as a hook, can hold any value, also one with empty slices: a
length of zero, with any direction.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["assign", "computing", "holds", "same", "value_of", "why_not"]


def computing(module: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The parameters from which ``part`` is computed, by their names in ``module``; none if it is
    not, or if it is unknown how."""
    if parametrize.is_parametrized(module, part):
        named = _chain(module, part).named_parameters()
        return {f"parametrizations.{part}.{key}": value for key, value in named}
    if _hook(module, part) is None:
        return {}
    names = (f"{part}_g", f"{part}_v")
    return {name: p for name in names if (p := module._parameters[name]) is not None}


def value_of(module: nn.Module, part: str) -> Tensor:
    """The value of ``part`` now, detached."""
    hook = _hook(module, part)
    value = getattr(module, part) if hook is None else hook.compute_weight(module)
    assert isinstance(value, Tensor)
    return value.detach()


@torch.no_grad()
def assign(module: nn.Module, part: str, value: Tensor) -> None:
    """Set the parameters from which ``part`` is computed, so that its value is ``value``."""
    hook = _hook(module, part)
    if hook is not None:
        length, direction = module._parameters[f"{part}_g"], module._parameters[f"{part}_v"]
        assert length is not None
        assert direction is not None
        _normalize(value, length, direction, hook.dim)
        setattr(module, part, hook.compute_weight(module))
        return
    if (dim := _dim(module, part)) is not None:
        length, direction = _chain(module, part).parameters()
        _normalize(value, length, direction, dim)
    else:
        setattr(module, part, value.clone())


def holds(module: nn.Module, part: str) -> bool:
    """Whether ``part`` can be assigned a pruned value, as tried with half of its entries zero."""
    if _hook(module, part) is not None or _dim(module, part) is not None:
        return True
    if not parametrize.is_parametrized(module, part):
        return False
    chain = copy.deepcopy(_chain(module, part))
    value = value_of(module, part).clone()
    value.view(-1)[::2] = 0
    try:
        with torch.no_grad():
            chain.right_inverse(value)
            return same(chain(), value)
    except Exception:  # a user's parametrization may raise anything
        return False


def why_not(module: nn.Module, part: str) -> str:
    """What is known about why ``part`` cannot be assigned a pruned value."""
    if parametrize.is_parametrized(module, part):
        kinds = [type(p).__name__ for p in _chain(module, part)]
        if "_SpectralNorm" in kinds:
            return "spectral_norm divides it by its largest singular value, which pruning changes"
        return f"parametrized by {', '.join(kinds)}"
    if f"{part}_mask" in module._buffers:
        return "masked by torch.nn.utils.prune"
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    return f"by a hook: {', '.join(hooks)}" if hooks else "as an attribute"


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether all zeros are exact and all other values are equal up to a few roundings."""
    eps = torch.finfo(expected.dtype).eps
    limit = 16 * eps * float(expected.abs().max()) if expected.numel() else 0
    exact_zeros = bool((actual[expected == 0] == 0).all())
    return exact_zeros and float((actual - expected).abs().max()) <= limit


def _chain(module: nn.Module, part: str) -> parametrize.ParametrizationList:
    chains = module.parametrizations
    assert isinstance(chains, nn.ModuleDict)
    chain = chains[part]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def _dim(module: nn.Module, part: str) -> int | None:
    """The dimension of a weight normalization that is the only parametrization; None if it is
    not."""
    if not parametrize.is_parametrized(module, part):
        return None
    kinds = list(_chain(module, part))
    if len(kinds) != 1 or not isinstance(kinds[0], parametrizations._WeightNorm):
        return None
    dim = kinds[0].dim
    return dim if isinstance(dim, int) else None


def _hook(module: nn.Module, part: str) -> WeightNorm | None:
    """The hook of torch.nn.utils.weight_norm for ``part``."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == part:
            return hook
    return None


def _normalize(value: Tensor, length: Tensor, direction: Tensor, dim: int) -> None:
    """Set length and direction of a weight normalization. The direction of an empty slice stays as
    it is, or becomes arbitrary if it is empty too."""
    lengths = torch.norm_except_dim(value, 2, dim)
    empty = lengths == 0
    before = torch.where(torch.norm_except_dim(direction, 2, dim) == 0, 1.0, direction)
    direction.copy_(torch.where(empty, before, value))
    length.copy_(lengths.reshape(length.shape))
