#!/usr/bin/env bash
# transformers 5.24.0: a BERT whose heads were removed by prune_heads of transformers 4, saved, and
# loaded by 4 without a word, does not load any more.
#
# Release 4 wrote the removed heads into config.json as pruned_heads, and made smaller layers from
# that. Release 5 keeps the field and does not read it, so the folder describes layers of full size
# that its weights do not fit. Whoever removes heads needs a class whose configuration has the sizes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==4.57.1
"$folder/venv/bin/python" - "$folder/saved" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import BertConfig, BertModel

print("transformers", version("transformers"))
torch.manual_seed(0)
config = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
model = BertModel(config).eval()
model.prune_heads({0: [1, 3], 1: [0]})
model.save_pretrained(sys.argv[1])
ids = torch.arange(12)[None]
again = BertModel.from_pretrained(sys.argv[1]).eval()
same = torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)
print("heads removed, saved and loaded again; the outputs are the same:", same)
assert same, "changed since this was written"
PYTHON
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - "$folder/saved" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

from transformers import BertConfig, BertModel

print("transformers", version("transformers"))
config = BertConfig.from_pretrained(sys.argv[1])
print("pruned_heads in the configuration:", getattr(config, "pruned_heads", None))
made = BertModel(config).encoder.layer[0].attention.self.query.weight.shape
print("a layer that is made from it:", tuple(made))
refused = ""
try:
    BertModel.from_pretrained(sys.argv[1])
except Exception as error:
    refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
print("from_pretrained:", refused or "loaded")
assert tuple(made) == (32, 32) and refused, "changed since this was written"
PYTHON
