"""Every argument of every public function wrong in turn, and odd layouts that must still be right.

Three tables. WRONG: one argument is broken, the call raises the named error, the message names the
argument, and no tensor has changed. RIGHT: documented right answers, odd inputs whose result must
be the same bytes as that of the plain contiguous copy. HOSTILE: inputs that could make native code
read or write the wrong memory, each tried in a child process, because a miss kills the process.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import conditioned, features
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
    ShapeError,
)

pytestmark = pytest.mark.usefixtures("one_thread")

R, C, N = 5, 4, 7  # rows and columns of a weight, rows of its inputs: all different
NAN, INF = float("nan"), float("inf")
HUGE = 10**400  # an int that no float can hold

# ---- the public functions, with arguments that are right -----------------------------------------


@dataclass(frozen=True)
class Function:
    """One public function: what it is, fresh right arguments, and which of them it writes."""

    what: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    written: tuple[str, ...] = ()


def moment(size: int = C) -> Tensor:
    return conditioned(size, 10.0)


def seen(columns: int = C, rows: int = 20, **options: Any) -> lobs.Hessian:
    return lobs.Hessian(columns, **options).update(features(rows, columns))


def streamed() -> lobs.StreamingInverse:
    return lobs.StreamingInverse(C, rows=10.0, alpha=10.0).update(features(3, C))


def state(**changed: Any) -> dict[str, Any]:
    return {**seen().state_dict(), **changed}


def weight() -> Tensor:
    return torch.linspace(-1.0, 2.0, R * C).reshape(R, C) ** 3  # no two alike, none zero


def row_weights() -> Tensor:
    return torch.linspace(0.25, 2.0, N)


def mask_of_two() -> Tensor:
    mask = torch.ones(R, C, dtype=torch.bool)
    mask[0, 1] = mask[3, 2] = False
    return mask


def half_mask() -> Tensor:
    return (torch.arange(R * C) % 2 == 0).reshape(R, C)


def codes() -> Tensor:
    """0 = may go, 1 = goes first, 2 = stays."""
    return (torch.arange(R * C) % 3).reshape(R, C).to(torch.uint8)


def traced() -> lobs.WeightTrace:
    return lobs.trace_weight(weight(), moment(), until=0.5)


FUNCTIONS = {
    "Hessian": Function(
        lobs.Hessian,
        lambda: {"columns": C, "bias": False, "dtype": torch.float64, "device": "cpu"},
    ),
    "Hessian.update": Function(
        lobs.Hessian.update,
        lambda: {"self": seen(), "x": features(N, C).float(), "weights": row_weights()},
        written=("self",),
    ),
    "Hessian.merge": Function(
        lobs.Hessian.merge, lambda: {"self": seen(), "other": seen()}, written=("self",)
    ),
    "Hessian.matrix": Function(lobs.Hessian.matrix, lambda: {"self": seen()}),
    "Hessian.load_state_dict": Function(
        lobs.Hessian.load_state_dict,
        lambda: {"self": lobs.Hessian(C), "state": state()},
        written=("self",),
    ),
    "Hessian.from_matrix": Function(lobs.Hessian.from_matrix, lambda: {"H": moment(), "rows": 3.0}),
    "StreamingInverse": Function(
        lobs.StreamingInverse,
        lambda: {
            "columns": C,
            "rows": 10.0,
            "alpha": 10.0,
            "blocks": 2,
            "dtype": torch.float64,
            "device": "cpu",
        },
    ),
    "StreamingInverse.update": Function(
        lobs.StreamingInverse.update,
        lambda: {"self": streamed(), "x": features(N, C)},
        written=("self",),
    ),
    "prune_weight": Function(
        lobs.prune_weight,
        lambda: {
            "weight": weight(),
            "hessian": moment(C + 1),
            "sparsity": 0.5,
            "max_error": None,
            "threshold": None,
            "method": "lobs",
            "pattern": "unstructured",
            "scope": "layer",
            "bias": torch.linspace(1.0, 2.0, R),
            "prune_bias": True,
            "mask": mask_of_two(),
            "damping": 0.01,
            "refine": None,
            "memory": None,
            "backend": None,
        },
    ),
    "trace_weight": Function(
        lobs.trace_weight,
        lambda: {
            "weight": weight(),
            "hessian": moment(C + 1),
            "method": "exact",
            "pattern": "unstructured",
            "until": 0.75,
            "bias": torch.linspace(1.0, 2.0, R),
            "prune_bias": True,
            "mask": mask_of_two(),
            "damping": 0.01,
            "memory": None,
            "backend": None,
        },
    ),
    "WeightTrace.at": Function(
        lobs.WeightTrace.at,
        lambda: {"self": traced(), "sparsity": 0.5, "scope": "layer"},
        written=("self",),  # it may trace further
    ),
    "WeightTrace.curve": Function(
        lobs.WeightTrace.curve, lambda: {"self": traced(), "scope": "layer", "points": 7}
    ),
    "plan_memory": Function(
        lobs.plan_memory,
        lambda: {
            "rows": R,
            "columns": C,
            "sparsity": 0.5,
            "method": "admm",
            "dtype": torch.float32,
            "bias": True,
            "memory": None,
            "backend": None,
        },
    ),
    "hessian_accumulate_": Function(
        ops.hessian_accumulate_,
        lambda: {
            "H": moment(C + 1).tril(),
            "X": features(N, C).float(),
            "weights": row_weights().double(),
            "ones": True,
            "backend": None,
        },
        written=("H",),
    ),
    "inverse_update_": Function(
        ops.inverse_update_,
        lambda: {
            "F": torch.eye(3, dtype=torch.float64).repeat(2, 1, 1),
            "G": features(N, 6) + 0.25,
            "m": 2.0,
            "backend": None,
        },
        written=("F",),
    ),
    "saliency_argmin": Function(
        ops.saliency_argmin,
        lambda: {
            "W": weight(),
            "diag": torch.linspace(1.0, 2.0, R * C).reshape(R, C),
            "live": torch.ones(R, C, dtype=torch.bool),
            "backend": None,
        },
    ),
    "static_order_prune_": Function(
        ops.static_order_prune_,
        lambda: {
            "W": weight().double(),
            "A": moment(),
            "order": torch.tensor([0, 1, 2, 3, 2, 0, 3, 1], dtype=torch.int32),
            "start": torch.tensor([0, 4, 4, 6, 7, 8]),
            "backend": None,
        },
        written=("W",),
    ),
    "exact_trace": Function(
        ops.exact_trace,
        lambda: {
            "W": weight().double(),
            "A": moment(),
            "state": codes(),
            "limit": 3,
            "stop": 1e3,
            "block": 1,
            "group": 2,
            "per_group": 1,
            "update": True,
            "memory": None,
            "backend": None,
        },
        written=("W",),
    ),
    "exact_bytes": Function(
        ops.exact_bytes,
        lambda: {
            "columns": 64,
            "dtype": torch.float32,
            "limit": 20,
            "block": 1,
            "group": 4,
            "backend": None,
        },
    ),
    "affordable_threads": Function(
        ops.affordable_threads,
        lambda: {
            "columns": 64,
            "dtype": torch.float32,
            "rows": R,
            "memory": None,
            "backend": None,
        },
    ),
    "support_solve_": Function(
        ops.support_solve_,
        lambda: {"X": weight().double(), "M": moment(), "chosen": mask_of_two(), "backend": None},
        written=("X",),
    ),
    "exchange_": Function(
        ops.exchange_,
        lambda: {
            "W": weight().double(),
            "A": moment(),
            "kept": half_mask(),
            "fixed": ~mask_of_two(),
            "group": 2,
            "limit": 5,
            "backend": None,
        },
        written=("W", "kept"),
    ),
    "sweep_block_": Function(
        ops.sweep_block_,
        lambda: {
            "W": weight().double(),
            "U": torch.linalg.cholesky(moment(), upper=True),
            "gone": codes(),
            "E": torch.zeros(R, C, dtype=torch.float64),
            "group": 2,
            "per_group": 1,
            "backend": None,
        },
        written=("W", "gone", "E"),
    ),
}


# ---- what must not change ------------------------------------------------------------------------


def print_of(x: Any) -> Any:
    """Everything about an argument that a call could change, down to its storage's last byte."""
    if isinstance(x, lobs.Hessian):
        return (x.columns, x.bias, x.rows, x.backend, print_of(x.state_dict()))
    if isinstance(x, lobs.StreamingInverse):
        return (x.columns, x.blocks, x.rows, x.seen, x.backend, print_of(x.inverse()))
    if isinstance(x, lobs.WeightTrace):
        return (print_of(x.order), print_of(x.loss))
    if isinstance(x, Mapping):
        return [(key, print_of(value)) for key, value in x.items()]
    if isinstance(x, np.ndarray):
        return (x.dtype, x.shape, x.strides, x.tobytes())
    if not isinstance(x, Tensor):
        return repr(x)
    about = (type(x).__name__, x.dtype, x.layout, x.device, x.requires_grad)
    if x.is_nested:
        return about
    about += (tuple(x.shape),)
    if x.layout == torch.sparse_coo:
        return (*about, print_of(x._indices()), print_of(x._values()))
    if x.layout == torch.sparse_csr:
        parts = (x.crow_indices(), x.col_indices(), x.values())
        return (*about, *(print_of(part) for part in parts))
    if x.is_mkldnn:
        return (*about, print_of(x.to_dense()))
    if x.device.type == "meta" or type(x).__name__ == "FakeTensor":
        return about
    plain = x.detach().as_subclass(Tensor) if type(x) is not Tensor else x.detach()
    storage = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage())
    return (*about, x.stride(), x.storage_offset(), x.is_neg(), storage.numpy().tobytes())


