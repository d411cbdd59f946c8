#!/usr/bin/env bash
# MNN 3.6.1: mnnconvert ends with exit code 0 and writes no file where the ONNX network has an operator that it lacks. torch
# 2.13 exports every scaled_dot_product_attention with one of them, IsNaN.
#
# One expects an exit code other than 0, as from other converters: a script that checks it goes on with no file, or with that
# of an earlier conversion. Transformers exported with attn_implementation="eager" have no IsNaN.
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
from pathlib import Path

import onnx
from onnx import TensorProto, helper

print(*(f"{name} {version(name)}" for name in ("mnn", "onnx")))
x, y = (helper.make_tensor_value_info(n, t, [2, 3]) for n, t in (("x", TensorProto.FLOAT), ("y", TensorProto.BOOL)))
graph = helper.make_graph([helper.make_node("IsNaN", ["x"], ["y"])], "g", [x], [y])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "w.onnx")
# As the command mnnconvert does it, but without the installation of another package.
command = "import os, sys; os.system = lambda _: 0; from MNN.tools.mnnconvert import main; sys.exit(main())"
options = ["-f", "ONNX", "--modelFile", "w.onnx", "--MNNModel", "w.mnn", "--bizCode", "none"]
done = subprocess.run([sys.executable, "-c", command, *options], capture_output=True, text=True)
print([line for line in done.stdout.splitlines() if "Not Support" in line])
print("exit code", done.returncode, "file written:", Path("w.mnn").exists())
assert done.returncode == 0 and not Path("w.mnn").exists(), "changed since this was written"
PYTHON
