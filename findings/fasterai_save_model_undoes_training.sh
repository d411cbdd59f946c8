#!/usr/bin/env bash
# fasterai 0.4.1: Sparsifier.save_model writes the weights that the model had when the Sparsifier was
# made, with the zeros, and not those that it has.
#
# It is documented as "Save model without sparsification buffers". One would expect the model as it
# is; whoever prunes, trains on, and saves loses the training, and only measuring what was saved
# shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 fasterai==0.4.1
FOLDER="$folder" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
from importlib.metadata import version

import torch
from fasterai.core.criteria import large_final
from fasterai.sparse.sparsifier import Sparsifier
from torch import nn

print("torch", torch.__version__, "fasterai", version("fasterai"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4))
before = model[0].weight.detach().clone()
sparsifier = Sparsifier(model, "weight", "local", large_final, layer_type=nn.Linear)
sparsifier.sparsify_model(0.5)
print(sparsifier.save_model.__doc__)

# Training on, with the zeros held.
x, y = torch.randn(64, 8), torch.randn(64, 4)
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    optimiser.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimiser.step()
    sparsifier._apply_masks()
trained = model[0].weight.detach().clone()

path = os.path.join(os.environ["FOLDER"], "model.pt")
sparsifier.save_model(path)
known = [nn.Sequential, nn.Linear]
with torch.serialization.safe_globals(known):
    saved = torch.load(path, weights_only=True)[0].weight.detach()

mask = trained != 0
print("loss of the trained model:", float(nn.functional.mse_loss(model(x), y)))
print("weights changed by training, at most:  ", float((trained - before * mask).abs().max()))
print("saved against trained weights, at most:", float((saved - trained).abs().max()))
print("saved against the first ones, masked:  ", float((saved - before * mask).abs().max()))
assert not torch.equal(trained, before * mask)
assert torch.equal(saved, before * mask), "it saves something else now"
PYTHON
