"""Modules without what ``torch.distributed`` does around their forward passes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lobs_native.errors import ArgumentError

__all__ = ["in_pieces", "is_tensor_parallel", "refuse_pieces", "reshard", "whole_modules"]


def _class(module: str, name: str) -> type[Any]:
    """A class of a module of torch; one of which nothing is if nothing has imported the module."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, _Nothing)


class _Nothing:
    pass


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards."""
    return [m for m in model.modules() if isinstance(m, _class("fsdp", "FSDPModule"))]


def reshard(model: nn.Module) -> None:
    """Let go of parameters that modules of FSDP2 have gathered themselves, as they do for a forward
    pass: what is written to these is lost."""
    for module in _sharded(model):
        module.reshard()


def in_pieces(model: nn.Module) -> dict[str, Any]:
    """The parameters and buffers of which each rank has a piece (DTensor), by their first name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: x for name, x in named if isinstance(x, _class("tensor", "DTensor"))}


def refuse_pieces(model: Any, argument: str = "model") -> None:
    """Raise ArgumentError, about this argument, if a rank has only pieces of the model."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(m, _class("fsdp", "FullyShardedDataParallel")) for m in modules):
        raise ArgumentError(
            f"{argument}: it is sharded by FullyShardedDataParallel, whose parameters are pieces "
            "of others; shard it by fully_shard (FSDP2) instead, or pass the model as it was before"
        )
    for name in in_pieces(model) if isinstance(model, nn.Module) else ():
        raise ArgumentError(
            f"{argument}: parameter {name!r} is a DTensor, of which each rank has a piece; pass a "
            "network of which every rank has all"
        )


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether parameters are in pieces, or hooks around modules, that are not FSDP2's: how modules
    run on pieces is then up to the model."""
    inside = {m for module in _sharded(model) for m in module.modules()}
    outside = (p for m in model.modules() if m not in inside for p in m.parameters(recurse=False))
    return any(isinstance(p, _class("tensor", "DTensor")) for p in outside) or any(
        _of_torch(hook, "torch.distributed.tensor") for m in model.modules() for hook in _hooks(m)
    )


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _of_torch(function: Any, package: str = "torch.distributed") -> bool:
    """Whether this package of torch has made the function, or wrapped it."""
    inner = getattr(function, "__func__", function)
    inside = getattr(inner, "__globals__", {}).get("__name__"), getattr(inner, "__module__", "")
    return any(f"{name}.".startswith(f"{package}.") for name in inside)


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    """In place, since handles refer to the dictionary, and in order."""
    added = {key: hook for key, hook in hooks.items() if key not in before}
    hooks.clear()
    hooks.update(before | added)


@contextlib.contextmanager
def whole_modules(model: nn.Module) -> Iterator[int]:
    """Take the hooks of ``torch.distributed``, and FSDP2's classes and methods, off the modules for
    as long as the context lasts; yields how many hooks."""
    count, fsdp = 0, _class("fsdp", "FSDPModule")
    with contextlib.ExitStack() as scope:
        for module in _sharded(model):
            if not any(map(_of_torch, _hooks(module))):
                raise ArgumentError(
                    f"model: {type(module).__name__} is sharded by FSDP2 in a way that is not "
                    f"known (torch {torch.__version__}): it has no hooks of torch.distributed; "
                    "gather the model, so that every rank has all of it"
                )
            kind = type(module)
            scope.callback(setattr, module, "__class__", kind)
            module.__class__ = next(c for c in kind.__mro__ if not issubclass(c, fsdp))
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                own = {key for key, hook in hooks.items() if _of_torch(hook)}
                count += len(own)
                scope.callback(_put_back, hooks, dict(hooks))
                for key in own:
                    del hooks[key]
            # register_fsdp_forward_method wraps a method and holds it in the module.
            for name, value in list(vars(module).items()):
                if _of_torch(value) and hasattr(value, "__wrapped__"):
                    scope.callback(setattr, module, name, value)
                    setattr(module, name, value.__wrapped__)
        yield count
