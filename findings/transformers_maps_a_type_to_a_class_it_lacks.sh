#!/usr/bin/env bash
# transformers 5.24.0: AutoConfig makes a configuration of type voxtral_realtime_text, for which
# AutoModel names a class that the library does not have.
#
# It is the only one of all types of AutoModel: what goes through the table of types to try each
# meets a ValueError there that no configuration can avoid.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

print("transformers", version("transformers"))
named = {
    (kind, name)
    for kind, names in MODEL_MAPPING_NAMES.items()
    for name in (names if isinstance(names, (list, tuple)) else (names,))
}
missing = sorted(pair for pair in named if not hasattr(transformers, pair[1]))
print(f"of {len(named)} classes that AutoModel names, not there: {missing}")
config = transformers.AutoConfig.for_model("voxtral_realtime_text")
print("its configuration:", type(config).__name__)
refused = ""
try:
    transformers.AutoModel.from_config(config)
except ValueError as error:
    refused = str(error).split(" neither")[0]
print("AutoModel.from_config:", refused or "made")
assert missing == [("voxtral_realtime_text", "VoxtralRealtimeTextModel")], "changed"
assert refused == "Could not find VoxtralRealtimeTextModel", "changed since this was written"
PYTHON
