"""Operations moved to a GPU, for tests that are written with CPU tensors.

Storages are copied as they are, with their strides, gaps and overlaps, and copied back after the
call, so that the tests see all that was written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.ops import dispatch

OPERATIONS = (
    "hessian_accumulate_",
    "inverse_update_",
    "saliency_argmin",
    "static_order_prune_",
    "rank_lowest",
    "rank_rows",
    "exact_trace",
    "support_solve_",
    "exchange_",
    "sweep_block_",
)


def on(device: torch.device, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``run`` so that its tensors are moved to ``device`` and back."""

    @functools.wraps(run)
    def moved(*args: Any, **kwargs: Any) -> Any:
        there: dict[int, tuple[Any, Any]] = {}  # storages by address

        def go(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.device == device or x.layout != torch.strided:
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() not in there:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
                copy.untyped_storage().copy_(storage)
                there[storage.data_ptr()] = storage, copy.untyped_storage()
            target = there[storage.data_ptr()][1]
            empty = torch.empty(0, dtype=x.dtype, device=device)
            return empty.set_(target, x.storage_offset(), x.shape, x.stride())

        try:
            out = run(*map(go, args), **{name: go(value) for name, value in kwargs.items()})
        finally:
            for storage, copy in there.values():
                storage.copy_(copy)
        return _back(out)

    return moved


def _either(
    backend: str, here: Callable[..., Any], there: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return (there if kwargs.get("backend") == backend else here)(*args, **kwargs)


def _back(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.cpu()
    if isinstance(out, tuple):
        return tuple(map(_back, out))
    if dataclasses.is_dataclass(out):
        values = {f.name: _back(getattr(out, f.name)) for f in dataclasses.fields(out)}
        return dataclasses.replace(out, **values)  # type: ignore[type-var]
    return out


def install(monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device) -> None:
    """Run operations on ``device`` when their backend is ``backend``."""
    for name in OPERATIONS:
        plain = getattr(ops, name)
        call = functools.partial(_either, backend, plain, on(device, plain))
        monkeypatch.setattr(ops, name, call)
    select = ops.select_backend

    def lenient(name: str | None, where: torch.device) -> str:
        return select(name, device if name == backend else where)

    monkeypatch.setattr(ops, "select_backend", lenient)
    monkeypatch.setattr(dispatch, "select_backend", lenient)
