"""Programs that run a network on the CPU: how each is given one, and why it cannot be used."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.network.inference.sparse_linear import to_sparse
from lobs_native.version import __version__

__all__ = [
    "ENGINES",
    "Run",
    "Subject",
    "absent",
    "engine_version",
    "first_line",
    "least_sparsity",
    "missing",
    "quiet",
]

FEW_ROWS = 8

Run = Callable[[], Any]  # one forward pass; what it returns is the first output, as tensor or array


class _Pass(nn.Module):
    """A network whose only output is the first one, called with the tensors of a batch in order:
    exporters want neither dictionaries nor caches."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.names is None:
            out = self.model(*tensors)
        else:
            out = self.model(**dict(zip(self.names, tensors, strict=True)))
        if isinstance(out, Tensor):
            return out
        first: Tensor = out[0]
        return first


class Subject:
    """A network and what it is called with, in the forms that engines want."""

    def __init__(self, model: nn.Module, batch: Any, folder: Path) -> None:
        self.model, self.batch, self.folder = model, batch, folder
        if isinstance(batch, Mapping):
            names, tensors = tuple(batch), tuple(batch.values())
        else:
            names, tensors = None, (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise DtypeError("batch: expected a tensor, or a tuple or dict of tensors")
        self.tensors: tuple[Tensor, ...] = tensors
        self.called = _Pass(model, names).eval()

    @property
    def rows(self) -> int:
        """Tokens or samples in the batch: all but the features of its first tensor."""
        first = self.tensors[0]
        return first.numel() // (first.shape[-1] if first.is_floating_point() else 1)

    @functools.cached_property
    def onnx(self) -> Path:
        """The network as an ONNX file, by torch's own exporter, made once for all engines."""
        path = self.folder / "model.onnx"
        names = [f"input{i}" for i in range(len(self.tensors))]
        with quiet():
            torch.onnx.export(
                self.called, self.tensors, str(path), dynamo=True, verbose=False, input_names=names
            )
        return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a converter's warnings, logged or not."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def least_sparsity(rows: int) -> float:
    """The share of zeros from which ``to_sparse`` pays for so many rows, as measured."""
    return 0.5 if rows <= FEW_ROWS else 0.7


def _in_torch(called: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Run:
    @torch.inference_mode()
    def run() -> Any:
        return called(*tensors)

    return run


def _torch(subject: Subject) -> Run:
    return _in_torch(subject.called, subject.tensors)


def _sparse(subject: Subject) -> Run:
    changed = copy.deepcopy(subject.called)
    least = least_sparsity(subject.rows)
    if not to_sparse(changed, sparsity=least).replaced:
        raise ArgumentError(f"no large linear layer has {least:.0%} zeros or more")
    return _in_torch(changed, subject.tensors)


def _compiled(subject: Subject) -> Run:
    return _in_torch(torch.compile(subject.called), subject.tensors)


def _onnxruntime(subject: Subject) -> Run:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(subject.onnx), options, providers=providers)
    # Inputs that the network does not read are not in the file.
    given = {f"input{i}": tensor.numpy() for i, tensor in enumerate(subject.tensors)}
    read = {entry.name: given[entry.name] for entry in session.get_inputs()}
    return lambda: session.run(None, read)[0]


def _openvino(subject: Subject) -> Run:
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    # Its default would round to bfloat16 where the processor has instructions for it.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **precise})
    compiled = core.compile_model(str(subject.onnx), "CPU")
    given = {f"input{i}": tensor.numpy() for i, tensor in enumerate(subject.tensors)}
    read = {entry.any_name: given[entry.any_name] for entry in compiled.inputs}
    return lambda: compiled(read)[0]


ENGINES: dict[str, Callable[[Subject], Run]] = {
    "torch": _torch,
    "lobs.to_sparse": _sparse,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
_NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}


def absent(modules: Iterable[str]) -> str:
    """Which of these modules are not installed, with how to install them; or nothing."""
    names = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"needs {', '.join(names)}: pip install {' '.join(names)}" if names else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def missing(name: str) -> str:
    """Why an engine cannot be used here, with what to install; or nothing."""
    if why := absent(_NEEDS.get(name, ())):
        return why
    if name == "torch.compile" and shutil.which("c++") is None and shutil.which("g++") is None:
        return "needs a C++ compiler"
    return ""


def engine_version(name: str) -> str:
    """The version of an engine's package."""
    if name == "lobs.to_sparse":
        return __version__
    package = name.partition(".")[0]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # an import from a folder that pip did not fill
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
