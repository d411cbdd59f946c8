"""Other programs' formats: each network goes through that program's own converter, and the weights
are read back from the files that it wrote."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lobs_native.errors import CheckpointError
from lobs_native.network.inference.engines import Subject, quiet

__all__ = ["NEEDS", "WRITERS", "Stored", "Weights", "Written"]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file as the numbers it stands for, and how far they may be from the weights."""

    values: np.ndarray[Any, Any]
    within: float = 0.0


Weights = Mapping[str, np.ndarray[Any, Any]]  # layer -> its weight, for layers with zeros
Written = tuple[Path, Mapping[str, Stored]]  # the main file, and its tensors

NEEDS = {
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "mnn": ("onnx", "onnxscript", "MNN"),
    "coreml": ("coremltools",),
    "torch-csr": (),
    "onnx, int8": ("onnxruntime",),
}


# ---- ONNX ----------------------------------------------------------------------------------------


def _onnx(subject: Subject, _: Weights) -> Written:
    return subject.onnx, {k: Stored(v) for k, v in _arrays_of(subject.onnx).items()}


def _onnx_int8(subject: Subject, _: Weights) -> Written:
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


def _arrays_of(path: Path) -> dict[str, Any]:
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load(str(path))
    return {
        entry.name: onnx.numpy_helper.to_array(entry, base_dir=str(path.parent))
        for entry in model.graph.initializer
    }


def _remove_onnx(subject: Subject) -> None:
    """Remove the file that was only a step on the way, and what belongs to it."""
    for file in list(subject.folder.glob("model.onnx*")):
        file.unlink()


# ---- OpenVINO ------------------------------------------------------------------------------------


def _openvino(subject: Subject, _: Weights, *, half: bool = False) -> Written:
    openvino: Any = importlib.import_module("openvino")
    converted = openvino.convert_model(str(subject.onnx))
    path = subject.folder / "model.xml"
    openvino.save_model(converted, str(path), compress_to_fp16=half)
    _remove_onnx(subject)
    nodes = openvino.Core().read_model(str(path)).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    return path, {node.get_friendly_name(): _rounded(node.data.copy()) for node in constants}


def _rounded(values: np.ndarray[Any, Any]) -> Stored:
    """Numbers as they are, or float16 ones that were rounded to it."""
    if values.dtype != np.float16 or not values.size:
        return Stored(values)
    values = values.astype(np.float32)
    return Stored(values, 2.0**-11 * float(np.abs(values).max()) + 2.0**-25)  # and subnormal ones


# ---- MNN -----------------------------------------------------------------------------------------

# What the command mnnconvert calls, which first installs another package, for a log.
_CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def _mnn(subject: Subject, weights: Weights) -> Written:
    # Weights become sparse from 60 % zeros on.
    path = _converted_by_mnn(subject, "--detectSparseSpeedUp")
    return path, dict(_floats_of_mnn(path.read_bytes(), weights))


def _mnn_int8(subject: Subject, weights: Weights) -> Written:
    # Its default is a minimum for every row, so that 0 becomes the nearest of 256 other numbers.
    path = _converted_by_mnn(subject, "--weightQuantBits", "8", "--weightQuantAsymmetric", "0")
    content = path.read_bytes()
    return path, dict((*_floats_of_mnn(content, weights), *_bytes_of_mnn(content, weights)))


