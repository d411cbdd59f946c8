#!/usr/bin/env bash
# MNN 3.6.1: --weightQuantBits 8 (or 4) turns every zero of a pruned weight into another number, unless
# --weightQuantAsymmetric 0 is passed.
#
# By default each row gets a minimum and a step, and 0 becomes the nearest of the 256 numbers, none of which is 0. One expects
# quantization to keep zeros, as the 8 bits of ONNX Runtime and Core ML do; and a network that is 80 % zeros then has
# none that a sparse kernel could skip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mnn==3.6.1 onnx==1.23.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

import MNN.expr
import MNN.nn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

print(*(f"{name} {version(name)}" for name in ("mnn", "onnx")))
random = np.random.default_rng(0)
weight = random.normal(size=(64, 128)).astype(np.float32)  # (in, out)
weight[random.random(weight.shape) < 0.8] = 0
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, size]) for name, size in (("x", 64), ("y", 128))]
product = helper.make_node("MatMul", ["x", "w"], ["y"])
graph = helper.make_graph([product], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "w.onnx")
# The compiled part of the command mnnconvert, which would install another package.
convert = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", "-f", "ONNX", "--modelFile", "w.onnx"]


def share_of_zeros_kept(*options):
    made = ("--MNNModel", "w.mnn", "--bizCode", "none", *options)
    subprocess.run([*convert, *made], check=True, capture_output=True)
    network = MNN.nn.load_module_from_file("w.mnn", ["x"], ["y"])
    identity = MNN.expr.const(np.eye(64, dtype=np.float32), [64, 64], MNN.expr.NCHW, MNN.expr.float)
    read = network.forward([identity])[0].read().reshape(64, 128)
    print(options, f"keeps {np.mean(read[weight == 0] == 0):.1%} of the zeros; weights differ by", np.abs(read - weight).max())
    return np.mean(read[weight == 0] == 0)


symmetric = ("--weightQuantAsymmetric", "0")
as_described = share_of_zeros_kept() == 1
for bits in ("8", "4"):
    as_described &= share_of_zeros_kept("--weightQuantBits", bits) < 0.1
    as_described &= share_of_zeros_kept("--weightQuantBits", bits, *symmetric) == 1
assert as_described, "changed since this was written"
PYTHON
