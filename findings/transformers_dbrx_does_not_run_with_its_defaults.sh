#!/usr/bin/env bash
# transformers 5.24.0: a Dbrx model cannot be made from its configuration's defaults for attention.
#
# The part of the configuration that describes attention has no rope_theta, and building a model asks
# for it. With that alone, the model is built, and its first forward pass raises: clip_qkv is None by
# default, and is given to torch.clamp as both bounds. With both settings it runs. Whoever tries a
# program on small, untrained models of every type has to know these two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, DbrxConfig

print("transformers", version("transformers"), "torch", version("torch"))


def tried(**attention):
    """What becomes of a small model with these settings of attention."""
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=50,
        attn_config={"kv_n_heads": 2, **attention}, ffn_config=experts,
    )  # fmt: skip
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
    except AttributeError as error:
        return f"not built: {error}"
    try:
        with torch.no_grad():
            model(torch.arange(8)[None])
    except RuntimeError as error:
        return f"does not run: {error}"
    return "runs"


seen = [tried(), tried(rope_theta=1e4), tried(rope_theta=1e4, clip_qkv=8.0)]
for settings, result in zip(("defaults", "rope_theta", "rope_theta and clip_qkv"), seen, strict=True):
    print(f"{settings}: {result}")
assert seen[0].startswith("not built") and "rope_theta" in seen[0], "changed since this was written"
assert seen[1].startswith("does not run") and "clamp" in seen[1], "changed since this was written"
assert seen[2] == "runs", "changed since this was written"
PYTHON
