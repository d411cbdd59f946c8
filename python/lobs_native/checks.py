"""Argument checks: every error names the argument, and is raised before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lobs_native.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    NonFiniteError,
    ShapeError,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)  # for token weights
_PIECE = 1 << 22  # elements searched at a time
PLAIN: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def tensor(
    x: Any, name: str, *, ndim: int | None = None, dtypes: Iterable[torch.dtype] = FLOATS
) -> Tensor:
    """Check an input tensor and return it detached, aligned, and without a lazy negative bit.

    Anything with ``__dlpack__`` (numpy, cupy, jax) is accepted. Raises DtypeError or ShapeError,
    which call the tensor ``name``.
    """
    if not isinstance(x, Tensor):
        if not hasattr(x, "__dlpack__"):
            raise DtypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if isinstance(x, np.ndarray) and any(step < 0 for step in x.strides):
            x = x.copy()  # torch has no negative strides: importing one aborts the process
        try:
            x = torch.utils.dlpack.from_dlpack(x)
        except Exception as error:  # whatever a foreign object's __dlpack__ raises
            raise DtypeError(
                f"{name}: torch cannot import this {type(x).__name__}: {error}"
            ) from error
    if type(x) not in PLAIN:
        raise DtypeError(
            f"{name}: expected a plain torch.Tensor, got the subclass {type(x).__name__}; "
            "convert it first"
        )
    if x.device.type == "meta":
        raise DtypeError(f"{name}: on the meta device, so it has no values; materialise it first")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise DtypeError(f"{name}: inside a torch.func transform; call this function outside it")
    if x.is_nested:
        raise DtypeError(
            f"{name}: a nested tensor; pass {name}.to_padded_tensor(...) or its parts one by one"
        )
    if x.layout != torch.strided:
        raise DtypeError(f"{name}: layout {x.layout} is not supported; pass {name}.to_dense()")
    if x.is_quantized:
        raise DtypeError(f"{name}: a quantised tensor; pass {name}.dequantize()")
    allowed = tuple(dtypes)
    if x.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise DtypeError(
            f"{name}: dtype is {str(x.dtype).removeprefix('torch.')}, expected one of {names}"
        )
    if ndim is not None and x.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")
    _check_memory(x, name)
    plain: Tensor = x.detach().resolve_neg()
    if plain.device.type == "cpu" and plain.data_ptr() % plain.element_size():
        return plain.clone()
    return plain


def output(
    x: Any,
    name: str,
    *,
    ndim: int,
    dtypes: Iterable[torch.dtype],
    rows_apart: bool = False,
) -> Tensor:
    """Check a tensor that is to be written in place.

    Besides the conditions of :func:`tensor`, it must be contiguous, not require grad, and own the
    memory that is written. ``rows_apart`` allows a matrix with gaps between its contiguous rows.
    """
    if not isinstance(x, Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor to write into, got {type(x).__name__}")
    if x.requires_grad:
        raise DtypeError(
            f"{name}: requires grad, but would be written in place; pass {name}.detach()"
        )
    checked = tensor(x, name, ndim=ndim, dtypes=dtypes)
    if checked.data_ptr() != x.data_ptr() or x.is_neg():
        raise ShapeError(
            f"{name}: written in place, so its memory must be aligned and its values not lazily "
            "negated; pass a clone"
        )
    whole = x.is_contiguous() or (
        rows_apart and x.ndim == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    )
    if not whole:
        raise ShapeError(
            f"{name}: written in place, so it must be contiguous; its strides are {x.stride()}"
        )
    return checked


def _extent(x: Tensor) -> tuple[int, int]:
    """The address range [first, last) of the bytes that a strided tensor reaches."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    first = x.data_ptr()
    if x.is_contiguous():
        return first, first + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def _check_memory(x: Tensor, name: str) -> None:
    """Refuse a tensor whose storage (freed, truncated or never allocated) cannot hold its shape."""
    if x.numel() == 0:
        return
    first, last = _extent(x)
    available = x.untyped_storage().nbytes()
    needed = x.storage_offset() * x.element_size() + (last - first)
    if first == 0 or needed > available:
        raise ShapeError(
            f"{name}: shape {tuple(x.shape)} needs {needed} bytes, but its storage has "
            f"{available}; it was freed or resized"
        )


