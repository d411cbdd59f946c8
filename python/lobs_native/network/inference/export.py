"""A pruned network in another program's format, with its zeros counted there."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.network.inference.engines import Subject, absent, first_line

__all__ = ["FORMATS", "QUANTIZERS", "REFUSED", "ExportReport", "ExportedWeight", "export"]

FORMATS = ("onnx", "openvino")
QUANTIZERS = ("int8",)
# Other ways to quantise, and how many zeros they leave, as measured in November 2026.
REFUSED = {
    "gptq": "it moves rounding errors onto removed weights: 98 % of the zeros stay "
    "(llm-compressor 0.14, gptqmodel 7.6); use a round-to-nearest quantiser, or apply_masks after",
    "fp8_dynamic": "llm-compressor 0.14 by GPTQ keeps 0.7 % of the zeros; round to nearest instead",
    "nvfp4": "llm-compressor 0.14 by GPTQ keeps 79 % of the zeros; round to nearest instead",
    "q4_1": "blocks have a minimum but no exact zero: 0.3 % of the zeros stay; Q4_0 keeps all",
    "q5_1": "blocks have a minimum but no exact zero: 0.3 % of the zeros stay; Q5_0 keeps all",
}
_NEEDS = {
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "int8": ("onnx", "onnxruntime"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file as the numbers it stands for, and how far they may be from the weights."""

    values: np.ndarray[Any, Any]
    within: float = 0.0


@dataclass(frozen=True)
class ExportedWeight:
    """Where a weight with zeros went, and how many of them are zero there."""

    layer: str
    tensor: str  # its name in the file
    transposed: bool
    zeros: int  # in the network
    kept: int  # of these, in the file


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote."""

    file: str
    format: str
    quantized: str | None
    weights: tuple[ExportedWeight, ...]
    bytes: int  # of all files

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)


def export(
    model: nn.Module,
    batch: Any,
    folder: Path,
    *,
    to: str = "onnx",
    quantize: str | None = None,
) -> ExportReport:
    """Write a network in another format by that program's own converter, and count its zeros there.

    Converters rename and transpose weights, so each is found by its values.

    Parameters
    ----------
    model : nn.Module
        On the CPU; not modified.
    batch : Tensor, tuple or dict of tensors
        What the network is called with; its sizes become those of the exported network.
    folder : Path
        An existing folder, for model.onnx, or model.xml and model.bin.
    to : str
        "onnx" or "openvino".
    quantize : str, optional
        "int8": ONNX Runtime's dynamic quantisation, for "onnx". Ways to quantise that are known to
        lose zeros are refused with the reason.

    Returns
    -------
    ExportReport
        A row for every linear layer and convolution with zeros.

    Raises
    ------
    ArgumentError
        A format or a way to quantise is unknown or refused, or does not fit the other.
    LobsError
        A package is missing; the message says which.
    CheckpointError
        The converter failed, or lost a weight or a zero.
    """
    checks.check_choice(to, "to", FORMATS)
    if quantize is not None:
        if quantize.lower() in REFUSED:
            raise ArgumentError(f"quantize: {quantize} is refused: {REFUSED[quantize.lower()]}")
        checks.check_choice(quantize, "quantize", QUANTIZERS)
        if to != "onnx":
            raise ArgumentError(f"quantize: {quantize} is for 'onnx', not for {to!r}")
    for what in (to, *([quantize] if quantize else [])):
        if why := absent(_NEEDS[what]):
            raise LobsError(f"{what}: {why}")
    subject = Subject(copy.deepcopy(model).eval(), batch, folder)
    weights = {
        name: module.weight.detach().float().numpy()
        for name, module in subject.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and bool((module.weight == 0).any())
    }
    try:
        file, tensors = _WRITERS[quantize or to](subject)
    except Exception as error:  # whatever a converter raises
        raise CheckpointError(
            f"to: {to}: the network could not be converted: {first_line(error)}"
        ) from error
    found = tuple(found_weight(name, weight, tensors) for name, weight in weights.items())
    size = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(file.name, to, quantize, found, size)


def found_weight(layer: str, weight: Any, tensors: Mapping[str, Stored]) -> ExportedWeight:
    """Find a weight by its values, as it is or transposed, and count the zeros that it has there.

    Raises
    ------
    CheckpointError
        No tensor has these values, or a zero has become another number.
    """
    turned = ((False, weight), (True, weight.T)) if weight.ndim == 2 else ((False, weight),)
    for transposed, wanted in turned:
        for name, stored in tensors.items():
            if stored.values.shape != wanted.shape:
                continue
            if not bool((np.abs(stored.values - wanted) <= stored.within).all()):
                continue
            zeros = wanted == 0
            total, kept = int(zeros.sum()), int((stored.values[zeros] == 0).sum())
            if kept < total:
                raise CheckpointError(
                    f"{layer}: {total - kept} of its {total} zeros are not zero in {name!r}; "
                    "the files are not to be used"
                )
            return ExportedWeight(layer, name, transposed, total, kept)
    raise CheckpointError(
        f"{layer}: its weight {weight.shape} is in no tensor of the file, as it is or transposed, "
        "so its zeros cannot be counted"
    )


_Written = tuple[Path, Mapping[str, Stored]]


def _arrays_of(path: Path) -> dict[str, Any]:
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load(str(path))
    return {
        entry.name: onnx.numpy_helper.to_array(entry, base_dir=str(path.parent))
        for entry in model.graph.initializer
    }


def _onnx(subject: Subject) -> _Written:
    return subject.onnx, {k: Stored(v) for k, v in _arrays_of(subject.onnx).items()}


def _int8(subject: Subject) -> _Written:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    path = subject.folder / "model.int8.onnx"
    kind = quantization.QuantType.QInt8
    quantization.quantize_dynamic(str(subject.onnx), str(path), weight_type=kind)
    _remove_onnx(subject)
    arrays = _arrays_of(path)
    tensors = {k: Stored(v) for k, v in arrays.items()}
    for name in [k.removesuffix("_quantized") for k in arrays if k.endswith("_quantized")]:
        parts = (f"{name}_{part}" for part in ("quantized", "scale", "zero_point"))
        whole, scale, zero = (arrays[part].astype(np.float64) for part in parts)
        values = (whole - zero) * scale
        tensors[f"{name}_quantized"] = Stored(values, 0.51 * float(scale.max()))  # and rounding
    return path, tensors


def _openvino(subject: Subject) -> _Written:
    openvino: Any = importlib.import_module("openvino")
    converted = openvino.convert_model(str(subject.onnx))
    path = subject.folder / "model.xml"
    openvino.save_model(converted, str(path), compress_to_fp16=False)
    _remove_onnx(subject)
    nodes = openvino.Core().read_model(str(path)).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    return path, {node.get_friendly_name(): Stored(node.data.copy()) for node in constants}


def _remove_onnx(subject: Subject) -> None:
    """Remove the file that was only a step on the way, and what belongs to it."""
    for file in list(subject.folder.glob("model.onnx*")):
        file.unlink()


_WRITERS: dict[str, Callable[[Subject], _Written]] = {
    "onnx": _onnx,
    "int8": _int8,
    "openvino": _openvino,
}
