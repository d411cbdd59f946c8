#!/usr/bin/env bash
# gguf 0.19.0: quantizing a pruned matrix to Q4_1 or Q5_1 turns nearly all of its zeros into other
# numbers; Q4_0, Q5_0 and Q8_0 keep every one.
#
# The "_1" types store a block of 32 weights as minimum + scale * integer, and nothing places zero on
# that grid. Seen on 256 x 1024 normal weights, half of them zero: Q4_1 keeps 0.26% of the zeros and
# Q5_1 0.30%, with former zeros of up to 0.0042 beside weights of deviation 0.02. A pruned model that
# is converted this way is dense again; a file of type Q4_0 or Q8_0 is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

print("gguf", version("gguf"), "numpy", version("numpy"))
weights = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32) * 0.02
removed = np.abs(weights) < np.median(np.abs(weights))
weights[removed] = 0
share = {}
for name in ("Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1"):
    kind = GGMLQuantizationType[name]
    restored = quants.dequantize(quants.quantize(weights, kind), kind)
    share[name] = float((restored[removed] == 0).mean())
    print(f"{name}: {100 * share[name]:.2f}% of the zeros are zeros afterwards")
kept = share["Q8_0"] == share["Q5_0"] == share["Q4_0"] == 1
assert kept and share["Q5_1"] < 0.01 and share["Q4_1"] < 0.01, "changed since this was written"
PYTHON