def bits_of(x: Any) -> Any:
    """The values of a result, byte for byte, whatever their strides."""
    if isinstance(x, Tensor):
        assert not x.requires_grad
        plain = x.contiguous().reshape(-1)
        return (x.dtype, tuple(x.shape), plain.view(torch.uint8).numpy().tobytes())
    if isinstance(x, lobs.PrunedWeight):
        values = (x.error, x.relative_error, x.sparsity, x.damping, x.backend, x.status, x.notes)
        values += (x.method, x.optimality, x.swaps, x.dead_columns)
        return (*values, *(bits_of(t) for t in (x.weight, x.bias, x.mask, x.bias_mask)))
    if isinstance(x, lobs.Hessian):
        return (x.rows, bits_of(x.state_dict()["sum"]))
    if isinstance(x, lobs.WeightTrace):
        return (bits_of(x.order), bits_of(x.loss), bits_of(x.at(0.5)))
    if isinstance(x, ops.Trace):
        return (x.backend, *(bits_of(t) for t in (x.order, x.loss, x.count, x.lost)))
    if isinstance(x, lobs.StreamingInverse):
        return (x.seen, bits_of(x.inverse()))
    if isinstance(x, tuple):
        return tuple(bits_of(part) for part in x)
    return x


def outcome(function: str, arguments: dict[str, Any]) -> Any:
    """What a call returned and what it wrote, as bytes."""
    result = FUNCTIONS[function].what(**arguments)
    return bits_of((result, *(arguments[name] for name in FUNCTIONS[function].written)))


# ---- the table of what is wrong ------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    function: str
    argument: str
    kind: str
    make: Callable[[Any], Any]  # the right value -> a wrong one
    error: type[LobsError]  # exactly this one; LobsError stands for any of ours
    named: str = ""  # the name that the message must hold, if not the argument's
    also: dict[str, Callable[[Any], Any]] = field(default_factory=dict)  # further arguments

    @property
    def id(self) -> str:
        return f"{self.function}-{self.argument}-{self.kind}"


def be(value: Any) -> Callable[[Any], Any]:
    """A maker that ignores the right value."""
    return lambda _: value


