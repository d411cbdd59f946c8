#!/usr/bin/env bash
# torchao 0.18.0: WandaSparsifier ranks weights by |w| times the square of the norm of their input.
#
# Its documentation names the product of the norm and the magnitude, as the paper does (Sun et al.
# 2024). The observer adds up squares, and nothing takes the root, so that inputs count too much and
# other weights go; whoever compares with it does not compare with Wanda.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>"$folder/warnings"
from importlib.metadata import version

import torch
from torch import nn
from torchao.sparsity import WandaSparsifier

print("torch", torch.__version__, "torchao", version("torchao"))
layer = nn.Linear(2, 1, bias=False)
with torch.no_grad():
    layer.weight.copy_(torch.tensor([[1.0, 3.0]]))
model = nn.Sequential(layer)
inputs = torch.tensor([[2.0, 0.6], [0.0, 0.8]])  # columns with norms 2 and 1

sparsifier = WandaSparsifier(sparsity_level=0.5)
sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}])
model(inputs)
seen = model[0].activation_post_process.norm.tolist()
sparsifier.step()
sparsifier.squash_mask()

norms = inputs.norm(dim=0)
kept = model[0].weight.detach()
print("norms of the inputs:   ", norms.tolist())
print("what was observed:     ", seen)
print("|w| times the norm:    ", (torch.tensor([1.0, 3.0]) * norms).tolist(), "-> the first one goes")
print("|w| times its square:  ", (torch.tensor([1.0, 3.0]) * norms.square()).tolist())
print("weights after pruning: ", kept.tolist())
assert torch.allclose(torch.tensor(seen), norms.square()), "it observes something else now"
assert kept.tolist() == [[1.0, 0.0]], "it goes by the norm now"
PYTHON
