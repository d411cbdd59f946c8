"""The operations as ``torch.ops.lobs_native.*``, for other programs and for torch.compile.

Each is the function of the same name in :mod:`lobs_native.ops`, which has the contract, but without
the name of the backend in its result. Arguments that are written in place are declared, and results
have fake implementations. There are no gradients: backward through a result raises, and tensors
that are written must not require one. Torch's dispatcher takes about as long as a small operation,
so this package calls :mod:`lobs_native.ops` directly.

The length of the result of ``rank_rows`` depends on the data. To keep it in one graph, set
``torch._dynamo.config.capture_dynamic_output_shape_ops``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from lobs_native import ops

__all__ = ["OPERATIONS"]

OPERATIONS: dict[str, CustomOpDef] = {}


def _operation(schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function under its own name; ``(a!)`` in the schema marks arguments it writes."""
    arguments = schema.split(" -> ")[0].strip("()").split(",")
    written = tuple(argument.split()[-1] for argument in arguments if "!)" in argument)

    def register(function: Callable[..., Any]) -> CustomOpDef:
        name = function.__name__
        OPERATIONS[name] = custom_op(
            f"lobs_native::{name}",
            function,
            mutates_args=written,
            device_types=("cpu", "cuda"),
            schema=schema,
        )
        return OPERATIONS[name]

    return register


# ---- operations that only write in place: torch derives their fake implementations ---------------


@_operation(
    "(Tensor(a!) H, Tensor X, Tensor? weights=None, *, bool ones=False, str? backend=None) -> ()"
)
def hessian_accumulate_(H: Tensor, X: Tensor, weights: Tensor | None = None, **how: Any) -> None:
    ops.hessian_accumulate_(H, X, weights, **how)


@_operation("(Tensor(a!) F, Tensor G, float m, *, str? backend=None) -> ()")
def inverse_update_(F: Tensor, G: Tensor, m: float, **how: Any) -> None:
    ops.inverse_update_(F, G, m, **how)


@_operation("(Tensor(a!) W, Tensor A, Tensor order, Tensor start, *, str? backend=None) -> ()")
def static_order_prune_(W: Tensor, A: Tensor, order: Tensor, start: Tensor, **how: Any) -> None:
    ops.static_order_prune_(W, A, order, start, **how)


@_operation("(Tensor(a!) X, Tensor M, Tensor chosen, *, str? backend=None) -> ()")
def support_solve_(X: Tensor, M: Tensor, chosen: Tensor, **how: Any) -> None:
    ops.support_solve_(X, M, chosen, **how)


@_operation(
    "(Tensor(a!) W, Tensor U, Tensor(b!) gone, Tensor(c!) E, *, int group=0, int per_group=0, "
    "str? backend=None) -> ()"
)
def sweep_block_(W: Tensor, U: Tensor, gone: Tensor, E: Tensor, **how: Any) -> None:
    ops.sweep_block_(W, U, gone, E, **how)


@_operation(
    "(Tensor(a!) w, Tensor(b!) g, Tensor(c!) p, Tensor h, Tensor removed, Tensor(d!) rr, *, "
    "str? backend=None) -> ()"
)
def conjugate_step_(
    w: Tensor, g: Tensor, p: Tensor, h: Tensor, removed: Tensor, rr: Tensor, **how: Any
) -> None:
    ops.conjugate_step_(w, g, p, h, removed, rr, **how)


# ---- operations with results ---------------------------------------------------------------------