def quiet(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """For kinds of tensor that torch warns about when they are made."""

    def made(x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(x)

    return made


class Tagged(Tensor):
    """A tensor subclass, as users have them."""


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(x.shape, dtype=x.dtype)


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def complex_of(x: Tensor) -> Tensor:
    return x.to(torch.complex128)


def grown(dim: int) -> Callable[[Tensor], Tensor]:
    """One more entry along ``dim``."""
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim)


def emptied(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, 0).clone()


def wrong_tensors(
    function: str, argument: str, *, skip: tuple[str, ...] = (), named: str = "", inside: str = ""
) -> Iterator[Wrong]:
    """What is wrong for any argument that is a tensor. ``inside`` names its key in a mapping."""
    good = FUNCTIONS[function].good()[argument]
    good = good[inside] if inside else good
    written = argument in FUNCTIONS[function].written
    kinds: dict[str, tuple[Callable[[Any], Any], type[LobsError]]] = {
        "None": (be(None), DtypeError),
        "str": (be("weight"), DtypeError),
        "list": (be([[1.0, 2.0]]), DtypeError),
        "number": (be(3), DtypeError),
        "type": (be(Tensor), DtypeError),
        "object array": (be(np.array([[None]])), DtypeError),
        "foreign byte order": (be(np.ones((2, 2), dtype=">f8")), DtypeError),
        "int16": (lambda x: x.to(torch.int16), DtypeError),
        "int8": (lambda x: x.to(torch.int8), DtypeError),
        "complex": (complex_of, DtypeError),
        "conjugated": (lambda x: complex_of(x).conj(), DtypeError),
        "float8": (lambda x: x.to(torch.float8_e4m3fn), DtypeError),
        "meta": (lambda x: x.to("meta"), DtypeError),
        "fake": (fake, DtypeError),
        "sparse": (lambda x: x.to_sparse(), DtypeError),
        "quantised": (quiet(quantised), DtypeError),
        "subclass": (lambda x: x.as_subclass(Tagged), DtypeError),
        "mkldnn": (lambda x: x.float().to_mkldnn(), DtypeError),
        "jagged": (
            quiet(lambda x: torch.nested.as_nested_tensor([x, x], layout=torch.jagged)),
            DtypeError,
        ),
        "nested": (quiet(lambda x: torch.nested.as_nested_tensor([x, x])), DtypeError),
        "rank 0": (lambda x: x.reshape(-1)[0].clone(), ShapeError),
        "rank + 1": (lambda x: x[None].clone(), ShapeError),
    }
    if good.ndim == 2:
        kinds["sparse rows"] = (quiet(lambda x: x.to_sparse_csr()), DtypeError)
    if good.is_floating_point():
        kinds["int64"] = (lambda x: x.to(torch.int64), DtypeError)
        kinds["bool"] = (lambda x: x.to(torch.bool), DtypeError)
    else:
        kinds["float32"] = (lambda x: x.float(), DtypeError)
    for dim in range(good.ndim):
        kinds[f"one more in dim {dim}"] = (grown(dim), ShapeError)
        kinds[f"none in dim {dim}"] = (emptied(dim), ShapeError)
    if written:
        kinds["array"] = (lambda x: x.numpy(), DtypeError)
        kinds["float16"] = (lambda x: x.half(), DtypeError)
        kinds["expanded"] = (lambda x: x[:1].expand_as(x), ShapeError)
        kinds["transposed"] = (transposed, ShapeError)
        kinds["every other"] = (strided, ShapeError)
    if written and good.is_floating_point():
        kinds["requires grad"] = (lambda x: x.requires_grad_(), DtypeError)
        kinds["Parameter"] = (torch.nn.Parameter, DtypeError)
        kinds["computed from a Parameter"] = (lambda x: torch.nn.Parameter(x) * 1, DtypeError)
        kinds["negated"] = (negated, ShapeError)
        kinds["misaligned"] = (misaligned, ShapeError)
    for kind, (make, error) in kinds.items():
        if kind in skip:
            continue
        if inside:
            yield Wrong(
                function,
                argument,
                f"{inside} {kind}",
                lambda d, make=make: {**d, inside: make(d[inside])},
                error,
                named or argument,
            )
        else:
            yield Wrong(function, argument, kind, make, error, named or argument)


def wrong_numbers(
    function: str, argument: str, *, low: float | None = 0.0, high: bool = True, none: bool = True
) -> Iterator[Wrong]:
    """What is wrong for any argument that is a number: ``low`` the largest that is too low."""
    kinds: dict[str, tuple[Any, type[LobsError]]] = {
        "str": ("0.5", DtypeError),
        "list": ([0.5], DtypeError),
        "bool": (True, DtypeError),
        "complex": (0.5j, DtypeError),
        "complex tensor": (torch.tensor(0.5 + 0j), DtypeError),
        "complex array scalar": (np.complex64(0.5), DtypeError),
        "two numbers": (torch.tensor([0.5, 0.5]), DtypeError),
        "meta": (torch.tensor(0.5, device="meta"), DtypeError),
        "NaN": (NAN, ArgumentError),
        "NaN tensor": (torch.tensor(NAN), ArgumentError),
        "-Inf": (-INF, ArgumentError),
        "huge int": (HUGE, ArgumentError),
        "negative huge int": (-HUGE, ArgumentError),
        "too low": (low, ArgumentError),
        "negative": (-0.1, ArgumentError),
    }
    if none:
        kinds["None"] = (None, DtypeError)
    if high:
        kinds["Inf"] = (INF, ArgumentError)
    for kind, (value, error) in kinds.items():
        yield Wrong(function, argument, kind, be(value), error)


def wrong_names(
    function: str, argument: str, unknown: tuple[str, ...], error: type[LobsError]
) -> Iterator[Wrong]:
    for kind, value in {"int": 3, "list": ["lobs"], "bytes": b"lobs", "object": object()}.items():
        yield Wrong(function, argument, kind, be(value), DtypeError)
    for name in unknown:
        yield Wrong(function, argument, f"unknown {name!r}", be(name), error)


def wrong_flags(function: str, argument: str) -> Iterator[Wrong]:
    for kind, value in {
        "None": None,
        "str": "yes",
        "int": 1,
        "list": [],
        "tensor": torch.tensor(True),
    }.items():
        yield Wrong(function, argument, kind, be(value), DtypeError)


def wrong_counts(
    function: str,
    argument: str,
    *,
    none: bool = True,
    zero: bool = True,
    high: bool = True,
    named: str = "",
) -> Iterator[Wrong]:
    """What is wrong for any whole number; also None, zero and what is far too high, if asked."""
    kinds: dict[str, tuple[Any, type[LobsError]]] = {
        "str": ("4", DtypeError),
        "list": ([4], DtypeError),
        "bool": (True, DtypeError),
        "float": (4.0, DtypeError),
        "float tensor": (torch.tensor(4.0), DtypeError),
        "array": (np.array([4, 4]), DtypeError),
        "type": (Tensor, DtypeError),
        "negative": (-4, ArgumentError),
        "beyond 64 bits and negative": (-HUGE, ArgumentError),
    }
    if none:
        kinds["None"] = (None, DtypeError)
    if zero:
        kinds["zero"] = (0, ArgumentError)
    for kind, (value, error) in kinds.items():
        yield Wrong(function, argument, kind, be(value), error)
    if high:
        yield Wrong(function, argument, "beyond any memory", be(2**62), ArgumentError, named)
        yield Wrong(function, argument, "beyond 64 bits", be(HUGE), ArgumentError, named)


def wrong_flags_as_names(function: str, argument: str) -> Iterator[Wrong]:
    for kind, value in {"True": True, "False": False}.items():
        yield Wrong(function, argument, kind, be(value), DtypeError)


def wrong_devices(function: str) -> Iterator[Wrong]:
    for kind, value in {
        "unknown": "nope",
        "absent": "cuda:99",
        "meta": "meta",
        "list": ["cpu"],
        "float": 1.5,
    }.items():
        yield Wrong(function, "device", kind, be(value), LobsError)


def wrong_dtypes(function: str) -> Iterator[Wrong]:
    for kind, value in {
        "None": None,
        "str": "float64",
        "list": [torch.float64],
        "python type": float,
        "float16": torch.float16,
        "int64": torch.int64,
        "complex": torch.complex128,
    }.items():
        yield Wrong(function, "dtype", kind, be(value), DtypeError)


PLACES = ("first", "last", "random")


def plant(value: float, place: str, part: str = "all") -> Callable[[Tensor], Tensor]:
    """Put one value into a copy: anywhere, or in one triangle of its last two dimensions."""

    def made(x: Tensor) -> Tensor:
        x = x.clone()
        inside = torch.ones_like(x, dtype=torch.bool)
        if part == "upper":
            inside = inside.triu(1)
        elif part == "lower":
            inside = inside.tril(-1)
        candidates = inside.nonzero()
        generator = torch.Generator().manual_seed(len(candidates))
        random = int(torch.randint(len(candidates), (), generator=generator))
        at = {"first": 0, "last": -1, "random": random}[place]
        x[tuple(candidates[at].tolist())] = value
        return x

    return made


def wrong_values(
    function: str,
    argument: str,
    *,
    parts: tuple[str, ...] = ("all",),
    error: type[LobsError] = NonFiniteError,
    values: tuple[float, ...] = (NAN, INF, -INF),
    backends: tuple[str | None, ...] = (None,),
    inside: str = "",
    named: str = "",
    also: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[Wrong]:
    """A NaN or an infinity at the first, the last and a random index."""
    for value in values:
        for place in PLACES:
            for part in parts:
                for backend in backends:
                    words = [f"{value:g} at {place}", *([] if part == "all" else [part])]
                    words += [inside] if inside else []
                    words += [backend] if backend else []
                    planted = plant(value, place, part)
                    yield Wrong(
                        function,
                        argument,
                        " ".join(words),
                        (lambda d, p=planted: {**d, inside: p(d[inside])}) if inside else planted,
                        error,
                        named,
                        {**(also or {}), **({"backend": be(backend)} if backend else {})},
                    )


# ---- layouts: the same values at other places in memory ------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """Columns contiguous instead of rows; for vectors, every second entry of a longer one."""
    return x.mT.contiguous().mT if x.ndim > 1 else strided(x)


def strided(x: Tensor) -> Tensor:
    """Every second entry in each dimension; between them lies what must not be read."""
    fill = True if x.dtype == torch.bool else (NAN if x.is_floating_point() else 77)
    wide = torch.full([2 * size for size in x.shape], fill, dtype=x.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def sliced(x: Tensor) -> Tensor:
    """Rows of a wider matrix, starting one element into its storage."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    view = wide[..., 1 : 1 + x.shape[-1]]
    view.copy_(x)
    return view


def misaligned(x: Tensor, offset: int = 1) -> Tensor:
    """At an address that is not a multiple of the element size."""
    memory = bytearray(offset) + bytearray(x.contiguous().numpy().tobytes())
    return torch.frombuffer(memory, dtype=x.dtype, offset=offset).reshape(x.shape)


def negated(x: Tensor) -> Tensor:
    """A view whose values torch negates when it reads them."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def same(x: Any) -> Any:
    return x


Make = Callable[[Tensor], Any]
LAYOUTS: dict[str, tuple[Make, Make]] = {  # kind: (odd, the plain tensor of the same values)
    "transposed": (transposed, same),
    "every other": (strided, same),
    "sliced": (sliced, same),
    "expanded": (expanded, lambda x: expanded(x).contiguous()),
    "misaligned": (misaligned, same),
    "misaligned by 2": (lambda x: misaligned(x, 2), same),
    "negated": (negated, same),
    "negated and misaligned": (lambda x: misaligned(-x)._neg_view(), same),
    "requires grad": (lambda x: x.clone().requires_grad_(), same),
    "Parameter": (torch.nn.Parameter, same),
    "computed from a Parameter": (lambda x: torch.nn.Parameter(x) * 1, same),
    "inference": (lambda x: _inference(x), same),
    "array": (lambda x: x.numpy().copy(), same),
    "read-only array": (lambda x: _read_only(x), same),
    "array in columns": (lambda x: np.asfortranarray(x.numpy()), same),
}


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _read_only(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Right:
    """A documented right answer: ``odd`` gives the same bytes as ``plain``."""

    function: str
    argument: str
    kind: str
    odd: Callable[[Any], Any]
    plain: Callable[[Any], Any]
    also: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.function}-{self.argument}-{self.kind}"


def right_layouts(
    function: str,
    argument: str,
    *,
    skip: tuple[str, ...] = (),
    inside: str = "",
    also: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[Right]:
    good = FUNCTIONS[function].good()[argument]
    good = good[inside] if inside else good
    for kind, (odd, plain) in LAYOUTS.items():
        if kind in skip:
            continue
        if not good.is_floating_point() and ("grad" in kind or "negat" in kind or "Param" in kind):
            continue
        if good.element_size() == 1 and kind.startswith("misaligned"):
            continue  # a byte is never misaligned
        if inside:
            yield Right(
                function,
                argument,
                f"{inside} {kind}",
                lambda d, odd=odd: {**d, inside: odd(d[inside])},
                lambda d, plain=plain: {**d, inside: plain(d[inside])},
                dict(also or {}),
            )
        else:
            yield Right(function, argument, kind, odd, plain, dict(also or {}))


# ---- the tables ----------------------------------------------------------------------------------


BOTH = ("cpu", "reference")
LENGTH = ("none in dim 0", "one more in dim 0")  # where any number of rows is right
UNKNOWN_BACKENDS = ("", "tpu", "cpu_v9", "CPU", "cuda", "cpu\0", "\ud800")
PLAIN = {"bias": be(None), "prune_bias": be(False), "hessian": be(moment())}
# Everything is removed, so that every entry of A matters.
ALL_REMOVED = {
    "order": be(torch.arange(C, dtype=torch.int32).repeat(R)),
    "start": be(torch.arange(R + 1) * C),
}


def wrong_hessian() -> Iterator[Wrong]:
    yield from wrong_counts("Hessian", "columns")
    yield from wrong_flags("Hessian", "bias")
    yield from wrong_dtypes("Hessian")
    yield from wrong_devices("Hessian")

    update = "Hessian.update"
    yield from wrong_tensors(update, "x")
    yield from wrong_tensors(update, "weights", skip=("None", "bool", "int64"))
    yield from wrong_values(update, "x")
    yield from wrong_values(update, "weights")
    yield from wrong_values(update, "weights", values=(-1.0, -1e-30), error=ArgumentError)
    yield Wrong(update, "weights", "for 2 x N rows", lambda w: torch.cat([w, w]), ShapeError)

    merge = "Hessian.merge"
    for kind, value in {"None": None, "str": "h", "tensor": moment(), "state": state()}.items():
        yield Wrong(merge, "other", kind, be(value), DtypeError)
    yield Wrong(merge, "other", "more columns", lambda _: seen(C + 1), ShapeError)
    yield Wrong(merge, "other", "with a bias", lambda _: seen(C, bias=True), ShapeError)
    yield Wrong(merge, "other", "as many with a bias", lambda _: seen(C - 1, bias=True), ShapeError)

    matrix = "Hessian.matrix"
    empty = {"nothing seen": lobs.Hessian(C)}
    empty["weights of zero only"] = lobs.Hessian(C).update(torch.ones(N, C), torch.zeros(N))
    empty["no rows seen"] = lobs.Hessian(C).update(torch.ones(0, C))
    for kind, h in empty.items():
        yield Wrong(matrix, "self", kind, be(h), LobsError, "hessian")
    over = lobs.Hessian(C).update(torch.full((2, C), 1e200, dtype=torch.float64))
    yield Wrong(matrix, "self", "overflowed", be(over), NonFiniteError, "hessian")
    over = lobs.Hessian(C, dtype=torch.float32).update(torch.full((2, C), 1e30))
    yield Wrong(matrix, "self", "overflowed float32", be(over), NonFiniteError, "float32")

    load = "Hessian.load_state_dict"
    for kind, value in {"None": None, "str": "sum", "list": [], "tensor": moment()}.items():
        yield Wrong(load, "state", kind, be(value), DtypeError)
    for kind, value in {
        "empty": {},
        "without rows": {k: v for k, v in state().items() if k != "rows"},
        "one key more": state(columns=torch.tensor(C)),
        "keys of mixed types": {**state(), 1: torch.tensor(C)},
    }.items():
        yield Wrong(load, "state", kind, be(value), ArgumentError)
    yield from wrong_tensors(load, "state", inside="sum", named="state['sum']")
    both = ("upper", "lower")
    yield from wrong_values(load, "state", inside="sum", parts=("all", *both), named="state['sum']")
    yield Wrong(
        load,
        "state",
        "sum with a negative diagonal",
        lambda s: {**s, "sum": -s["sum"]},
        NotPositiveDefiniteError,
        "state['sum']",
    )
    for kind, value, error in (
        ("None", None, DtypeError),
        ("str", "20", DtypeError),
        ("two numbers", torch.ones(2), DtypeError),
        ("meta", torch.ones((), device="meta"), DtypeError),
        ("complex", torch.tensor(1j), DtypeError),
        ("NaN", torch.tensor(NAN), ArgumentError),
        ("Inf", torch.tensor(INF), ArgumentError),
        ("negative", torch.tensor(-1.0), ArgumentError),
        ("huge int", HUGE, ArgumentError),
    ):
        yield Wrong(
            load,
            "state",
            f"rows {kind}",
            lambda s, v=value: {**s, "rows": v},
            error,
            "state['rows']",
        )
    for kind, value, error in (
        ("None", None, DtypeError),
        ("str", "", DtypeError),
        ("list", [], DtypeError),
        ("two flags", torch.tensor([False, False]), DtypeError),
        ("meta", torch.tensor(False, device="meta"), DtypeError),
        ("the other one", torch.tensor(True), ShapeError),
    ):
        yield Wrong(
            load, "state", f"bias {kind}", lambda s, v=value: {**s, "bias": v}, error, "bias"
        )

    yield from wrong_moments("Hessian.from_matrix", "H")
    yield from wrong_numbers("Hessian.from_matrix", "rows")


def wrong_moments(function: str, argument: str) -> Iterator[Wrong]:
    """What is wrong for a second moment given as a matrix."""
    yield from wrong_tensors(function, argument)
    yield from wrong_values(function, argument, parts=("all", "upper", "lower"))
    for value in (NAN, INF):
        for place in (0, -1):

            def diagonal(H: Tensor, value: float = value, place: int = place) -> Tensor:
                H[place, place] = value
                return H

            yield Wrong(
                function, argument, f"{value} on the diagonal {place}", diagonal, NonFiniteError
            )
    yield Wrong(function, argument, "one triangle", lambda H: H.tril(), ArgumentError)
    yield Wrong(function, argument, "antisymmetric", lambda H: H.tril() - H.triu(1), ArgumentError)
    yield Wrong(function, argument, "negative", lambda H: -H, NotPositiveDefiniteError)
    yield Wrong(
        function,
        argument,
        "one negative diagonal entry",
        lambda H: H - torch.diag(torch.eye(len(H), dtype=H.dtype)[-1] * 2 * H[-1, -1]),
        NotPositiveDefiniteError,
    )


def wrong_streaming() -> Iterator[Wrong]:
    yield from wrong_counts("StreamingInverse", "columns")
    yield from wrong_counts("StreamingInverse", "blocks")
    yield Wrong("StreamingInverse", "blocks", "more than columns", be(C + 1), ArgumentError)
    yield Wrong("StreamingInverse", "blocks", "one left empty", be(3), ArgumentError)
    yield from wrong_numbers("StreamingInverse", "rows")
    yield from wrong_numbers("StreamingInverse", "alpha")
    yield from wrong_dtypes("StreamingInverse")
    yield from wrong_devices("StreamingInverse")
    update = "StreamingInverse.update"
    yield from wrong_tensors(update, "x", skip=LENGTH)
    yield from wrong_values(update, "x")
    yield Wrong(update, "x", "vector too long", be(torch.ones(C + 1)), ShapeError)
    small = lobs.StreamingInverse(C, rows=10.0, alpha=10.0, dtype=torch.float32)
    yield Wrong(
        update,
        "x",
        "too large for float32",
        lambda x: x + 1e39,
        NonFiniteError,
        also={"self": be(small)},
    )


def wrong_prune() -> Iterator[Wrong]:
    prune = "prune_weight"
    yield from wrong_tensors(prune, "weight")
    yield from wrong_values(prune, "weight")
    for method in ("magnitude", "wanda"):
        yield Wrong(
            prune,
            "weight",
            f"NaN for {method}",
            plant(NAN, "random"),
            NonFiniteError,
            also={"method": be(method)},
        )
    yield from wrong_moments(prune, "hessian")
    yield Wrong(prune, "hessian", "of one column more", be(moment(C + 2)), ShapeError)
    yield Wrong(prune, "hessian", "without the ones column", be(moment()), ShapeError)
    yield Wrong(
        prune,
        "hessian",
        "ones column but no bias",
        be(moment(C + 1)),
        ShapeError,
        also={"bias": be(None), "prune_bias": be(False)},
    )
    yield Wrong(prune, "hessian", "Hessian too wide", lambda _: seen(C + 2), ShapeError)
    yield Wrong(prune, "hessian", "Hessian without bias", lambda _: seen(C), ShapeError)
    yield Wrong(prune, "hessian", "empty Hessian", lambda _: lobs.Hessian(C, bias=True), LobsError)
    over = lobs.Hessian(C, bias=True).update(torch.full((2, C), 1e200, dtype=torch.float64))
    yield Wrong(prune, "hessian", "overflowed Hessian", be(over), NonFiniteError)
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    yield Wrong(
        prune,
        "hessian",
        "indefinite",
        be(indefinite),
        NotPositiveDefiniteError,
        also={"weight": be(torch.ones(3, 2)), **PLAIN, "hessian": be(indefinite), "mask": be(None)},
    )

    yield from wrong_tensors(prune, "bias", skip=("None",))
    yield Wrong(
        prune,
        "bias",
        "None but prune_bias",
        be(None),
        ArgumentError,
        also={"hessian": be(moment())},
    )
    yield from wrong_values(prune, "bias")
    yield from wrong_tensors(prune, "mask", skip=("None",))
    yield Wrong(prune, "mask", "uint8", lambda m: m.to(torch.uint8), DtypeError)
    for scope in ("layer", "row"):
        yield Wrong(
            prune,
            "mask",
            f"removes more than was asked for, {scope}",
            torch.zeros_like,
            ArgumentError,
            also={"scope": be(scope)},
        )

    yield from wrong_numbers(prune, "sparsity", low=-1e-300, none=False)
    yield Wrong(prune, "sparsity", "above 1", be(1 + 1e-15), ArgumentError)
    yield Wrong(prune, "sparsity", "percent", be(50), ArgumentError)
    yield Wrong(
        prune, "sparsity", "None and no other", be(None), ArgumentError, also={"mask": be(None)}
    )
    for target in ("max_error", "threshold"):
        alone = {"sparsity": be(None)}
        for case in wrong_numbers(prune, target, low=-1e-300, high=False, none=False):
            yield Wrong(prune, target, case.kind, case.make, case.error, also=alone)
        yield Wrong(prune, target, "and sparsity", be(1.0), ArgumentError)
    yield Wrong(
        prune,
        "threshold",
        "and max_error",
        be(1.0),
        ArgumentError,
        also={"sparsity": be(None), "max_error": be(1.0)},
    )
    for method in ("magnitude", "wanda"):
        yield Wrong(
            prune,
            "threshold",
            f"with {method}",
            be(1.0),
            ArgumentError,
            also={"sparsity": be(None), "method": be(method)},
        )

    for method in ("lobs", "magnitude"):
        for case in wrong_numbers(prune, "damping", low=-1e-300):
            yield Wrong(
                prune,
                "damping",
                f"{case.kind} {method}",
                case.make,
                case.error,
                also={"method": be(method)},
            )
    yield from wrong_names(prune, "method", ("", "LOBS", "obs", "magnitude "), ArgumentError)
    yield from wrong_names(prune, "scope", ("", "Layer", "model", "column"), ArgumentError)
    yield from wrong_names(prune, "pattern", ("", "5:4", "4:8", "1x5", "block"), PatternError)
    yield from wrong_names(prune, "refine", ("", "Solve", "both", "None"), ArgumentError)
    yield from wrong_flags_as_names(prune, "refine")
    yield Wrong(
        prune,
        "refine",
        "exchange of blocks",
        be("exchange"),
        PatternError,
        also={**PLAIN, "mask": be(None), "pattern": be("1x2")},
    )
    yield from wrong_counts(prune, "memory", none=False, high=False)
    yield from wrong_names(prune, "backend", UNKNOWN_BACKENDS, BackendError)
    for argument in ("method", "scope", "pattern"):
        yield Wrong(prune, argument, "None", be(None), DtypeError)
    yield from wrong_flags(prune, "prune_bias")


def wrong_trace() -> Iterator[Wrong]:
    trace = "trace_weight"
    yield from wrong_tensors(trace, "weight")
    yield from wrong_values(trace, "weight")
    yield from wrong_moments(trace, "hessian")
    yield Wrong(trace, "hessian", "without the ones column", be(moment()), ShapeError)
    yield Wrong(trace, "hessian", "Hessian too wide", lambda _: seen(C + 2), ShapeError)
    yield Wrong(trace, "hessian", "empty Hessian", lambda _: lobs.Hessian(C, bias=True), LobsError)
    yield from wrong_tensors(trace, "bias", skip=("None",))
    yield from wrong_values(trace, "bias")
    yield from wrong_tensors(trace, "mask", skip=("None",))
    yield from wrong_numbers(trace, "until")
    yield Wrong(trace, "until", "above 1", be(1 + 1e-15), ArgumentError)
    yield from wrong_numbers(trace, "damping", low=-1e-300)
    yield from wrong_names(trace, "method", ("", "EXACT", "sweep", "lobs"), ArgumentError)
    yield from wrong_names(trace, "pattern", ("", "3:5", "4:8", "1x5", "block"), PatternError)
    yield from wrong_names(trace, "backend", UNKNOWN_BACKENDS, BackendError)
    for argument in ("method", "pattern"):
        yield Wrong(trace, argument, "None", be(None), DtypeError)
    yield from wrong_flags(trace, "prune_bias")
    yield from wrong_counts(trace, "memory", none=False, high=False)

    at = "WeightTrace.at"
    yield from wrong_numbers(at, "sparsity", low=-1e-300)
    yield Wrong(at, "sparsity", "above 1", be(1 + 1e-15), ArgumentError)
    curve = "WeightTrace.curve"
    for function in (at, curve):
        yield from wrong_names(function, "scope", ("", "Layer", "column"), ArgumentError)
        yield Wrong(function, "scope", "None", be(None), DtypeError)
    yield from wrong_counts(curve, "points", high=False)

    plan = "plan_memory"
    yield from wrong_counts(plan, "rows", high=False)
    yield from wrong_counts(plan, "columns", high=False)
    yield from wrong_numbers(plan, "sparsity", low=-1e-300)
    for kind, value in {"None": None, "str": "float32", "int64": torch.int64}.items():
        yield Wrong(plan, "dtype", kind, be(value), DtypeError)
    yield from wrong_names(plan, "method", ("", "Exact"), ArgumentError)
    yield Wrong(plan, "method", "None", be(None), DtypeError)
    yield from wrong_flags(plan, "bias")
    yield from wrong_counts(plan, "memory", none=False, high=False)
    yield from wrong_names(plan, "backend", UNKNOWN_BACKENDS, BackendError)


def wrong_kernels() -> Iterator[Wrong]:
    """Removal, solves, exchanges and sweep, as operations."""
    exact = "exact_trace"
    yield from wrong_tensors(exact, "W")
    yield from wrong_values(exact, "W", backends=BOTH)
    yield Wrong(exact, "W", "int16 and not written", lambda W: W.to(torch.int16), DtypeError)
    yield from wrong_tensors(exact, "A")
    yield Wrong(exact, "A", "other dtype than W", lambda A: A.float(), DtypeError)
    yield from wrong_values(exact, "A", parts=("all", "upper", "lower"), backends=BOTH)
    yield from wrong_tensors(exact, "state", skip=("None",))
    yield Wrong(exact, "state", "3", lambda state: state + 1, ArgumentError)
    yield Wrong(
        exact,
        "state",
        "uneven in a block",
        same,
        ArgumentError,
        also={"group": be(0), "per_group": be(0), "block": be(2)},
    )
    yield from wrong_counts(exact, "limit", none=False, zero=False, high=False)
    yield from wrong_numbers(exact, "stop", low=-1e-300, high=False)
    yield from wrong_counts(exact, "block")
    yield Wrong(exact, "block", "and group", be(2), ArgumentError)
    yield from wrong_counts(exact, "group", zero=False, high=False)
    yield from wrong_counts(exact, "per_group", zero=False)
    yield Wrong(exact, "per_group", "more than group", be(3), ArgumentError)
    yield from wrong_flags(exact, "update")
    yield from wrong_counts(exact, "memory", none=False, high=False)

    for function in ("exact_bytes", "affordable_threads"):
        yield from wrong_counts(function, "columns", high=False)
        yield from wrong_dtypes(function)
    size = "exact_bytes"
    yield from wrong_counts(size, "limit", none=False, zero=False, high=False)
    yield from wrong_counts(size, "block")
    yield from wrong_counts(size, "group", zero=False, high=False)
    for limit in ("rows", "memory"):
        yield from wrong_counts("affordable_threads", limit, none=limit == "rows", high=False)

    solve = "support_solve_"
    yield from wrong_tensors(solve, "X")
    yield from wrong_values(solve, "X", backends=BOTH)
    yield from wrong_tensors(solve, "M")
    yield Wrong(solve, "M", "other dtype than X", lambda M: M.float(), DtypeError)
    yield from wrong_values(solve, "M", parts=("all", "upper", "lower"), backends=BOTH)
    yield from wrong_tensors(solve, "chosen")
    yield Wrong(solve, "chosen", "uint8", lambda m: m.to(torch.uint8), DtypeError)

    swap = "exchange_"
    yield from wrong_tensors(swap, "W")
    yield Wrong(swap, "W", "float32", lambda W: W.float(), DtypeError)
    yield from wrong_values(swap, "W", backends=BOTH)
    yield from wrong_tensors(swap, "A")
    yield Wrong(swap, "A", "float32", lambda A: A.float(), DtypeError)
    yield from wrong_values(swap, "A", parts=("all", "upper", "lower"), backends=BOTH)
    yield from wrong_tensors(swap, "kept")
    yield Wrong(swap, "kept", "uint8", lambda m: m.to(torch.uint8), DtypeError)
    yield from wrong_tensors(swap, "fixed", skip=("None",))
    yield from wrong_counts(swap, "group", zero=False, high=False)
    yield from wrong_counts(swap, "limit", none=False, zero=False, high=False)

    sweep = "sweep_block_"
    yield from wrong_tensors(sweep, "W")
    yield from wrong_tensors(sweep, "U")
    yield Wrong(sweep, "U", "other dtype than W", lambda U: U.float(), DtypeError)
    for value in (NAN, 0.0, -1.0, -INF):
        for place in (0, C - 1):
            for backend in BOTH:

                def diagonal(U: Tensor, value: float = value, place: int = place) -> Tensor:
                    U[place, place] = value
                    return U

                yield Wrong(
                    sweep,
                    "U",
                    f"{value} on the diagonal {place} {backend}",
                    diagonal,
                    NotPositiveDefiniteError,
                    also={"backend": be(backend)},
                )
    yield from wrong_tensors(sweep, "gone")
    yield from wrong_tensors(sweep, "E")
    yield from wrong_counts(sweep, "group", zero=False)
    yield Wrong(sweep, "group", "that does not divide the block", be(3), ArgumentError)
    yield from wrong_counts(sweep, "per_group", zero=False, named="group")

    for function in (exact, size, "affordable_threads", solve, swap, sweep):
        yield from wrong_names(function, "backend", UNKNOWN_BACKENDS, BackendError)

    # The output's own memory as an input: the result would depend on the order of writing.
    for function, output, argument, make in (
        (exact, "W", "A", lambda W: W[:C]),
        (exact, "W", "A", lambda W: W[1 : 1 + C]),
        (solve, "X", "M", lambda X: X[:C]),
        (swap, "W", "A", lambda W: W[:C]),
        (swap, "kept", "fixed", lambda kept: kept),
        (sweep, "W", "U", lambda W: W[:C]),
        (sweep, "E", "U", lambda E: E[:C]),
        (sweep, "W", "E", lambda W: W),
    ):
        good = FUNCTIONS[function].good()[output]
        shared = good.abs() + 1 if good.is_floating_point() else good
        yield Wrong(
            function,
            argument,
            f"overlaps {output} at {make(shared).storage_offset()}",
            be(make(shared)),
            ShapeError,
            also={output: be(shared)},
        )


def wrong_ops() -> Iterator[Wrong]:
    accumulate = "hessian_accumulate_"
    yield from wrong_tensors(accumulate, "H")
    yield from wrong_tensors(accumulate, "X")
    yield from wrong_tensors(accumulate, "weights", skip=("None", "bool", "int64"))
    yield Wrong(accumulate, "weights", "a column", lambda w: w[:, None].clone(), ShapeError)
    yield from wrong_values(accumulate, "X", backends=BOTH)
    yield from wrong_values(accumulate, "weights", backends=BOTH)
    yield from wrong_values(accumulate, "weights", values=(-1.0,), error=ArgumentError)
    yield from wrong_flags(accumulate, "ones")
    yield from wrong_names(accumulate, "backend", UNKNOWN_BACKENDS, BackendError)

    update = "inverse_update_"
    yield from wrong_tensors(update, "F")
    yield from wrong_tensors(update, "G", skip=LENGTH)
    yield Wrong(update, "G", "other dtype than F", lambda G: G.float(), DtypeError)
    yield Wrong(update, "G", "a block too narrow", lambda G: G[:, :3].clone(), ShapeError)
    yield from wrong_values(update, "G", backends=BOTH)
    # One block: with more, the sound ones are updated before the error, as documented.
    one = {"F": lambda F: F[:1].clone(), "G": lambda G: G[:, :3].clone()}
    yield from wrong_values(
        update,
        "F",
        parts=("all", "upper", "lower"),
        error=NotPositiveDefiniteError,
        backends=BOTH,
        also=one,
    )
    big = {"F": be(torch.eye(513)[None]), "G": be(torch.ones(2, 513))}
    for value in (NAN, INF):
        yield Wrong(
            update,
            "G",
            f"{value} in a large block",
            be(plant(value, "random")(torch.ones(2, 513))),
            NonFiniteError,
            also={"F": big["F"]},
        )
        yield Wrong(
            update,
            "F",
            f"{value} in a large block",
            be(plant(value, "random")(torch.eye(513)[None])),
            NotPositiveDefiniteError,
            also={"G": big["G"]},
        )
    yield Wrong(update, "F", "indefinite", lambda F: -F, NotPositiveDefiniteError)
    yield from wrong_numbers(update, "m")
    yield from wrong_names(update, "backend", UNKNOWN_BACKENDS, BackendError)

    argmin = "saliency_argmin"
    yield from wrong_tensors(argmin, "W")
    yield Wrong(argmin, "W", "float16", lambda W: W.half(), DtypeError)
    yield from wrong_tensors(argmin, "diag")
    yield Wrong(argmin, "diag", "other dtype than W", lambda d: d.double(), DtypeError)
    yield Wrong(argmin, "diag", "one per row", be(torch.ones(R)), ShapeError)
    yield from wrong_tensors(argmin, "live")
    yield Wrong(argmin, "live", "uint8", lambda m: m.to(torch.uint8), DtypeError)
    yield Wrong(argmin, "live", "one per row", be(torch.ones(R, dtype=torch.bool)), ShapeError)
    yield from wrong_values(argmin, "W", backends=BOTH)
    yield from wrong_values(
        argmin,
        "diag",
        values=(NAN, INF, -INF, 0.0, -0.0, -1.0),
        error=NotPositiveDefiniteError,
        backends=BOTH,
    )
    yield from wrong_names(argmin, "backend", UNKNOWN_BACKENDS, BackendError)

    static = "static_order_prune_"
    yield from wrong_tensors(static, "W")
    yield from wrong_tensors(static, "A")
    yield Wrong(static, "A", "other dtype than W", lambda A: A.float(), DtypeError)
    yield from wrong_tensors(static, "order", skip=LENGTH)
    yield Wrong(static, "order", "one more", grown(0), ArgumentError)
    yield Wrong(static, "order", "none", emptied(0), ArgumentError)
    yield Wrong(static, "order", "int64", lambda order: order.long(), DtypeError)
    yield from wrong_tensors(static, "start")
    yield Wrong(static, "start", "int32", lambda start: start.int(), DtypeError)
    off_diagonal = ("upper", "lower")
    yield from wrong_values(static, "W", backends=BOTH, also=ALL_REMOVED)
    yield from wrong_values(static, "A", parts=off_diagonal, backends=BOTH, also=ALL_REMOVED)
    for value, error in (
        (NAN, NonFiniteError),
        (-INF, NonFiniteError),
        (0.0, NotPositiveDefiniteError),
        (-1.0, NotPositiveDefiniteError),
        (INF, NonFiniteError),
    ):
        for place in (0, C - 1):
            for backend in BOTH:

                def diagonal(A: Tensor, value: float = value, place: int = place) -> Tensor:
                    A[place, place] = value
                    return A

                yield Wrong(
                    static,
                    "A",
                    f"{value} on the diagonal {place} {backend}",
                    diagonal,
                    error,
                    also={**ALL_REMOVED, "backend": be(backend)},
                )
    for kind, order in {
        "negative": [-1, 1, 2, 3, 2, 0, 3, 1],
        "most negative": [-(2**31), 1, 2, 3, 2, 0, 3, 1],
        "beyond the last column": [0, 1, 2, 3, 2, 0, 3, C],
        "largest int32": [0, 1, 2, 3, 2, 0, 3, 2**31 - 1],
        "twice in one row": [0, 1, 0, 3, 2, 0, 3, 1],
    }.items():
        value = torch.tensor(order, dtype=torch.int32)
        yield Wrong(static, "order", kind, be(value), ArgumentError)
    for kind, start in {
        "not from zero": [1, 4, 4, 6, 7, 8],
        "negative": [-1, 4, 4, 6, 7, 8],
        "falls": [0, 4, 3, 6, 7, 8],
        "ends early": [0, 4, 4, 6, 7, 7],
        "ends late": [0, 4, 4, 6, 7, 9],
        "largest int64": [0, 2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1, 8],
    }.items():
        yield Wrong(static, "start", kind, be(torch.tensor(start)), ArgumentError)
    yield from wrong_names(static, "backend", UNKNOWN_BACKENDS, BackendError)

    # The output's own memory as an input: the result would depend on the order of writing.
    for function, output, argument, make in (
        (accumulate, "H", "X", lambda H: H[:, :C]),
        (update, "F", "G", lambda F: F.view(3, 6)),
        (static, "W", "A", lambda W: W[:C]),
        (static, "W", "A", lambda W: W[1 : 1 + C]),
    ):
        shared = FUNCTIONS[function].good()[output].abs()
        yield Wrong(
            function,
            argument,
            f"overlaps {output} at {make(shared).storage_offset()}",
            be(make(shared)),
            ShapeError,
            also={output: be(shared), **({"weights": be(None)} if output == "H" else {})},
        )
    shared = torch.zeros(N, N, dtype=torch.float64)
    yield Wrong(
        accumulate,
        "weights",
        "overlaps H",
        be(shared[0]),
        ShapeError,
        also={"H": be(shared), "X": be(torch.ones(N, N)), "ones": be(False)},
    )


def right_answers() -> Iterator[Right]:
    yield from right_layouts("Hessian.update", "x")
    yield from right_layouts("Hessian.update", "weights")
    yield from right_layouts("Hessian.from_matrix", "H", skip=("expanded",))
    yield from right_layouts("Hessian.load_state_dict", "state", inside="sum")
    yield from right_layouts("StreamingInverse.update", "x")
    yield from right_layouts("hessian_accumulate_", "X")
    yield from right_layouts("hessian_accumulate_", "weights")
    yield from right_layouts("inverse_update_", "G")
    for argument in ("W", "diag", "live"):
        yield from right_layouts("saliency_argmin", argument)
    yield from right_layouts("static_order_prune_", "A", skip=("expanded",))
    for argument in ("order", "start"):
        yield from right_layouts("static_order_prune_", argument, skip=("expanded",))
    for function in ("prune_weight", "trace_weight"):
        for argument in ("weight", "bias", "mask"):
            yield from right_layouts(function, argument)
        yield from right_layouts(function, "hessian", skip=("expanded",))
    yield from right_layouts("exact_trace", "A", skip=("expanded",))
    yield from right_layouts("exact_trace", "state")
    yield from right_layouts("support_solve_", "M", skip=("expanded",))
    yield from right_layouts("support_solve_", "chosen")
    yield from right_layouts("exchange_", "A", skip=("expanded",))
    yield from right_layouts("exchange_", "fixed")
    yield from right_layouts("sweep_block_", "U", skip=("expanded",))
    for argument in ("W", "E"):  # a block of columns of a wider matrix
        yield Right("sweep_block_", argument, "sliced", sliced, same)

    # Expanded where the general maker does not fit: a constant matrix, one column for every row.
    constant = {"odd": be(torch.ones(1, 1).expand(C, C)), "plain": be(torch.ones(C, C))}
    yield Right("Hessian.from_matrix", "H", "expanded", **constant)
    yield Right("prune_weight", "hessian", "expanded", **constant, also=PLAIN)
    yield Right(
        "static_order_prune_",
        "A",
        "expanded",
        **{
            k: (lambda _, f=f: f(_).double())
            if k == "plain"
            else be(torch.ones(1, 1, dtype=torch.float64).expand(C, C))
            for k, f in constant.items()
        },
    )
    yield Right(
        "static_order_prune_",
        "order",
        "expanded",
        be(torch.tensor([2], dtype=torch.int32).expand(R)),
        be(torch.full((R,), 2, dtype=torch.int32)),
        {"start": be(torch.arange(R + 1))},
    )
    yield Right(
        "static_order_prune_",
        "start",
        "expanded",
        be(torch.tensor([0]).expand(R + 1)),
        be(torch.zeros(R + 1, dtype=torch.int64)),
        {"order": be(torch.zeros(0, dtype=torch.int32))},
    )
    yield Right("saliency_argmin", "diag", "shared by all rows", lambda d: d[0].clone(), expanded)
    yield Right("saliency_argmin", "live", "shared by all rows", lambda d: d[0].clone(), expanded)

    # Nothing to do.
    for function, argument in (("Hessian.update", "x"), ("hessian_accumulate_", "X")):
        none = {"weights": be(None)}
        yield Right(function, argument, "no rows", emptied(0), lambda x: torch.empty(0, C), none)
    yield Right(
        "Hessian.update",
        "x",
        "no rows in 3 dimensions",
        be(torch.ones(2, 0, C)),
        emptied(0),
        {"weights": be(None)},
    )
    yield Right("inverse_update_", "G", "no samples", emptied(0), lambda G: G[:0])

    # What is never read may hold anything.
    for value in (NAN, INF):
        hidden = {"weights": be(torch.tensor([0.0, 1, 1, 1, 1, 1, 0]))}
        for function, argument in (("Hessian.update", "x"), ("hessian_accumulate_", "X")):
            for place in ("first", "last"):
                yield Right(
                    function,
                    argument,
                    f"{value} at {place}, weight 0",
                    plant(value, place),
                    same,
                    hidden,
                )
        for backend in BOTH:
            on = {"backend": be(backend)}
            dead = torch.ones(R, C, dtype=torch.bool)
            dead[0, 0] = dead[-1, -1] = False
            for argument in ("W", "diag"):
                for place in ("first", "last"):
                    yield Right(
                        "saliency_argmin",
                        argument,
                        f"{value} at {place}, not live, {backend}",
                        plant(value, place),
                        same,
                        {**on, "live": be(dead)},
                    )

    # Other types that the documentation lists.
    for kind, dtype in {
        "bool": torch.bool,
        "int64": torch.int64,
        "uint8": torch.uint8,
        "int32": torch.int32,
    }.items():
        ints = torch.tensor([0, 1, 1, 0, 1, 1, 1])
        for function in ("Hessian.update", "hessian_accumulate_"):
            yield Right(function, "weights", kind, be(ints.to(dtype)), be(ints.double()))
    yield Right("Hessian.update", "weights", "None", be(None), be(torch.ones(N)))
    yield Right(
        "Hessian.update",
        "x",
        "3 dimensions",
        lambda x: x.reshape(N, 1, C),
        same,
        {"weights": be(None)},
    )
    for kind, value in {
        "tensor": torch.tensor(0.5, dtype=torch.float64),
        "float32 tensor": torch.tensor(0.5),
        "tensor that requires grad": torch.tensor(0.5, requires_grad=True),
        "array scalar": np.float32(0.5),
    }.items():
        yield Right("prune_weight", "sparsity", kind, be(value), be(0.5))
    yield Right("prune_weight", "sparsity", "int", be(1), be(1.0))
    yield Right("prune_weight", "damping", "int", be(1), be(1.0))
    nothing = {"sparsity": be(None), "mask": be(None)}
    yield Right("prune_weight", "max_error", "infinite", be(INF), be(1e300), nothing)
    yield Right("prune_weight", "threshold", "infinite", be(INF), be(1e300), nothing)
    for function, argument in (
        ("exact_trace", "limit"),
        ("exchange_", "limit"),
        ("exact_bytes", "limit"),
    ):
        yield Right(function, argument, "more than there are columns", be(2**62), be(64))
        yield Right(function, argument, "beyond 64 bits", be(HUGE), be(64))
        yield Right(function, argument, "array scalar", be(np.int64(3)), be(3))
    yield Right("exact_trace", "stop", "infinite", be(INF), be(1e300))
    yield Right("exact_trace", "state", "None", be(None), torch.zeros_like)
    yield Right("exchange_", "fixed", "None", be(None), torch.zeros_like)
    for function in ("exact_trace", "exchange_"):
        one = {"per_group": be(1)} if function == "exact_trace" else {}
        for kind, value in {"beyond any memory": 2**62, "beyond 64 bits": HUGE}.items():
            yield Right(function, "group", f"{kind}", be(value), be(1000), one)
    for function in ("prune_weight", "trace_weight", "exact_trace", "affordable_threads"):
        for kind, value in {"plenty": 2**62, "beyond 64 bits": HUGE}.items():
            exact = {"method": be("exact")} if function == "prune_weight" else {}
            yield Right(function, "memory", kind, be(value), be(None), exact)
    yield Right("WeightTrace.curve", "points", "beyond 64 bits", be(HUGE), be(1000))
    yield Right("WeightTrace.at", "sparsity", "tensor", be(torch.tensor(0.5)), be(0.5))
    yield Right("Hessian", "columns", "array scalar", be(np.int64(C)), be(C))
    yield Right("Hessian", "columns", "tensor", be(torch.tensor(C)), be(C))


WRONG = [
    *wrong_hessian(),
    *wrong_streaming(),
    *wrong_prune(),
    *wrong_trace(),
    *wrong_ops(),
    *wrong_kernels(),
]
RIGHT = list(right_answers())


# ---- tests ---------------------------------------------------------------------------------------


def arguments_of(case: Wrong | Right, make: Callable[[Any], Any]) -> dict[str, Any]:
    arguments = FUNCTIONS[case.function].good()
    for name, further in case.also.items():
        arguments[name] = further(arguments[name])
    arguments[case.argument] = make(arguments[case.argument])
    return arguments


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_valid_arguments_of_the_table_are_accepted(name):
    outcome(name, FUNCTIONS[name].good())


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_wrong_argument_is_refused_by_name_and_nothing_changes(case):
    arguments = arguments_of(case, case.make)
    before = {name: print_of(value) for name, value in arguments.items()}
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the type is compared below, exactly)
        FUNCTIONS[case.function].what(**arguments)
    message = f"{type(caught.value).__name__}: {caught.value}"
    right = type(caught.value) is case.error or (
        case.error is LobsError and isinstance(caught.value, LobsError)
    )
    assert right, f"expected {case.error.__name__}, got {message}"
    named = case.named or case.argument
    assert re.search(rf"(?<!\w){re.escape(named)}(?!\w)", str(caught.value)), message
    assert {name: print_of(value) for name, value in arguments.items()} == before


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.id)
def test_documented_right_answer(case):
    odd = arguments_of(case, case.odd)
    written = FUNCTIONS[case.function].written
    before = {name: print_of(value) for name, value in odd.items() if name not in written}
    assert outcome(case.function, odd) == outcome(case.function, arguments_of(case, case.plain))
    assert {name: print_of(value) for name, value in odd.items() if name not in written} == before


@pytest.mark.parametrize(
    "case",
    [c for c in WRONG if c.function in ("Hessian.update", "StreamingInverse.update")],
    ids=lambda case: case.id,
)
def test_after_a_refused_update_the_object_can_still_be_used(case):
    arguments = arguments_of(case, case.make)
    with pytest.raises(Exception):  # noqa: B017, PT011  (the test above checks its type)
        FUNCTIONS[case.function].what(**arguments)
    good = FUNCTIONS[case.function].good()
    good["self"] = arguments["self"]
    FUNCTIONS[case.function].what(**good)


def test_a_nan_already_in_the_upper_triangle_of_the_sum_is_neither_read_nor_written(backend):
    H = torch.zeros(C, C, dtype=torch.float64)
    H[0, 1] = H[2, 3] = NAN
    X = features(N, C)
    expected = torch.zeros(C, C, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=backend)
    ops.hessian_accumulate_(expected, X, backend=backend)
    assert bits_of(H.tril()) == bits_of(expected.tril())
    assert bool(H[0, 1].isnan())
    assert bool(H[2, 3].isnan())
    assert int(H.isnan().sum()) == 2


def test_a_nan_already_in_the_lower_triangle_of_the_sum_does_not_spread(backend):
    H = torch.zeros(C, C, dtype=torch.float64)
    H[2, 1] = NAN
    ops.hessian_accumulate_(H, features(N, C), backend=backend)
    assert H.isnan().nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("at", [(0, 0), (3, 2), (N - 1, C - 1)])
def test_the_position_of_a_nan_is_that_of_the_tensor_which_was_passed(at, backend):
    """Also where rows of weight 0 come before it."""
    X = features(N, C)
    X[at] = NAN
    weights = torch.ones(N, dtype=torch.float64)
    weights[1] = 0
    with pytest.raises(NonFiniteError, match=re.escape(f"nan at {at}")):
        ops.hessian_accumulate_(torch.zeros(C, C, dtype=torch.float64), X, weights, backend=backend)


def test_the_position_of_a_nan_in_a_batch_of_sequences_has_all_its_dimensions():
    x = features(6, C).reshape(2, 3, C)
    x[1, 2, 3] = NAN
    with pytest.raises(NonFiniteError, match=re.escape("x: nan at (1, 2, 3)")):
        lobs.Hessian(C).update(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, _: lobs.Hessian(C).update(x),
        lambda x, H: lobs.prune_weight(x, H, sparsity=0.5).weight,
        lambda x, H: ops.hessian_accumulate_(H, x),
        lambda x, H: ops.saliency_argmin(x, H.diagonal(), H > -1)[0],
        lambda x, H: ops.exact_trace(x, H).loss,
        lambda x, H: ops.support_solve_(x, H, x > 0),
        lambda x, H: lobs.trace_weight(x, H).loss,
    ],
    ids=["update", "prune_weight", "accumulate", "argmin", "exact", "solve", "trace_weight"],
)
def test_a_tensor_that_stands_for_a_batch_in_vmap_is_refused(call):
    H = moment().float()
    with pytest.raises(LobsError):
        torch.func.vmap(lambda x: call(x, H))(torch.ones(2, R, C))


# ---- inputs that could make native code touch the wrong memory -----------------------------------

HOSTILE = {
    # name: (code, error); LobsError stands for any of ours, None for one of ours or a right answer
    "X whose storage was freed": (
        "X = torch.randn(1000, 4); X.untyped_storage().resize_(0)\n"
        "ops.hessian_accumulate_(torch.zeros(4, 4), X)",
        "LobsError",
    ),
    "x whose storage was freed": (
        "x = torch.randn(1000, 4); x.untyped_storage().resize_(0)\nlobs.Hessian(4).update(x)",
        "LobsError",
    ),
    "H whose storage was freed": (
        "H = torch.zeros(4, 4); H.untyped_storage().resize_(0)\n"
        "ops.hessian_accumulate_(H, torch.randn(1000, 4))",
        "LobsError",
    ),
    "weight whose storage was freed": (
        "w = torch.randn(3, 4); w.untyped_storage().resize_(0)\n"
        "lobs.prune_weight(w, torch.eye(4), sparsity=0.5)",
        "LobsError",
    ),
    "X whose storage was cut short": (
        "X = torch.randn(2**20, 4); X.untyped_storage().resize_(64)\n"
        "ops.hessian_accumulate_(torch.zeros(4, 4), X)",
        "LobsError",
    ),
    "X without memory, standing for zeros": (
        "ops.hessian_accumulate_(torch.zeros(4, 4), torch._efficientzerotensor((1000, 4)))",
        None,
    ),
    "array with a negative stride": (
        "x = np.arange(12.0).reshape(3, 4)[:, ::-1]\nops.hessian_accumulate_(torch.zeros(4, 4), x)",
        None,
    ),
    "start that overflows when it is subtracted": (
        "ops.static_order_prune_(torch.ones(3, 4), torch.eye(4), torch.tensor([0, 1], "
        "dtype=torch.int32), torch.tensor([0, 2**63 - 1, -2, 2]))",
        "ArgumentError",
    ),
    "blocks that do not divide a panel": (
        "for b in (3, 5, 7, 17, 33, 48, 63):\n"
        "    ops.exact_trace(torch.randn(4, 520), torch.eye(520), block=b)",
        None,
    ),
    "groups beyond every column": (
        "ops.exact_trace(torch.randn(4, 50), torch.eye(50), group=2**62, per_group=2**62)",
        None,
    ),
    "A whose storage was freed": (
        "A = torch.eye(40); A.untyped_storage().resize_(0)\nops.exact_trace(torch.randn(4, 40), A)",
        "LobsError",
    ),
    "state whose storage was freed": (
        "s = torch.zeros(4, 40, dtype=torch.uint8); s.untyped_storage().resize_(0)\n"
        "ops.exact_trace(torch.randn(4, 40), torch.eye(40), state=s)",
        "LobsError",
    ),
    "chosen whose storage was cut short": (
        "p = torch.ones(4, 40, dtype=torch.bool); p.untyped_storage().resize_(40)\n"
        "ops.support_solve_(torch.randn(4, 40), torch.eye(40), p)",
        "LobsError",
    ),
    "M that is nowhere near positive definite": (
        "ops.support_solve_(torch.randn(4, 300), torch.randn(300, 300), torch.rand(4, 300) > 0.5)",
        "NotPositiveDefiniteError",
    ),
    "A that is nowhere near positive definite": (
        "A = torch.randn(300, 300).double(); A.diagonal().abs_()\n"
        "for block in (1, 4):\n"
        "    assert ops.exact_trace(torch.randn(4, 300).double(), A, block=block).lost.all()\n"
        "ops.exchange_(torch.randn(4, 300).double(), A, torch.rand(4, 300) > 0.5)",
        "NotPositiveDefiniteError",
    ),
    "cost that is infinity over infinity": (
        "ops.saliency_argmin(torch.full((1, 600), 1e30), torch.full((600,), float('inf')), "
        "torch.ones(600, dtype=torch.bool))",
        "NotPositiveDefiniteError",
    ),
    "object that is not what __dlpack__ says": (
        "class Odd:\n    __dlpack__ = None\nops.hessian_accumulate_(torch.zeros(4, 4), Odd())",
        "LobsError",
    ),
    "level that does not exist": (
        "import os; os.environ['LOBS_CPU_LEVEL'] = 'v9'\n"
        "ops.hessian_accumulate_(torch.zeros(4, 4), torch.ones(2, 4))",
        "BackendError",
    ),
}

_CHILDREN = """
    import json, os, signal, sys, textwrap
    import numpy as np, torch
    import lobs_native as lobs
    from lobs_native import ops
    torch.set_num_threads(1)
    out = {}
    for name, (code, _) in json.loads(sys.stdin.read()).items():
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(10)
            try:
                exec(code)
                outcome = "no error"
            except BaseException as error:
                outcome = type(error).__name__
            os.write(write, outcome.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            outcome = pipe.read()
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            outcome = signal.Signals(os.WTERMSIG(status)).name
        out[name] = outcome
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def hostile_outcomes() -> dict[str, str]:
    """The outcome of each input: an exception's name, "no error", or the signal that ended it."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHILDREN)],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_input_ends_in_an_exception_and_not_in_a_crash(name, hostile_outcomes):
    error = HOSTILE[name][1]
    ours = {kind.__name__ for kind in _all_errors(LobsError)}
    allowed = {None: {"no error", *ours}, "LobsError": ours}.get(error, {error})
    assert hostile_outcomes[name] in allowed


def _all_errors(kind: type[LobsError]) -> list[type[LobsError]]:
    return [kind, *(e for sub in kind.__subclasses__() for e in _all_errors(sub))]


# ---- the tables themselves -----------------------------------------------------------------------


def test_every_argument_of_every_function_is_in_the_table():
    for name, function in FUNCTIONS.items():
        what = function.what.__init__ if inspect.isclass(function.what) else function.what
        expected = set(inspect.signature(what).parameters) - {"self", "cls"}
        tried = {case.argument for case in WRONG if case.function == name} - {"self"}
        assert tried == expected, name
        assert set(function.good()) - {"self"} == expected, name


def test_no_case_is_listed_twice_and_their_number_is_printed(capsys):
    for table in (WRONG, RIGHT):
        names = [case.id for case in table]
        assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    with capsys.disabled():
        print(
            f"\n{len(WRONG)} wrong arguments, {len(RIGHT)} documented right answers, "
            f"{len(HOSTILE)} hostile inputs, in {len(FUNCTIONS)} functions"
        )
    assert len(WRONG) > 500
    assert len(RIGHT) > 100
