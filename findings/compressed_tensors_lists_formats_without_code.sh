#!/usr/bin/env bash
# compressed-tensors 0.20.1: CompressionFormat lists "sparse-bitmask", "sparse-24-bitmask" and "marlin-24",
# but no compressor is registered for any of them.
#
# Looking up the class that would read or write such a checkpoint raises KeyError. So this version has
# no sparse storage for a pruned model, although its list of formats says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q compressed-tensors==0.20.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat

print("compressed-tensors", version("compressed-tensors"))
missing = []
for known in CompressionFormat:
    try:
        print(f"{known.value}: {BaseCompressor.get_value_from_registry(known.value).__name__}")
    except KeyError:
        print(f"{known.value}: no compressor is registered")
        missing.append(known.value)
listed = {"sparse-bitmask", "sparse-24-bitmask", "marlin-24"}
assert listed <= set(missing), "changed since this was written"
PYTHON
