"""What ways to quantise leave of the zeros of a pruned weight: each on one random matrix.

    pip install torchao optimum-quanto bitsandbytes gguf onnx onnxscript onnxruntime MNN coremltools
    python bench/quality/quantizers.py [--json FILE]

The matrix (256, 512) has 80 % zeros and normal weights. Each package quantises it by its own
function and gives back the numbers that it stands for, or the files that it wrote are read.
Packages that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.network.inference.export import export

SHAPE, ZEROS = (256, 512), 0.8
TORCHAO = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "IntxWeightOnlyConfig",
)


def of_torchao(config: str) -> Callable[[nn.Linear], Tensor]:
    def run(layer: nn.Linear) -> Tensor:
        quantization: Any = importlib.import_module("torchao.quantization")
        model = nn.Sequential(layer)
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0].weight.dequantize()

    return run


def of_quanto(name: str) -> Callable[[nn.Linear], Tensor]:
    def run(layer: nn.Linear) -> Tensor:
        quanto: Any = importlib.import_module("optimum.quanto")
        model = nn.Sequential(layer)
        quanto.quantize(model, weights=getattr(quanto, name))
        quanto.freeze(model)
        return model[0].weight.dequantize()

    return run


def of_bitsandbytes(kind: str) -> Callable[[nn.Linear], Tensor]:
    def run(layer: nn.Linear) -> Tensor:
        functional: Any = importlib.import_module("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(layer.weight.detach(), quant_type=kind)
        return functional.dequantize_4bit(packed, state)

    return run


def of_gguf(name: str) -> Callable[[nn.Linear], Tensor]:
    def run(layer: nn.Linear) -> Tensor:
        gguf: Any = importlib.import_module("gguf")
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf.quants.quantize(layer.weight.detach().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind))

    return run


def of_torch(layer: nn.Linear) -> Tensor:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), dtype=torch.qint8)
    return model[0].weight().dequantize()


def of_export(to: str, quantize: str) -> Callable[[nn.Linear], Tensor | float]:
    def run(layer: nn.Linear) -> float:
        with tempfile.TemporaryDirectory() as folder:
            x = torch.ones(2, 3, SHAPE[1])
            report = export(layer, x, Path(folder), to=to, quantize=quantize)
        (weight,) = report.weights
        return weight.kept / weight.zeros

    return run


WAYS: dict[tuple[str, str], Callable[[nn.Linear], Tensor | float]] = {
    ("torch", "quantize_dynamic, qint8"): of_torch,
    **{("torchao", config): of_torchao(config) for config in TORCHAO},
    **{("optimum-quanto", n): of_quanto(n) for n in ("qint8", "qint4", "qint2", "qfloat8")},
    **{("bitsandbytes", kind): of_bitsandbytes(kind) for kind in ("nf4", "fp4")},
    **{("gguf", n): of_gguf(n) for n in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")},
    ("onnxruntime", "quantize_dynamic, int8"): of_export("onnx", "int8"),
    ("mnn", "8 bits, symmetric"): of_export("mnn", "int8"),
    ("coremltools", "linear_quantize_weights, symmetric int8"): of_export("coreml", "int8"),
}


def main() -> None:
    """Run all that are installed and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for (package, way), quantised in WAYS.items():
        torch.manual_seed(0)
        layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False).eval()
        with torch.no_grad():
            layer.weight.normal_().masked_fill_(torch.rand(SHAPE) < ZEROS, 0)
        zeros = layer.weight.detach() == 0
        try:
            found = quantised(layer)
        except Exception as error:  # whatever a package raises, as where it is not installed
            print(f"{package}, {way}: left out: {str(error).splitlines()[0][:100]}")
            continue
        kept = found if isinstance(found, float) else float((found[zeros] == 0).double().mean())
        row = {"package": package, "version": metadata.version(package), "way": way, "kept": kept}
        print(f"{package} {row['version']}, {way}: {kept:.2%} of the zeros stay", flush=True)
        rows.append(row)
    if arguments.json:
        about = {"shape": SHAPE, "zeros": ZEROS, "date": datetime.date.today().isoformat()}
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