@_operation("(Tensor W, Tensor diag, Tensor live, *, str? backend=None) -> (Tensor, Tensor)")
def saliency_argmin(W: Tensor, diag: Tensor, live: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    return ops.saliency_argmin(W, diag, live, **how)


@saliency_argmin.register_fake
def _(W: Tensor, diag: Tensor, live: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return W.new_empty(W.shape[0], dtype=torch.int64), W.new_empty(W.shape[0])


@_operation("(Tensor score, int count, *, str? backend=None) -> Tensor")
def rank_lowest(score: Tensor, count: int, **how: Any) -> Tensor:
    return ops.rank_lowest(score, count, **how)


@rank_lowest.register_fake
def _(score: Tensor, count: int, **_: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


@_operation("(Tensor score, Tensor chosen, *, str? backend=None) -> (Tensor, Tensor)")
def rank_rows(score: Tensor, chosen: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    return ops.rank_rows(score, chosen, **how)


@rank_rows.register_fake
def _(score: Tensor, chosen: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    removals = torch.library.get_ctx().new_dynamic_size()
    start = score.new_empty(score.shape[0] + 1, dtype=torch.int64)
    return score.new_empty(removals, dtype=torch.int32), start


_EXACT = (
    "Tensor A, Tensor? state=None, *, int? limit=None, float? stop=None, int block=1, int group=0, "
    "int per_group=0, int? memory=None, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_Traced = tuple[Tensor, Tensor, Tensor, Tensor]


@_operation(f"(Tensor W, {_EXACT}")
def exact_trace(W: Tensor, A: Tensor, state: Tensor | None = None, **how: Any) -> _Traced:
    return _traced(W, A, state=state, update=False, **how)


@_operation(f"(Tensor(a!) W, {_EXACT}")
def exact_trace_(W: Tensor, A: Tensor, state: Tensor | None = None, **how: Any) -> _Traced:
    return _traced(W, A, state=state, update=True, **how)


def _traced(W: Tensor, A: Tensor, *, stop: float | None = None, **how: Any) -> _Traced:
    trace = ops.exact_trace(W, A, stop=math.inf if stop is None else stop, **how)
    return trace.order, trace.loss, trace.count, trace.lost


@exact_trace.register_fake
@exact_trace_.register_fake
def _(
    W: Tensor, A: Tensor, state: Tensor | None = None, *, limit: int | None = None, **_: Any
) -> _Traced:
    R, C = W.shape
    removals = C if limit is None else min(limit, C)
    return (
        W.new_empty((R, removals), dtype=torch.int32),
        W.new_empty((R, removals)),
        W.new_empty(R, dtype=torch.int64),
        W.new_empty(R, dtype=torch.bool),
    )


@_operation(
    "(Tensor(a!) W, Tensor A, Tensor(b!) kept, Tensor? fixed=None, *, int group=0, "
    "int? limit=None, str? backend=None) -> (Tensor, Tensor)"
)
def exchange_(
    W: Tensor, A: Tensor, kept: Tensor, fixed: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    swaps, left, _ = ops.exchange_(W, A, kept, fixed=fixed, **how)
    return swaps, left


@exchange_.register_fake
def _(
    W: Tensor, A: Tensor, kept: Tensor, fixed: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    return W.new_empty(W.shape[0], dtype=torch.int64), W.new_empty(W.shape[0])


@_operation(
    "(Tensor p, Tensor(a!) d, Tensor x, Tensor(b!) removed, Tensor? state=None, *, "
    "int? count=None, int unit=1, int group=0, int per_group=0, bool by_row=False, "
    "float cut=0.0, str? backend=None) -> (Tensor, Tensor)"
)
def admm_step_(
    p: Tensor, d: Tensor, x: Tensor, removed: Tensor, state: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    step = ops.admm_step_(p, d, x, removed, state=state, **how)
    return torch.tensor(step.changed), torch.tensor(step.cut, dtype=torch.float64)


@admm_step_.register_fake
def _(
    p: Tensor, d: Tensor, x: Tensor, removed: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.float64)


@_operation(
    "(Tensor x, Tensor values, Tensor columns, Tensor steps, Tensor? bias=None, *, int rows, "
    "int features, int width=64, str? backend=None) -> Tensor"
)
def sliced_linear(x: Tensor, *parts: Any, **how: Any) -> Tensor:
    return ops.sliced_linear(x, *parts, **how)


@sliced_linear.register_fake
def _(x: Tensor, *_: Any, rows: int, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], rows)
