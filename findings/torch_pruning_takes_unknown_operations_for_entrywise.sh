#!/usr/bin/env bash
# torch-pruning 1.6.1: a channel is taken out across an operation that moves or mixes channels (roll,
# flip, cumsum) as if it worked entry by entry, without an error or a warning.
#
# The channel that is set to zero in what reads it is then another than the one that is taken out:
# the smaller network runs, and computes something else. One would expect that an operation that is
# not known stops the group. It is why channels are traced by own rules here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torch-pruning==1.6.1 numpy
"$folder/venv/bin/python" -W error - <<'PYTHON'
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn

print("torch-pruning", version("torch-pruning"))


class Network(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.second(self.how(self.first(x)))


ways = {
    "relu": torch.relu,
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
}
x, apart = torch.randn(2, 3, 8, 8), {}
for name, how in ways.items():
    torch.manual_seed(0)
    model = Network(how)
    with torch.no_grad():  # a channel that nothing reads: its filter and its bias are zero
        model.first.weight[0] = 0
        model.first.bias[0] = 0
        wanted = model(x)
    graph = tp.DependencyGraph().build_dependency(model, x)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, [0])
    group.prune()
    with torch.no_grad():
        apart[name] = float((model(x) - wanted).norm() / wanted.norm())
    print(f"{name}: without a channel of zeros, the output differs by {apart[name]:.2g}")
assert apart["relu"] < 1e-5, "changed since this was written"
assert min(apart["roll"], apart["flip"]) > 0.1, "it is right now, or stops"
PYTHON
