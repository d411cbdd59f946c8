"""A pretend CUDA device: tensors that report cuda:0 as their device but hold CPU tensors.

Every torch function runs on the held tensors, so views, in-place writes and strides are torch's
own. A call that mixes devices is refused if CUDA would refuse it. The kernels are the emulated
ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lobs_native import checks, ops
from lobs_native.ops import dispatch

CUDA = torch.device("cuda:0")
_MEMORY = 1 << 30  # free bytes that the device reports

# Answered by the wrapper itself; everything else is answered by the tensor it holds.
_OF_WRAPPER = {"device", "is_cuda", "is_cpu", "requires_grad", "requires_grad_", "grad", "is_leaf"}
_SHAPES_ONLY = {"view_as", "expand_as", "reshape_as"}  # read nothing of their second tensor
_NO_NUMPY = {"numpy", "__array__"}
_CHANGE_SHAPE = {"resize_", "set_", "set_data", "t_", "transpose_", "squeeze_", "unsqueeze_"}


class Pretend(Tensor):
    """A tensor on the pretend device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        assert type(held) is Tensor
        assert held.device.type == "cpu"
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} reached the pretend device past __torch_function__")


class _Mode(TorchFunctionMode):
    """For calls without a pretend tensor: factories, and CPU tensors that move."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return str(func.__self__.__name__)
    return name


def _tensors(*values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)) and value:
            found += _tensors(*value)
        elif isinstance(value, dict) and value:
            found += _tensors(*value.values())
    return found


def _mapped(value: Any, of: Any) -> Any:
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, (tuple, list)):
        items = [_mapped(x, of) for x in value]
        if type(value) in (tuple, list) or type(value).__module__ == "torch.return_types":
            return type(value)(items)
        return value if type(value) is torch.Size else tuple(items)
    if type(value) is dict:
        return {key: _mapped(x, of) for key, x in value.items()}
    return value


def _is_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta")


def _named_device(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names, if it names one."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        return CUDA
    if name == "to" and len(args) > 1:
        if isinstance(args[1], Tensor):
            return args[1].device
        if _is_device(args[1]):
            return torch.device(args[1])
    if name == "tensor" and not isinstance(args[0], Tensor):
        return torch.device("cpu")  # of Python values, even where they are tensors of one element
    return None


def _mixed(name: str, found: list[Tensor], args: Any) -> bool:
    """Whether CUDA would refuse a call because only some of its tensors are on the device."""
    others = [x for x in found if not isinstance(x, Pretend)]
    if not others or name in ("to", "tensor", "copy_") or name in _SHAPES_ONLY:
        return False
    first = found[0]
    if name in ("__getitem__", "__setitem__", "index_put_") and len(args) > 1:
        index, value = args[1], args[2] if len(args) > 2 else None
        if not isinstance(first, Pretend) and any(isinstance(x, Pretend) for x in _tensors(index)):
            return True
        picks = isinstance(index, list) or bool(_tensors(index))
        if name == "__getitem__" or not isinstance(value, Tensor) or not picks:
            return False  # an index may be on the CPU; a plain slice is copied to
        if isinstance(first, Pretend):
            return not isinstance(value, Pretend) and value.ndim > 0
        return isinstance(value, Pretend)
    if name in ("cat", "concat", "stack", "vstack", "hstack"):
        return True
    in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    return (in_place and first is others[0]) or any(x.ndim > 0 for x in others)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = _name(func)
    if name in _OF_WRAPPER and args and isinstance(args[0], Pretend):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    found = _tensors(args, kwargs)
    here = [x for x in found if isinstance(x, Pretend)]
    named_device = _named_device(name, args, kwargs)
    on_device = named_device.type == "cuda" if named_device is not None else bool(here)
    if not here and not on_device:
        return func(*args, **kwargs)
    if name in _NO_NUMPY:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )
    if name == "_has_compatible_shallow_copy_type":  # Module.to: make a new parameter
        return False
    if name in _CHANGE_SHAPE:
        raise NotImplementedError(f"{name} on the pretend device")
    if here and _mixed(name, found, args):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (in {name})"
        )
    if name == "__iter__":
        return iter(args[0].unbind(0))
    moved = name in ("to", "cpu", "cuda") and on_device != bool(isinstance(args[0], Pretend))

    def inner(x: Tensor) -> Tensor:
        return x.held if isinstance(x, Pretend) else x

    plain, named = _mapped(args, inner), _mapped(kwargs, inner)
    if named_device is not None and "device" in named:
        named["device"] = "cpu"
    if name == "to":
        plain = tuple("cpu" if _is_device(x) else x for x in plain)
        if isinstance(args[1] if len(args) > 1 else None, Tensor):
            plain = (plain[0], "cpu", args[1].dtype, *plain[2:])
    elif name == "cuda":
        plain, named = (plain[0],), {}
        func = Tensor.cpu
    out = func(*plain, **named)
    if moved and isinstance(out, Tensor) and out is plain[0]:
        out = out.clone()  # from one memory to the other
    if not on_device:
        return out
    known = {id(x.held): x for x in here}
    return _mapped(out, lambda x: known[id(x)] if id(x) in known else Pretend(x.detach()))


@contextlib.contextmanager
def device(backend: str | None, *, patched: bool = True) -> Iterator[torch.device]:
    """The pretend device, while the context lasts.

    ``backend`` stands for the CUDA kernels: ``None`` and ``"cuda"`` choose it on the device.
    Without ``patched``, backends are chosen as usual.
    """
    real = ops.select_backend

    def select(name: str | None, where: torch.device) -> str:
        if where.type == "cuda" and backend is not None and name in (None, "cuda", backend):
            return backend
        return real("reference" if name is None and where.type == "cuda" else name, where)

    state = torch.zeros(0, dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (ops, "select_backend", select if patched else real),
            (dispatch, "select_backend", select if patched else real),
            (checks, "PLAIN", (*checks.PLAIN, Pretend)),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device", lambda _: contextlib.nullcontext()),
            (torch.cuda, "current_stream", lambda _=None: SimpleNamespace(cuda_stream=0)),
            (
                torch.cuda,
                "get_device_properties",
                lambda _=None: SimpleNamespace(multi_processor_count=2),
            ),
            (torch.cuda, "mem_get_info", lambda _=None: (_MEMORY, 2 * _MEMORY)),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_rng_state", lambda _=None: state),
            (torch.cuda, "set_rng_state", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(_Mode())
        yield CUDA
