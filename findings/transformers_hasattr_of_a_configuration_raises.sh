#!/usr/bin/env bash
# transformers 5.24.0: hasattr(config, name) and getattr(config, name, None) raise for a
# configuration whose layers may differ.
#
# EmbeddingGemma2TextConfig, as it is made by default, keeps num_key_value_heads for each layer. To
# ask it for the field raises AmbiguousGlobalPerLayerAttributeError, a RuntimeError and no
# AttributeError, which is what hasattr and the default of getattr answer to. Code that looks whether
# a configuration has a field, as much code does with configurations of any class, ends there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

from transformers import EmbeddingGemma2TextConfig

print("transformers", version("transformers"))
config = EmbeddingGemma2TextConfig()
raised = []
for ask in (lambda: hasattr(config, "num_key_value_heads"),
            lambda: getattr(config, "num_key_value_heads", None)):
    try:
        print("answered:", ask())
    except Exception as error:
        raised.append(error)
        print(f"{type(error).__name__}, a {type(error).__base__.__name__}: {str(error)[:72]}...")
others = [error for error in raised if not isinstance(error, AttributeError)]
assert len(others) == 2, "changed since this was written"
PYTHON