def apart_in_memory(x: Tensor, name: str) -> None:
    """Refuse a tensor of which several elements lie at one address, as after ``expand``."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ShapeError(
                f"{name}: several of its elements lie at one address (shape {tuple(x.shape)}, "
                f"strides {x.stride()}), so they cannot change apart; give it memory of its own: "
                "nn.Parameter(tensor.detach().contiguous())"
            )
        reach += (size - 1) * stride


def apart(out: Tensor, name: str, read: Tensor, other: str) -> None:
    """Refuse an output that shares memory with an input."""
    first, last = _extent(out)
    begin, end = _extent(read)
    if out.device == read.device and first < end and begin < last:
        raise ShapeError(
            f"{other}: shares memory with {name}, which is written; pass {other}.clone()"
        )


def flag(value: Any, name: str) -> bool:
    """Return ``value`` if it is True or False; otherwise raise DtypeError."""
    if not isinstance(value, bool):
        raise DtypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Any, name: str) -> Tensor:
    """torch.zeros, with errors that name ``device`` or the argument behind the shape, ``name``."""
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device: {device!r} is not a torch device") from error
    if where.type == "meta":
        raise BackendError("device: meta tensors have no values; use a real device")
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    if size >= 1 << 47:
        raise ArgumentError(
            f"{name}: a matrix of {shape} needs {size} bytes, more than any machine has"
        )
    try:
        return torch.zeros(shape, dtype=dtype, device=where)
    except MemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        if where.type == "cpu":
            raise MemoryError(f"{name}: a matrix of {shape} needs {size} bytes: {error}") from error
        reason = str(error).splitlines()[0]
        raise BackendError(f"device: {where} cannot be used: {reason}") from error


def positive_int(value: Any, name: str) -> int:
    """Return ``value`` as an int >= 1; otherwise raise DtypeError or ArgumentError."""
    return _integer(value, name, 1)


def _integer(value: Any, name: str, lowest: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DtypeError(f"{name}: expected an integer, got {type(value).__name__}")
    try:
        number = int(value.__index__())
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name}: expected an integer, got {type(value).__name__}") from error
    if number < lowest:
        raise ArgumentError(f"{name}: {number}; it must be at least {lowest}")
    return number


def count(value: Any, name: str) -> int:
    """Return ``value`` as an int >= 0; otherwise raise DtypeError or ArgumentError."""
    return _integer(value, name, 0)


def real(value: Any, name: str) -> float:
    """Return ``value`` as a float, not NaN; otherwise raise DtypeError or ArgumentError."""
    not_a_number = DtypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, (bool, str, bytes, complex)) or value is None:
        raise not_a_number
    if getattr(value, "dtype", None) is not None and "complex" in str(value.dtype):
        raise not_a_number
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError as error:
        raise ArgumentError(f"{name}: beyond the range of a float") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise not_a_number from error
    if math.isnan(number):
        raise ArgumentError(f"{name}: NaN; expected a number")
    return number


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum with one of them is not finite, and takes a third of the time of looking at each value.
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x).all())


def check_finite(x: Tensor, name: str, where: Tensor | None = None) -> None:
    """Raise NonFiniteError at the first NaN or infinity.

    ``where`` (N,) limits the search to some rows of x (N, C).
    """
    # In pieces: temporaries stay small, and Ctrl-C is answered between them.
    whole = x.reshape(1) if x.ndim == 0 else x
    width = whole[:1].numel()
    rows = max(1, _PIECE // max(1, width))
    for first in range(0, len(whole), rows):
        if is_finite(whole[first : first + rows]):
            continue
        finite = torch.isfinite(whole[first : first + rows])
        if where is not None:
            finite |= ~where[first : first + rows, None]
        if not bool(finite.all()):
            flat = int((~finite).reshape(-1).to(torch.uint8).argmax())
            raise not_finite(name, x, first * width + flat)


def not_finite(name: str, x: Tensor, flat: int) -> NonFiniteError:
    """The error for the value at a flat index of x. It shows the index along each dimension."""
    position: tuple[int, ...] = ()
    rest = flat
    for size in reversed(x.shape):
        rest, index = divmod(rest, size)
        position = (index, *position)
    error = NonFiniteError(
        f"{name}: {float(x[position])} at {position}; inputs must be finite. Nothing was changed."
    )
    error.flat = flat
    return error


def token_weights(weights: Any, rows: int, device: torch.device) -> Tensor:
    """Check the weights of the rows of X and return them as contiguous float64 (rows,)."""
    t = tensor(weights, "weights", ndim=1, dtypes=WEIGHTS)
    if t.numel() != rows:
        raise ShapeError(f"weights: {t.numel()} for {rows} rows of X; pass one weight per row")
    t = t.to(device=device, dtype=torch.float64).contiguous()
    check_finite(t, "weights")
    if rows and float(t.min()) < 0:
        lowest = int(t.argmin())
        raise ArgumentError(
            f"weights: {float(t[lowest])} at {lowest}; weights must be >= 0 (0 leaves the row out)"
        )
    return t


def same_device(first: Tensor, name: str, second: Tensor, other: str) -> None:
    """Refuse two tensors on different devices."""
    if first.device != second.device:
        raise ShapeError(
            f"{name} is on {first.device}, but {other} is on {second.device}: move one of them"
        )


def square(x: Tensor, name: str, rows: Tensor, other: str) -> None:
    """Refuse ``x`` if it is not (C, C), for ``rows`` (R, C)."""
    R, C = rows.shape
    if x.shape != (C, C):
        raise ShapeError(
            f"{other} is ({R}, {C}) but {name} is {tuple(x.shape)}: {name} must be ({C}, {C})"
        )


def sparsity(value: Any, name: str = "sparsity") -> float:
    """Return ``value`` as a share of the weights, from 0 to 1."""
    share = real(value, name)
    if not 0 <= share <= 1:
        raise ArgumentError(
            f"{name}: {share:g}; it is a fraction from 0 (remove nothing) to 1 (remove all)"
        )
    return share


def check_choice(value: Any, name: str, choices: Sequence[str], *, optional: bool = False) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise raise an error that lists them, and
    None where that is allowed as well."""
    if value in choices and isinstance(value, str):
        return value
    listed = ", ".join(choices) + (" or None" if optional else "")
    if not isinstance(value, str):
        raise DtypeError(f"{name}: expected one of {listed}, got {type(value).__name__}")
    raise ArgumentError(f"{name}: {value!r}; expected one of {listed}")
