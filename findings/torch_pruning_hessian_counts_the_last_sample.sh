#!/usr/bin/env bash
# torch-pruning 1.6.1: GroupHessianImportance.accumulate_grad, which its documentation calls for each
# sample, keeps the squared gradients of the last sample alone.
#
# Sums are looked up by the name of a parameter and stored under the parameter, so that each call
# begins anew. One would expect the mean over all samples; whoever compares with it compares with
# scores from one sample.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torch-pruning==1.6.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn

print("torch-pruning", version("torch-pruning"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
samples = torch.randn(3, 4)


def scores(some: torch.Tensor) -> torch.Tensor:
    graph = tp.DependencyGraph().build_dependency(model, samples)
    importance = tp.importance.GroupHessianImportance(normalizer=None)
    importance.zero_grad()
    for loss in model(some).square().sum(1):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(6)))
    return importance(group)


def expected(some: torch.Tensor) -> torch.Tensor:
    each = []
    for sample in some:
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        first = (model[0].weight.square() * model[0].weight.grad.square()).sum(1)
        second = (model[2].weight.square() * model[2].weight.grad.square()).sum(0)
        each.append((first + second).detach() / 2)  # the group's mean over its two layers
    return torch.stack(each).mean(0)


every, last = scores(samples), scores(samples[-1:])
print("three samples:     ", every.tolist())
print("the last one alone:", last.tolist())
print("the mean of three: ", expected(samples).tolist())
assert torch.allclose(last, expected(samples[-1:])), "the formula has changed since this was written"
assert torch.equal(every, last), "it accumulates now"
PYTHON