def _converted_by_mnn(subject: Subject, *options: str) -> Path:
    # It lacks ONNX's IsNaN, with which torch writes scaled_dot_product_attention.
    if (choose := getattr(subject.model, "set_attn_implementation", None)) is not None:
        choose("eager")
    path = subject.folder / "model.mnn"
    made = ("-f", "ONNX", "--modelFile", str(subject.onnx), "--MNNModel", str(path))
    command = [sys.executable, "-c", _CONVERT, *made, "--bizCode", "none", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _remove_onnx(subject)
    if not path.is_file():  # it ends with 0 in any case
        said = [line for line in done.stdout.splitlines() if "Not Support" in line]
        raise CheckpointError(said[0] if said else f"MNN wrote no file: {done.stderr[-200:]}")
    return path


def _floats_of_mnn(content: bytes, weights: Weights) -> Iterator[tuple[str, Stored]]:
    """Weights of an MNN file, each found as one piece: all its numbers, or those that are not zero
    and their positions in the flattened weight."""
    for weight in weights.values():
        flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
        places = np.flatnonzero(flat).astype(np.uint32)
        if (at := content.find(flat.tobytes())) >= 0:
            values = np.frombuffer(content, np.float32, len(flat), at)
        else:
            at, positions = content.find(flat[places].tobytes()), content.find(places.tobytes())
            if min(at, positions) < 0:
                continue
            values = np.zeros_like(flat)
            where = np.frombuffer(content, np.uint32, len(places), positions)
            values[where] = np.frombuffer(content, np.float32, len(places), at)
        yield f"at byte {at}", Stored(values.reshape(weight.shape))


def _bytes_of_mnn(content: bytes, weights: Weights) -> Iterator[tuple[str, Stored]]:
    """Weights of an MNN file in 8 bits: two sizes, the 256 numbers that the bytes stand for, and a
    byte for each weight. The largest of a row is 127 steps."""
    levels = np.arange(-128, 128, dtype=np.int8)
    for weight in weights.values():
        rows = weight.reshape(len(weight), -1)
        head = struct.pack("<B2H", 2, *(n % 65536 for n in rows.shape)) + b"\0" + levels.tobytes()
        steps = np.abs(rows).max(axis=1, keepdims=True) / 127
        at = content.find(head)
        while at >= 0:
            begun = at + len(head)
            stored = np.frombuffer(content, np.uint8, rows.size, begun).reshape(rows.shape)
            values = levels[stored].astype(np.float64) * steps
            if bool((np.abs(values - rows) <= 0.51 * steps).all()):
                found = Stored(values.reshape(weight.shape), 0.51 * float(steps.max()))
                yield f"at byte {begun}", found
            at = content.find(head, begun)


# ---- Core ML -------------------------------------------------------------------------------------


def _coreml(subject: Subject, _: Weights, *, half: bool = False, int8: bool = False) -> Written:
    path = subject.folder / "model.mlpackage"
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # where it draws progress bars
        tools: Any = importlib.import_module("coremltools")
        optimize: Any = importlib.import_module("coremltools.optimize.coreml")
        exported = torch.export.export(subject.called, subject.tensors).run_decompositions()
        model = tools.convert(
            exported,
            minimum_deployment_target=tools.target.iOS18,
            compute_precision=tools.precision.FLOAT16 if half else tools.precision.FLOAT32,
            pass_pipeline=tools.PassPipeline.DEFAULT_PRUNING,  # sparse from half zeros on
            skip_model_load=True,
        )
        if int8:
            how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
            config = optimize.OptimizationConfig(global_config=how)
            model = optimize.linear_quantize_weights(model, config, joint_compression=True)
        model.save(str(path))
        return path, dict(_weights_of_coreml(path))


def _weights_of_coreml(path: Path) -> Iterator[tuple[str, Stored]]:
    tools: Any = importlib.import_module("coremltools")
    reader: Any = importlib.import_module("coremltools.converters.mil.frontend.milproto.load")
    model = tools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = reader.load(
        model_spec=spec,
        specification_version=spec.specificationVersion,
        file_weights_dir=model.weights_dir,
    )
    for operation in program.functions["main"].operations:
        if operation.op_type == "const":
            values = operation.outputs[0].val
        elif operation.op_type.startswith("constexpr"):  # compressed
            values = operation.materialized_val_inference()
        else:
            continue
        if not isinstance(values, np.ndarray) or not values.size:
            continue
        if "scale" in operation.op_type or "scale" in _maker(operation):
            yield operation.name, Stored(values, 0.51 * float(np.abs(values).max()) / 127)
        else:
            yield operation.name, _rounded(values)


def _maker(operation: Any) -> str:
    """The type of the operation that gives a sparse weight its numbers, or nothing."""
    made = operation.inputs.get("nonzero_data")
    return made.op.op_type if made is not None and made.op is not None else ""


# ---- compressed rows -----------------------------------------------------------------------------


_CSR = ("crow", "col", "values", "size")


def _torch_csr(subject: Subject, weights: Weights) -> Written:
    """The state dict in safetensors. A linear weight NAME with zeros is NAME.crow, NAME.col,
    NAME.values and NAME.size where these take less room."""
    tensors: dict[str, Tensor] = {}
    for name, value in subject.model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in weights and value.ndim == 2:
            kept = value != 0
            crow = torch.zeros(len(value) + 1, dtype=torch.int32)
            crow[1:] = kept.sum(dim=1).cumsum(0)
            columns = kept.nonzero()[:, 1].to(torch.int32)
            pieces = (crow, columns, value[kept], torch.tensor(value.shape))
            if sum(piece.nbytes for piece in pieces) < value.nbytes:
                tensors |= {f"{name}.{k}": piece for k, piece in zip(_CSR, pieces, strict=True)}
                continue
        tensors[name] = value.contiguous().clone()  # one for each name, also if they share it
    path = subject.folder / "model.csr.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, {name: Stored(value) for name, value in _dense_of_csr(path)}


def _dense_of_csr(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in [key.removesuffix(".crow") for key in tensors if key.endswith(".crow")]:
        crow, columns, values, size = (tensors.pop(f"{name}.{piece}") for piece in _CSR)
        rows = torch.arange(len(crow) - 1).repeat_interleave(crow.diff().long())
        dense = torch.zeros(size.tolist())
        dense[rows, columns.long()] = values.float()
        yield name, dense.numpy()
    yield from ((name, value.float().numpy()) for name, value in tensors.items())


# (format, how it is quantised) -> its writer
WRITERS: dict[tuple[str, str | None], Callable[[Subject, Weights], Written]] = {
    ("onnx", None): _onnx,
    ("onnx", "int8"): _onnx_int8,
    ("openvino", None): _openvino,
    ("openvino", "float16"): functools.partial(_openvino, half=True),
    ("mnn", None): _mnn,
    ("mnn", "int8"): _mnn_int8,
    ("coreml", None): _coreml,
    ("coreml", "float16"): functools.partial(_coreml, half=True),
    ("coreml", "int8"): functools.partial(_coreml, int8=True),
    ("torch-csr", None): _torch_csr,
}
