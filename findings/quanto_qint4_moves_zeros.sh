#!/usr/bin/env bash
# optimum-quanto 0.2.7: weights=qint4 and qint2 turn every zero of a pruned weight into another number; qint8 and qfloat8 keep
# all of them.
#
# Groups get a scale and a shift, both floating-point numbers, and none of the 16 (4) steps is exactly 0. One expects that a
# zero stays zero, as with qint8 of the same package and with the 4 bits of torchao, bitsandbytes and GGUF's Q4_0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q optimum-quanto==0.2.7 ninja # ninja: it compiles what unpacks 4 bits
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from optimum import quanto

print(*(f"{name} {version(name)}" for name in ("torch", "optimum-quanto")))
kept = {}
for name in ("qint8", "qfloat8", "qint4", "qint2"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(256, 512) < 0.8, 0)
    zeros = model[0].weight.detach() == 0
    quanto.quantize(model, weights=getattr(quanto, name))
    quanto.freeze(model)
    weight = model[0].weight.dequantize()
    kept[name] = (weight[zeros] == 0).float().mean().item()
    least = weight[zeros].abs().max().item()
    print(f"{name}: {kept[name]:.1%} of the zeros stay; the largest number in their place is {least:.4f}")
assert kept["qint8"] == kept["qfloat8"] == 1, "changed since this was written"
assert max(kept["qint4"], kept["qint2"]) < 0.01, "changed since this was written"
PYTHON
