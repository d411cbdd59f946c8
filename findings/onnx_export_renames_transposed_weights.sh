#!/usr/bin/env bash
# torch 2.13.0 with onnx 1.23.2 and onnxscript 0.7.2: the exporter stores the weight of a Linear layer
# that reads (batch, tokens, features) transposed and under a generated name.
#
# The same layers keep "fc1.weight" and their shape (out, in) where the input is (batch, features). In
# the first case the initializers are called val_0, val_1, ... and have shape (in, out), so pruning
# masks that are kept by parameter name match nothing in the exported file, and a transformer's 2:4
# groups lie along the other axis. Every value is the same, bit for bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxscript==0.7.2
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from onnx import numpy_helper

print(*(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript")))
torch.manual_seed(0)
model = torch.nn.Sequential()
model.add_module("fc1", torch.nn.Linear(64, 128))
model.add_module("act", torch.nn.ReLU())
model.add_module("fc2", torch.nn.Linear(128, 10))
model.eval()


def weights(example):
    graph = torch.onnx.export(model, (example,), dynamo=True, verbose=False).model_proto.graph
    return {i.name: numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) == 2}


flat, tokens = weights(torch.randn(2, 64)), weights(torch.randn(2, 5, 64))
print("(batch, features):", {name: value.shape for name, value in flat.items()})
print("(batch, tokens, features):", {name: value.shape for name, value in tokens.items()})
original = model.fc1.weight.detach().numpy()
kept = np.array_equal(flat["fc1.weight"], original)
renamed = not any(name.endswith("weight") for name in tokens)
transposed = any(np.array_equal(value, original.T) for value in tokens.values())
assert kept and renamed and transposed, "changed since this was written"
PYTHON
