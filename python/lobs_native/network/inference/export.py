"""A pruned network in another program's format, with its zeros counted there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.network.inference.engines import Subject, absent, first_line
from lobs_native.network.inference.formats import NEEDS, WRITERS, Stored

__all__ = ["FORMATS", "QUANTIZERS", "REFUSED", "ExportReport", "ExportedWeight", "export"]

FORMATS = tuple(to for to, quantize in WRITERS if quantize is None)
QUANTIZERS = tuple(dict.fromkeys(quantize for _, quantize in WRITERS if quantize is not None))
# Ways to quantise that lose zeros; report/quantizers.json and findings/ have the measurements.
REFUSED = {
    "gptq": "it moves rounding errors onto removed weights: 98 % of the zeros stay "
    "(llm-compressor 0.14, gptqmodel 7.6); use a round-to-nearest quantiser, or apply_masks after",
    "fp8_dynamic": "llm-compressor 0.14 by GPTQ keeps 0.7 % of the zeros; round to nearest instead",
    "nvfp4": "llm-compressor 0.14 by GPTQ keeps 79 % of the zeros; round to nearest instead",
    "q4_1": "blocks have a minimum but no exact zero: 0.3 to 5 % of the zeros stay; Q4_0 keeps all",
    "q5_1": "blocks have a minimum but no exact zero: 0.3 to 5 % of the zeros stay; Q5_0 keeps all",
    "qint4": "groups of optimum-quanto 0.2.7 have no exact zero: 0 % stay; qint8 keeps all",
    "qint2": "groups of optimum-quanto 0.2.7 have no exact zero: 0 % stay; qint8 keeps all",
}


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
        An existing folder, for the files.
    to : str
        "onnx": model.onnx. "openvino": model.xml and model.bin. "mnn": model.mnn, with sparse
        weights from 60 % zeros on; a network of transformers is exported with eager attention.
        "coreml": model.mlpackage, with sparse weights from half zeros on; it can be written
        anywhere, and runs on Apple's systems. "torch-csr": model.csr.safetensors, with compressed
        rows of weights, where these are smaller.
    quantize : str, optional
        "int8": ONNX Runtime's dynamic quantisation for "onnx"; weights in symmetric steps for
        "mnn" and "coreml". "float16": for "openvino" and "coreml". Ways to quantise that are known
        to lose zeros are refused with the reason.

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
        if (to, quantize) not in WRITERS:
            formats = ", ".join(name for name in FORMATS if (name, quantize) in WRITERS)
            raise ArgumentError(f"quantize: {quantize} is for {formats}, not for {to!r}")
    for what in (to, f"{to}, {quantize}"):
        if why := absent(NEEDS.get(what, ())):
            raise LobsError(f"to: {what}: {why}")
    subject = Subject(copy.deepcopy(model).eval(), batch, folder)
    weights = {
        name: module.weight.detach().float().numpy()
        for name, module in subject.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and bool((module.weight == 0).any())
    }
    try:
        file, tensors = WRITERS[to, quantize](subject, weights)
    except Exception as error:  # whatever a converter raises
        raise CheckpointError(
            f"to: {to}: the network could not be converted: {first_line(error)}"
        ) from error
    found = tuple(found_weight(name, weight, tensors) for name, weight in weights.items())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
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
